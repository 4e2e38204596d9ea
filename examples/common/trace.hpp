// SPDX-License-Identifier: Apache-2.0
// A trace: what one layer's attention saw while a model decoded one sequence, kept in one safetensors file.
//
//   q [tokens, query_heads, head_dim]   k, v [tokens, kv_heads, head_dim]   all F32, q and k after RoPE
//   __metadata__ prompt_tokens: how many of the tokens, from the first, are the prompt; absent means 0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "safetensors.hpp"

namespace kvsparse_tools {

struct Trace {
  std::size_t tokens = 0;
  std::size_t query_heads = 0;
  std::size_t kv_heads = 0;
  std::size_t head_dim = 0;
  std::size_t prompt_tokens = 0;  // less than tokens
  std::vector<float> q;           // [tokens, query_heads, head_dim]
  std::vector<float> k;           // [tokens, kv_heads, head_dim]
  std::vector<float> v;           // [tokens, kv_heads, head_dim]

  std::span<const float> query(std::size_t token) const { return row(q, token, query_heads); }
  std::span<const float> key(std::size_t token) const { return row(k, token, kv_heads); }
  std::span<const float> value(std::size_t token) const { return row(v, token, kv_heads); }

 private:
  std::span<const float> row(const std::vector<float>& values, std::size_t token, std::size_t heads) const {
    const std::size_t length = heads * head_dim;
    return {values.data() + token * length, length};
  }
};

namespace detail {

inline std::size_t trace_prompt_tokens(const SafetensorsFile& file, std::size_t tokens) {
  const auto found = file.metadata().find("prompt_tokens");
  if (found == file.metadata().end()) return 0;
  const std::string& text = found->second;
  const bool plain = !text.empty() && text.size() <= 19 && text.find_first_not_of("0123456789") == std::string::npos;
  if (!plain) file.fail("metadata prompt_tokens is " + in_quotes(text) + ", not a plain non-negative integer");
  const std::uint64_t prompt_tokens = std::stoull(text);
  if (prompt_tokens >= tokens) {
    file.fail("metadata prompt_tokens is " + text + ", it must be less than the trace's " + std::to_string(tokens) +
              " tokens");
  }
  return static_cast<std::size_t>(prompt_tokens);
}

inline std::vector<float> trace_tensor(const SafetensorsFile& file, const std::string& name) {
  std::vector<float> values = file.read_floats(name);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      file.fail("tensor " + in_quotes(name) + " holds " + std::to_string(values[i]) + " at element " +
                std::to_string(i) + ", every element must be finite");
    }
  }
  return values;
}

}  // namespace detail

/// Reads a trace and checks everything a replay relies on. Throws FileError.
inline Trace load_trace(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  for (const char* name : {"q", "k", "v"}) {
    const TensorInfo& info = file.tensor(name);
    const std::string who = "tensor " + in_quotes(name);
    if (info.dtype != "F32") file.fail(who + " has dtype " + info.dtype + ", a trace holds F32");
    if (info.shape.size() != 3)
      file.fail(who + " has shape " + shape_text(info.shape) + ", a trace has three dimensions");
    if (info.elements == 0) file.fail(who + " of shape " + shape_text(info.shape) + " is empty");
  }
  const TensorShape& q = file.tensor("q").shape;
  const TensorShape& k = file.tensor("k").shape;
  const TensorShape& v = file.tensor("v").shape;
  if (k != v) file.fail("k has shape " + shape_text(k) + " and v " + shape_text(v) + ", they must be equal");
  if (q[0] != k[0]) {
    file.fail("q has " + std::to_string(q[0]) + " tokens and k " + std::to_string(k[0]) + ", they must be equal");
  }
  if (q[2] != k[2]) {
    file.fail("q has head_dim " + std::to_string(q[2]) + " and k " + std::to_string(k[2]) + ", they must be equal");
  }
  if (q[1] % k[1] != 0) {
    file.fail("q has " + std::to_string(q[1]) + " heads, not a multiple of the " + std::to_string(k[1]) +
              " heads of k");
  }
  Trace trace;
  trace.tokens = static_cast<std::size_t>(q[0]);
  trace.query_heads = static_cast<std::size_t>(q[1]);
  trace.kv_heads = static_cast<std::size_t>(k[1]);
  trace.head_dim = static_cast<std::size_t>(q[2]);
  trace.prompt_tokens = detail::trace_prompt_tokens(file, trace.tokens);
  trace.q = detail::trace_tensor(file, "q");
  trace.k = detail::trace_tensor(file, "k");
  trace.v = detail::trace_tensor(file, "v");
  return trace;
}

/// Writes a trace that load_trace reads; `notes` are further metadata for whoever finds the file.
inline void save_trace(const std::filesystem::path& path, const Trace& trace,
                       std::map<std::string, std::string> notes = {}) {
  notes["prompt_tokens"] = std::to_string(trace.prompt_tokens);
  const TensorShape query_shape{trace.tokens, trace.query_heads, trace.head_dim};
  const TensorShape key_shape{trace.tokens, trace.kv_heads, trace.head_dim};
  write_safetensors(path,
                    {{"q", "F32", query_shape, std::as_bytes(std::span(trace.q))},
                     {"k", "F32", key_shape, std::as_bytes(std::span(trace.k))},
                     {"v", "F32", key_shape, std::as_bytes(std::span(trace.v))}},
                    notes);
}

}  // namespace kvsparse_tools
