// SPDX-License-Identifier: Apache-2.0
// The command line of bench/replay.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <kvsparse/cache/any_cache.hpp>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "../../examples/common/file_error.hpp"
#include "../../examples/common/output_file.hpp"
#include "../../examples/common/policy_settings.hpp"

namespace kvsparse_tools {

struct ReplayOptions {
  std::string trace_file;
  std::vector<std::string> policies;
  std::vector<PolicySettings> settings;  // one per policy
  std::vector<std::size_t> budgets;
  std::size_t page_size = 16;
  kvsparse::ScalarType dtype = kvsparse::ScalarType::f32;
  std::vector<std::string> setting_texts;  // --set, as given
  std::string dump_file;
  std::string json_file;
  std::string csv_file;
  bool force = false;
};

namespace detail {

/// Like split_at_commas of examples/decode, but keeps empty parts, because "a,,b" is a slip of the pen.
inline std::vector<std::string> list_of(std::string_view text) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    std::string_view part = text.substr(begin, end - begin);
    part.remove_prefix(std::min(part.find_first_not_of(" \t\n"), part.size()));
    part = part.substr(0, part.find_last_not_of(" \t\n") + 1);
    parts.emplace_back(part);
    begin = end + 1;
  }
  return parts;
}

inline std::size_t parse_count(const std::string& option, const std::string& text, std::size_t least,
                               std::size_t largest) {
  std::size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < least || value > largest) {
    throw UsageError(option + " got " + in_quotes(text) + ", a whole number from " + std::to_string(least) + " to " +
                     std::to_string(largest) + " was expected");
  }
  return value;
}

template <class Value>
void refuse_repeats(const std::string& option, const std::vector<Value>& values,
                    const std::vector<std::string>& texts) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (std::find(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(i), values[i]) !=
        values.begin() + static_cast<std::ptrdiff_t>(i)) {
      throw UsageError(option + " lists " + in_quotes(texts[i]) + " twice");
    }
  }
}

inline std::vector<std::string> parse_policies(const std::string& text) {
  std::vector<std::string> policies = list_of(text);
  for (const std::string& policy : policies) {
    if (policy.empty()) throw UsageError("--policy got " + in_quotes(text) + ", which holds an empty name");
    // A name goes back to the terminal, so it is quoted here and not by the library's sentence.
    const std::vector<std::string> known = kvsparse::policy_names();
    if (std::find(known.begin(), known.end(), policy) == known.end()) {
      std::string names;
      for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
      throw UsageError("--policy names the unknown " + in_quotes(policy) + "; known are " + names);
    }
  }
  refuse_repeats("--policy", policies, policies);
  return policies;
}

inline std::vector<std::size_t> parse_budgets(const std::string& text) {
  constexpr std::size_t largest = std::size_t{1} << 40;  // the library's own limit of a size
  const std::vector<std::string> texts = list_of(text);
  std::vector<std::size_t> budgets;
  for (const std::string& part : texts) budgets.push_back(parse_count("--budget", part, 1, largest));
  refuse_repeats("--budget", budgets, texts);
  return budgets;
}

inline bool same_file(const std::filesystem::path& a, const std::filesystem::path& b) {
  std::error_code error;
  if (std::filesystem::equivalent(a, b, error)) return true;
  const auto place = [&](const std::filesystem::path& file) {  // of a file that need not exist yet
    return std::filesystem::weakly_canonical(std::filesystem::absolute(file, error), error);
  };
  return place(a) == place(b);
}

/// No output may overwrite the trace or another output.
inline void refuse_shared_files(const ReplayOptions& options) {
  const std::pair<const char*, const std::string*> files[] = {{"--trace", &options.trace_file},
                                                              {"--dump", &options.dump_file},
                                                              {"--json", &options.json_file},
                                                              {"--csv", &options.csv_file}};
  for (const auto& [option, file] : files) {
    for (const auto& [other_option, other] : files) {
      if (&other_option >= &option || file->empty() || other->empty() || is_stream(*file)) continue;
      if (same_file(*file, *other)) {
        throw UsageError(std::string(other_option) + " and " + option + " name the same file " + in_quotes(*file));
      }
    }
  }
}

}  // namespace detail

/// Throws UsageError or what CLI11 throws (--help included).
inline ReplayOptions parse_replay_options(CLI::App& app, int argc, char** argv) {
  ReplayOptions options;
  std::string policies, budgets, page_size = std::to_string(options.page_size), dtype = "f32";
  const CLI::Validator file_name([](std::string& name) { return std::string(name.empty() ? "an empty name" : ""); },
                                 "FILE");
  app.add_option("--trace", options.trace_file,
                 "safetensors file of one layer: q [tokens, query_heads, head_dim], k and v [tokens, kv_heads, "
                 "head_dim], F32, keys after RoPE; metadata prompt_tokens")
      ->required()
      ->check(file_name);
  app.add_option("--policy", policies,
                 "policies to replay, separated by commas: dense, streaming_llm, h2o, quest, "
                 "raas, random, oracle, or a+b (a evicts, b selects)")
      ->required();
  app.add_option("--budget", budgets,
                 "tokens a kv head may keep (quest, oracle: may read), one or several separated by commas; dense "
                 "ignores it")
      ->required();
  app.add_option("--page-size", page_size, "tokens per page, 1 to 256 [16]");
  app.add_option("--dtype", dtype, "storage of keys and values: f32, f16 or bf16 [f32]");
  app.add_option("--set", options.setting_texts,
                 "an option of the policies that have it, e.g. alpha=0.02, of one of them, e.g. raas.alpha=0.02, or "
                 "read_budget=TOKENS of those that select; may be repeated")
      ->allow_extra_args(false);
  app.add_option("--dump", options.dump_file,
                 "write what each decode query returned, and what was resident and read then, to this safetensors "
                 "file; one policy and one budget only")
      ->check(file_name);
  app.add_option("--json", options.json_file, "write the table's numbers to this file as JSON")->check(file_name);
  app.add_option("--csv", options.csv_file, "write the table's numbers to this file as CSV")->check(file_name);
  app.add_flag("--force", options.force, "write a dump even if it is larger than 2 GiB");
  app.parse(argc, argv);

  options.policies = detail::parse_policies(policies);
  options.budgets = detail::parse_budgets(budgets);
  options.page_size = detail::parse_count("--page-size", page_size, 1, 256);
  const auto known = std::find(std::begin(kvsparse::scalar_type_names), std::end(kvsparse::scalar_type_names), dtype);
  if (known == std::end(kvsparse::scalar_type_names)) {
    throw UsageError("--dtype got " + in_quotes(dtype) + ", f32, f16 or bf16 was expected");
  }
  options.dtype = kvsparse::scalar_type(dtype);
  options.settings = settings_per_policy(options.policies, options.setting_texts);
  if (!options.dump_file.empty() && (options.policies.size() > 1 || options.budgets.size() > 1)) {
    throw UsageError("--dump takes one policy and one budget, not lists of them");
  }
  detail::refuse_shared_files(options);
  return options;
}

}  // namespace kvsparse_tools
