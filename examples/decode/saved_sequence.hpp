// SPDX-License-Identifier: Apache-2.0
// The file of --save and --load: a sequence whose decoding can go on as if it had never stopped.
//
//   one line of JSON: what the file is, the text's tokens, how many a sequence may have, a fingerprint of the model
//   the decoder: its newest hidden state, then a snapshot of each layer's cache
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <istream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "common/file_error.hpp"
#include "common/output_file.hpp"
#include "common/untrusted_json.hpp"
#include "engine/decoder.hpp"
#include "engine/json_fields.hpp"

namespace kvsparse_tools {

/// Tells models apart by the embeddings of a text's tokens.
inline std::uint64_t model_fingerprint(const Model& model, const std::vector<TokenId>& text) {
  std::uint64_t hash = fnv1a(Vector());
  for (const TokenId token : text) hash = fnv1a(model.embedding(token), hash);
  return hash;
}

inline void save_sequence(const std::filesystem::path& file, const Decoder& decoder, const std::vector<TokenId>& text,
                          std::size_t max_tokens) {
  const nlohmann::ordered_json header{{"decode_sequence", 1},
                                      {"tokens", text},
                                      {"max_tokens", max_tokens},
                                      {"model", model_fingerprint(decoder.model(), text)}};
  write_file(file, [&](std::ostream& out) {
    out << header.dump() << '\n';
    decoder.save(out);
  });
}

/// A saved sequence whose header is read and checked; restore() reads the rest.
class SavedSequence {
 public:
  /// Throws FileError for a file of another kind or of another model.
  SavedSequence(std::filesystem::path file, const Model& model) : file_(std::move(file)) {
    (void)regular_file_size(file_);
    in_.open(file_, std::ios::binary);
    std::string line;
    constexpr std::size_t longest = std::size_t{1} << 28;
    for (int c = in_.get(); c != '\n'; c = in_.get()) {
      if (c == std::istream::traits_type::eof() || line.size() == longest) {
        throw FileError(file_, "has no line of JSON at its beginning, so decode --save did not write it");
      }
      line += static_cast<char>(c);
    }
    const nlohmann::json json = parse_untrusted_json(line, file_, 4);
    const JsonFields fields(json, file_);
    if (fields.find("decode_sequence") == nullptr || *fields.find("decode_sequence") != 1) {
      fields.fail("was not written by this version's decode --save");
    }
    max_tokens_ = fields.required_size("max_tokens");
    for (const nlohmann::json& token : fields.array("tokens")) {
      if (!token.is_number_unsigned() || token.get<std::uint64_t>() >= model.config().vocab_size) {
        fields.refuse(
            "tokens", token,
            "ids below the model's vocab_size " + std::to_string(model.config().vocab_size) + " were expected");
      }
      text_.push_back(token.get<TokenId>());
    }
    if (text_.empty()) fields.fail("holds no tokens");
    const nlohmann::json& fingerprint = fields.required("model");
    if (fingerprint != model_fingerprint(model, text_)) fields.fail("was saved with another model");
  }

  const std::vector<TokenId>& text() const { return text_; }
  std::size_t max_tokens() const { return max_tokens_; }

  /// Makes a new decoder go on from the saved one. Once. Throws FileError, also for caches that are not what was saved.
  void restore(Decoder& decoder) {
    try {
      decoder.load(in_);
    } catch (const kvsparse::SnapshotError& error) {
      throw FileError(file_, error.what());
    }
    if (decoder.position() != text_.size()) {
      throw FileError(file_, "holds caches of " + std::to_string(decoder.position()) + " tokens and a text of " +
                                 std::to_string(text_.size()));
    }
  }

 private:
  std::filesystem::path file_;
  std::ifstream in_;
  std::vector<TokenId> text_;
  std::size_t max_tokens_ = 0;
};

}  // namespace kvsparse_tools
