// SPDX-License-Identifier: Apache-2.0
//
// Files that strangers wrote: every prefix of small ones, every byte flipped, and bombs. Each is read or
// refused in one clear sentence (fuzz/inputs.hpp says what that means), without taking more memory than its size
// explains. fuzz/run.sh tries what nobody thought of.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "common/allocation_counter.hpp"
#include "common/file_error.hpp"
#include "fuzz/inputs.hpp"

namespace kvsparse_test {
namespace {

std::size_t inputs = 0;  // that were tried
struct CountInputs : testing::Environment {
  void TearDown() override { std::cout << inputs << " inputs\n"; }
};
[[maybe_unused]] const auto* const count_inputs = testing::AddGlobalTestEnvironment(new CountInputs);

/// JSON as a tree, maps of names and the buffers of streams are a multiple of the file; what a file only claims is not.
std::string read_frugally(Reader reader, std::string_view bytes) {
  ++inputs;
  const std::size_t before = kvsparse_tools::allocations_of_this_thread().wanted_bytes;
  std::string refusal = reader(bytes);
  const std::size_t wanted = kvsparse_tools::allocations_of_this_thread().wanted_bytes - before;
  EXPECT_LE(wanted, (std::size_t{1} << 20) + 200 * bytes.size()) << refusal;
  return refusal;
}

std::string as_text(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) text += byte >= ' ' && byte <= '~' ? byte : '.';
  return text;
}

/// Every prefix, and every byte with one of its bits flipped, with all, and replaced by a quote. Readers
/// throw what must not be.
void expect_all_damage_endured(Reader reader, const std::string& good) {
  ASSERT_EQ(read_frugally(reader, good), "") << as_text(good);
  const auto endure = [&](const std::string& bad) {
    try {
      (void)read_frugally(reader, bad);
    } catch (const std::exception& error) {
      FAIL() << error.what() << "\n" << as_text(bad);
    }
  };
  for (std::size_t length = 0; length < good.size(); ++length) endure(good.substr(0, length));
  for (std::size_t at = 0; at < good.size() && !testing::Test::HasFailure(); ++at) {
    std::string bad = good;
    for (const int byte : {good[at] ^ (1 << at % 8), good[at] ^ 0xFF, int{'"'}}) {
      bad[at] = static_cast<char>(byte);
      endure(bad);
    }
  }
}

std::vector<std::string> corpus(const char* kind) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(KVSPARSE_CORPUS) / kind)) {
    std::ifstream in(entry.path(), std::ios::binary);
    files.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  return files;
}

TEST(Damage, OfSafetensorsFiles) {
  for (const std::string& file : corpus("safetensors")) expect_all_damage_endured(read_safetensors, file);
  std::size_t traces = 0;
  for (const std::string& file : corpus("safetensors")) {
    if (!read_trace(file).empty()) continue;
    ++traces;
    expect_all_damage_endured(read_trace, file);
  }
  EXPECT_EQ(traces, 1U);
}

TEST(Damage, OfModelConfigurations) {
  for (const std::string& file : corpus("config")) expect_all_damage_endured(read_config, file);
}

TEST(Damage, OfTokenizers) {
  for (const std::string& file : corpus("tokenizer")) {
    if (file.size() < 1500) expect_all_damage_endured(read_tokenizer, file);
  }
}

// --- bombs ----------------------------------------------------------------------------------------------------------

std::string safetensors(const std::string& header, std::size_t body, std::uint64_t claimed) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &claimed, 8);
  return bytes + header + std::string(body, '\0');
}
std::string safetensors(const std::string& header, std::size_t body = 0) {
  return safetensors(header, body, header.size());
}
std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}
std::string repeated(std::size_t count, const std::string& text) {
  std::string all;
  for (std::size_t i = 0; i < count; ++i) all += text;
  return all;
}

void expect_refusal(Reader reader, const std::string& bytes, std::string_view words) {
  const std::string refusal = read_frugally(reader, bytes);
  EXPECT_NE(refusal.find(words), std::string::npos) << refusal << "\nexpected: " << words;
}

TEST(Bombs, InSafetensorsFiles) {
  const auto refused = [](const std::string& bytes, std::string_view words) {
    expect_refusal(read_safetensors, bytes, words);
  };
  for (const std::uint64_t claimed :
       {std::uint64_t{1} << 32, std::uint64_t{1} << 63, ~std::uint64_t{0}, ~std::uint64_t{7}}) {
    refused(safetensors("{}", 0, claimed), "header length");
  }
  refused(safetensors("{}", 4), "4 bytes at its end belong to no tensor");
  refused(safetensors(R"({"a":)" + tensor("F32", "[4294967296,4294967296,4]", "[0,4]") + "}", 4), "overflows 64 bits");
  refused(safetensors(R"({"a":)" + tensor("F64", "[2305843009213693952]", "[0,4]") + "}", 4), "overflows 64 bits");
  refused(safetensors(R"({"a":)" + tensor("F32", "[1099511627776]", "[0,4]") + "}", 4), "needs 4398046511104 bytes");
  refused(safetensors(R"({"a":)" + tensor("F32", "[0,18446744073709551615]", "[0,4]") + "}", 4), "needs 0 bytes");
  refused(safetensors(R"({"a":)" + tensor("F33", "[1]", "[0,4]") + "}", 4), "unknown dtype 'F33'");
  refused(safetensors(R"({"a":)" + tensor("F32", "[1]", "[0,4,8]") + "}", 4), "3 numbers, not 2");
  refused(safetensors(R"({"a":)" + tensor("F32", "[1]", "[4,8]") + "}", 4), "do not lie within");
  refused(safetensors(R"({"a":)" + tensor("F32", "[1]", "[18446744073709551612,4]") + "}", 4), "do not lie within");
  refused(
      safetensors(R"({"a":)" + tensor("F32", "[2]", "[0,8]") + R"(,"b":)" + tensor("F32", "[2]", "[4,12]") + "}", 12),
      "inside the tensor before it");
  refused(
      safetensors(R"({"a":)" + tensor("F32", "[1]", "[0,4]") + R"(,"b":)" + tensor("F32", "[1]", "[8,12]") + "}", 12),
      "leaving a hole");
  refused(safetensors(R"({"a":)" + tensor("F32", "[1]", "[0,4]") + R"(,"a":)" + tensor("F32", "[1]", "[0,4]") + "}", 4),
          "appears twice");
  refused(safetensors(repeated(100'000, "[")), "nested deeper");
  refused(safetensors(repeated(100'000, R"({"a":)")), "nested deeper");
  refused(safetensors(R"({"a":)" + tensor("F32", "[" + repeated(20'000, "1,") + "0]", "[0,4]") + "}", 4),
          "needs 0 bytes");
  refused(safetensors(R"({")" + repeated(20'000, "x") + R"(":7})"), "is not described by a JSON object");
  refused(safetensors("{\"\\u001b[2J\\n\xC2\x9B\":7}"), "tensor '\?[2J\?\?\?'");
  refused(safetensors("{\"\xFF\":7}"), "not valid JSON");
}

TEST(Bombs, InModelConfigurations) {
  const std::string good = R"({"model_type":"llama","vocab_size":9,"hidden_size":8,"num_hidden_layers":1,)"
                           R"("num_attention_heads":2,"intermediate_size":8)";
  ASSERT_EQ(read_config(good + "}"), "");
  const auto refused = [&](const std::string& more, std::string_view words) {
    expect_refusal(read_config, good + "," + more + "}", words);
  };
  refused(R"("head_dim":18446744073709551616)", "head_dim");
  refused(R"("head_dim":1e300)", "head_dim");
  refused(R"("head_dim":33554432)", "from 1 to 16777216");
  refused(R"("rope_theta":1e400)", "not valid JSON");
  refused(R"("rope_theta":-0.0)", "a positive number");
  refused(R"("rms_norm_eps":1e300)", "rms_norm_eps");
  refused(R"("eos_token_id":)" + repeated(5000, "["), "nested deeper");
  refused(R"("eos_token_id":[[1]])", "a token id or a list of them");
  refused(R"("rope_scaling":{"rope_type":")" + repeated(5000, "\\u0007") + R"("})", "is of type '\?\?\?\?");
}

TEST(Bombs, InTokenizers) {
  const auto bpe = [](const std::string& vocab, const std::string& merges, const std::string& more = "") {
    return R"({"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},"model":{"type":"BPE","vocab":)" + vocab +
           R"(,"merges":)" + merges + "}" + more + "}";
  };
  ASSERT_EQ(read_tokenizer(bpe(R"({"a":0})", "[]")), "");
  const auto refused = [](const std::string& bytes, std::string_view words) {
    expect_refusal(read_tokenizer, bytes, words);
  };
  refused(bpe(R"({"a":18446744073709551615})", "[]"), "vocab_size 1000");
  refused(bpe(R"({"a":0,"b":0})", "[]"), "share the id");
  refused(bpe(R"({"a":0})", "[" + repeated(5000, "[")), "nested deeper");
  refused(bpe(R"({"a":0})", R"([[")" + repeated(5000, "a") + R"(","a"]])"), "which its vocab lacks");
  const std::string odd_name = "\\u001b" + repeated(5000, "y");
  refused(
      bpe(R"({"a":0})", "[]",
          R"(,"post_processor":{"type":"TemplateProcessing","special_tokens":{},"single":[{"SpecialToken":{"id":")" +
              odd_name + R"("}}]})"),
      "has no '?yyy");
  const auto pattern = [&](const std::string& regex) {
    return R"({"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","behavior":"Isolated","pattern":{"Regex":")" +
           regex +
           R"("}},{"type":"ByteLevel","add_prefix_space":false}]},"model":{"type":"BPE","vocab":{"a":0},"merges":[]}})";
  };
  ASSERT_EQ(read_tokenizer(pattern("a+")), "");
  refused(pattern(repeated(20'000, "(")), "no regular expression");
  refused(pattern("(((((a{1,999}){1,999}){1,999}){1,999}){1,999"), "the part '{1,999'");
}

TEST(QuotedText, IsPrintableUtf8AndCutBetweenCharacters) {
  using kvsparse_tools::in_quotes;
  EXPECT_EQ(in_quotes("plain"), "'plain'");
  EXPECT_EQ(in_quotes("a\x1B[2J\n\x7F"), "'a?[2J\?\?'");
  EXPECT_EQ(in_quotes("\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"), "'\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80'");
  EXPECT_EQ(in_quotes("\xC2\x9B"
                      "31m"),
            "'\?\?31m'");                      // a control character beyond ASCII
  EXPECT_EQ(in_quotes("\xFF\xC3"), "'\?\?'");  // no UTF-8
  EXPECT_EQ(in_quotes("\xC0\xAF\xED\xA0\x80\xF4\x90\x80\x80"),
            "'\?\?\?\?\?\?\?\?\?'");  // overlong, a surrogate, beyond Unicode
  EXPECT_EQ(in_quotes("ab\xE2\x82\xAC", 4), "'ab...'");
  EXPECT_EQ(in_quotes("ab\xE2\x82\xAC", 5), "'ab\xE2\x82\xAC'");
  EXPECT_EQ(in_quotes("abcdef", 3), "'abc...'");
}

}  // namespace
}  // namespace kvsparse_test
