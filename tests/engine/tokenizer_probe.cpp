// SPDX-License-Identifier: Apache-2.0
// The engine's tokenizer as a filter, for check_tokenizer.py: one JSON request a line, one JSON answer a line.
//
//   tokenizer_probe DIR VOCAB_SIZE
//
//   {"encode": hex}       -> {"ids": [...]} or {"error": sentence}; texts are in hex, because not all are UTF-8
//   {"decode": [id, ...]} -> {"text": hex, "stream": [hex, ...]}: all at once, and what a terminal gets token by token
//   {"id_of": hex}        -> {"id": id or null}
#include <cstddef>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/tokenizer.hpp"

namespace {

using Json = nlohmann::json;
using namespace kvsparse_tools;

std::string to_hex(const std::string& bytes) {
  std::string hex;
  for (const char byte : bytes) {
    for (const int digit : {static_cast<unsigned char>(byte) >> 4, static_cast<unsigned char>(byte) & 15}) {
      hex += "0123456789abcdef"[digit];
    }
  }
  return hex;
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

Json answer(const Tokenizer& tokenizer, const Json& request) {
  if (request.contains("encode")) {
    return {{"ids", tokenizer.encode(from_hex(request.at("encode").get<std::string>())).ids}};
  }
  if (request.contains("id_of")) {
    const auto id = tokenizer.id_of(from_hex(request.at("id_of").get<std::string>()));
    return {{"id", id ? Json(*id) : Json()}};
  }
  const auto ids = request.at("decode").get<std::vector<TokenId>>();
  Json stream = Json::array();
  TextStream text(tokenizer);
  for (const TokenId id : ids) stream.push_back(to_hex(text.push(id)));
  stream.push_back(to_hex(text.finish()));
  return {{"text", to_hex(tokenizer.decode(ids))}, {"stream", stream}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 1;
  try {
    const Tokenizer tokenizer(argv[1], std::strtoul(argv[2], nullptr, 10));
    for (std::string line; std::getline(std::cin, line);) {
      Json reply;
      try {
        reply = answer(tokenizer, Json::parse(line));
      } catch (const std::exception& error) {
        reply = {{"error", error.what()}};
      }
      std::cout << reply.dump() << std::endl;
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 2;
  }
  return 0;
}
