// SPDX-License-Identifier: Apache-2.0
// Writes the seeds that depend on the library's version: a snapshot of every kind of cache, and sequences of verbs.
//
//   make_seeds DIR     writes DIR/snapshot/* and DIR/verbs/*
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>

#include "inputs.hpp"
#include "support/test_rng.hpp"

namespace {

void write(const std::filesystem::path& file, const std::string& bytes) {
  std::filesystem::create_directories(file.parent_path());
  std::ofstream out(file, std::ios::binary);
  out << bytes;
  if (!out.flush()) throw std::runtime_error("cannot write " + file.string());
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: make_seeds DIR");
  const std::filesystem::path directory = argv[1];
  for (std::size_t kind = 0; kind < kvsparse_test::snapshot_kinds(); ++kind) {
    for (const std::size_t tokens : {0U, 5U, 17U}) {
      write(directory / "snapshot" / (std::to_string(kind) + "_" + std::to_string(tokens)),
            kvsparse_test::snapshot_of(kind, tokens));
    }
  }
  kvsparse_test::TestRng rng(1);
  for (int world = 0; world < 60; ++world) {
    std::string bytes;
    for (int i = 0; i < 4 + 5 * 40; ++i) bytes += static_cast<char>(i == 0 ? world : rng.below(256));
    write(directory / "verbs" / std::to_string(world), bytes);
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << "make_seeds: " << error.what() << '\n';
  return 1;
}
