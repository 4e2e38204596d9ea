// SPDX-License-Identifier: Apache-2.0
//
// What is done with bytes that anybody may have written, by the fuzzers and by untrusted_test. Each reader takes its
// bytes as a whole or refuses them in one clear sentence, and what it took must then work. All else is thrown as
// BrokenPromise.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvsparse_test {

class BrokenPromise : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// A sentence for people: one line of printable UTF-8 that fits a screen.
void require_clear_sentence(std::string_view sentence);

/// Readers return the sentence of the refusal, or nothing when the bytes were good.
using Reader = std::string(std::string_view bytes);

/// A safetensors file, each of its tensors; and as a trace.
Reader read_safetensors, read_trace;
/// config.json and tokenizer.json of a model's directory; texts are encoded with what was read, and decoded.
Reader read_config, read_tokenizer;

/// The first byte chooses a kind of cache, the rest is a snapshot for it, whose checksums are made right first: what a
/// checksum refuses is the business of snapshot_test. A refusal changes nothing; a cache that was loaded goes on
/// decoding within its budget and saves what it loaded.
Reader read_snapshot;
/// How many kinds of cache there are: one for each policy that is compiled into the program.
std::size_t snapshot_kinds();
/// Such an input, of a cache after so many tokens.
std::string snapshot_of(std::size_t kind, std::size_t tokens);

}  // namespace kvsparse_test
