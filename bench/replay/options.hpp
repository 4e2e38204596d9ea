// SPDX-License-Identifier: Apache-2.0
// The command line of bench/replay.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <bit>
#include <cstddef>
#include <kvsparse/cache/any_cache.hpp>
#include <string>
#include <vector>

#include "clairvoyant.hpp"
#include "common/file_error.hpp"
#include "common/option_lists.hpp"
#include "common/policy_settings.hpp"

namespace kvsparse_tools {

struct ReplayOptions {
  std::string trace_file;
  std::vector<std::string> policies;
  std::vector<PolicySettings> settings;  // one per policy
  std::vector<std::size_t> budgets;      // empty: those of a sweep, see swept_budgets
  std::size_t page_size = 16;
  kvsparse::ScalarType dtype = kvsparse::ScalarType::f32;
  std::vector<std::string> setting_texts;  // --set, as given
  std::string dump_file;
  std::string json_file;
  std::string csv_file;
  std::string report_file;
  bool sweep = false;  // a policy that refuses a budget leaves a gap, and the others go on
  bool force = false;
};

/// Powers of two from one page up to the trace's length.
inline std::vector<std::size_t> swept_budgets(std::size_t page_size, std::size_t tokens) {
  std::vector<std::size_t> budgets{std::bit_ceil(page_size)};
  while (budgets.back() <= tokens / 2) budgets.push_back(budgets.back() * 2);
  return budgets;
}

namespace detail {

/// All but the compositions, which are many.
inline std::vector<std::string> swept_policies() {
  std::vector<std::string> policies = kvsparse::policy_names<ReplayedPolicies>();
  std::erase_if(policies, [](const std::string& name) { return name.find('+') != std::string::npos; });
  return policies;
}

inline std::vector<std::string> parse_policies(const std::string& text) {
  std::vector<std::string> policies = list_of(text);
  for (const std::string& policy : policies) {
    if (policy.empty()) throw UsageError("--policy got " + in_quotes(text) + ", which holds an empty name");
    // A name goes back to the terminal, so it is quoted here and not by the library's sentence.
    const std::vector<std::string> known = kvsparse::policy_names<ReplayedPolicies>();
    if (std::find(known.begin(), known.end(), policy) == known.end()) {
      std::string names;
      for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
      throw UsageError("--policy names the unknown " + in_quotes(policy) + "; known are " + names);
    }
  }
  refuse_repeats("--policy", policies, policies);
  return policies;
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
                 "policies to replay, separated by commas: the library's names, a+b (a evicts, b selects), or "
                 "clairvoyant, an evictor that knows the rest of the trace");
  app.add_option("--budget", budgets,
                 "tokens a kv head may keep (quest, oracle: may read), one or several separated by commas; dense "
                 "ignores it");
  app.add_flag("--sweep", options.sweep,
               "compare all policies but compositions at all powers of two up to the trace's length, or those that "
               "--policy and --budget list; one that refuses a budget leaves a gap, with its reason");
  app.add_option("--page-size", page_size, "tokens per page, 1 to 256 [16]");
  app.add_option("--dtype", dtype, "storage of keys and values: f32, f16, bf16 or int8 [f32]");
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
  app.add_option("--report", options.report_file,
                 "write one page of HTML that needs no network: curves against budget, what every policy kept at each "
                 "step, and a slider over the steps")
      ->check(file_name);
  app.add_flag("--force", options.force, "write a dump even if it is larger than 2 GiB");
  app.parse(argc, argv);

  for (const char* option : {"--policy", "--budget"}) {
    if (app.count(option) == 0 && !options.sweep)
      throw UsageError(std::string(option) + " is required without --sweep");
  }
  options.policies = app.count("--policy") == 0 ? detail::swept_policies() : detail::parse_policies(policies);
  if (app.count("--budget") != 0) options.budgets = parse_budgets(budgets);
  options.page_size = parse_count("--page-size", page_size, 1, 256);
  options.dtype = parse_dtype(dtype);
  options.settings = settings_per_policy<ReplayedPolicies>(options.policies, options.setting_texts);
  if (!options.dump_file.empty() && options.sweep) {
    throw UsageError("--dump takes one policy and one budget, not a sweep");
  }
  if (!options.dump_file.empty() && (options.policies.size() > 1 || options.budgets.size() > 1)) {
    throw UsageError("--dump takes one policy and one budget, not lists of them");
  }
  refuse_shared_files({{"--trace", options.trace_file},
                       {"--dump", options.dump_file},
                       {"--json", options.json_file},
                       {"--csv", options.csv_file},
                       {"--report", options.report_file}});
  return options;
}

}  // namespace kvsparse_tools
