// SPDX-License-Identifier: Apache-2.0
// One sequence decoded by several processes: kv heads over the rows of a grid of ranks, each head's pages over the
// ranks of a row. Rank 0 then decodes the same in one process and compares token by token.
//
//     mpiexec -n 4 tensor_parallel_mpi --model examples/model --problems examples/model/problems.jsonl --head-groups 2
//
// Every rank has all weights and computes all of the model but the attention: this example is about the cache. An
// engine that splits the projections too gathers after them what is gathered here after the attention.
#include <mpi.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <kvsparse/policy/dense.hpp>
#include <kvsparse/policy/h2o.hpp>
#include <kvsparse/policy/raas.hpp>
#include <kvsparse/policy/streaming_llm.hpp>
#include <string>
#include <vector>

#include "common/program.hpp"
#include "common/untrusted_json.hpp"
#include "engine/decoder.hpp"
#include "engine/model.hpp"
#include "engine/tokenizer.hpp"
#include "split_attention.hpp"

namespace {

using namespace kvsparse_tools;

struct Options {
  std::string model_directory, problems_file, policy = "raas", merge = "gather";
  std::size_t budget = 256, page_size = 4, max_new = 200;
  int head_groups = 1;
};

Options parse_options(CLI::App& app, int argc, char** argv) {
  Options options;
  app.add_option("--model", options.model_directory, "Hugging Face directory of the model")->required();
  app.add_option("--problems", options.problems_file, "JSON lines; the prompt of the first is decoded")->required();
  app.add_option("--policy", options.policy, "what each kv head keeps [raas]")
      ->check(CLI::IsMember({"dense", "streaming_llm", "h2o", "raas"}));
  app.add_option("--budget", options.budget, "tokens a kv head may keep, on all ranks together [256]");
  app.add_option("--page-size", options.page_size, "tokens per page [4]");
  app.add_option("--max-new", options.max_new, "tokens to generate [200]");
  app.add_option("--head-groups", options.head_groups,
                 "groups that the kv heads are split into; the ranks of a group "
                 "split each head's pages [1]");
  app.add_option("--merge", options.merge, "how states are merged: gather (in rank order) or reduce (MPI's) [gather]")
      ->check(CLI::IsMember({"gather", "reduce"}));
  app.parse(argc, argv);
  return options;
}

std::vector<TokenId> read_prompt(const Options& options, const Model& model) {
  const std::string lines = read_text_file(options.problems_file, std::uint64_t{1} << 24);
  const nlohmann::json problem = parse_untrusted_json(lines.substr(0, lines.find('\n')), options.problems_file, 8);
  const std::string prompt = JsonFields(problem, options.problems_file).text("prompt", "");
  std::vector<TokenId> ids = Tokenizer(options.model_directory, model.config().vocab_size).encode(prompt).ids;
  if (ids.empty()) throw UsageError("the prompt is empty, it must have at least one token");
  return ids;
}

struct Answer {
  std::vector<TokenId> tokens;
  std::vector<float> logits;  // of each of them
};

Answer decode(Decoder& decoder, const std::vector<TokenId>& prompt, std::size_t max_new) {
  for (const TokenId& token : prompt) decoder.feed_prompt(std::span(&token, 1));
  Answer answer;
  while (answer.tokens.size() < max_new) {
    const Vector& logits = decoder.logits();
    answer.tokens.push_back(greedy_choice(logits));
    answer.logits.push_back(logits[static_cast<Eigen::Index>(answer.tokens.back())]);
    decoder.feed(answer.tokens.back());
  }
  return answer;
}

/// 0 when all ranks and one process decode the same tokens.
template <class Policy>
int run(const Options& options) {
  const RankGrid grid(options.head_groups);
  const Model model(options.model_directory);
  const std::vector<TokenId> prompt = read_prompt(options, model);

  kvsparse::CacheConfig config;
  config.query_heads = model.config().query_heads;
  config.kv_heads = model.config().kv_heads;
  config.head_dim = model.config().head_dim;
  config.page_size = options.page_size;
  config.budget_tokens = options.budget;
  config.max_tokens = prompt.size() + options.max_new;
  const StateMerge::Way way = options.merge == "gather" ? StateMerge::Way::gather : StateMerge::Way::reduce;
  SplitAttention<Policy> attention(config, model.config().layers, grid, way);
  Decoder together(model, [&](auto&&... token) { attention(token...); });
  const Answer answer = decode(together, prompt, options.max_new);

  // All ranks must have decoded the same, and it must be what one process decodes.
  std::vector<TokenId> of_rank_0 = answer.tokens;
  MPI_Bcast(of_rank_0.data(), static_cast<int>(of_rank_0.size()), MPI_UINT32_T, 0, MPI_COMM_WORLD);
  int differing_ranks = of_rank_0 == answer.tokens ? 0 : 1;
  MPI_Allreduce(MPI_IN_PLACE, &differing_ranks, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  int failed = differing_ranks == 0 ? 0 : 1;
  if (grid.row() == 0 && grid.column() == 0) {
    CacheChoice choice;
    choice.policy = options.policy;
    choice.budget_tokens = options.budget;
    choice.page_size = options.page_size;
    Decoder alone(model, choice, config.max_tokens);
    const Answer expected = decode(alone, prompt, options.max_new);
    const auto [first, _] = std::mismatch(answer.tokens.begin(), answer.tokens.end(), expected.tokens.begin());
    const auto same = static_cast<std::size_t>(first - answer.tokens.begin());
    float difference = 0.0F;
    for (std::size_t i = 0; i < same; ++i) {
      difference = std::max(difference, std::abs(answer.logits[i] - expected.logits[i]));
    }
    if (same != answer.tokens.size()) failed = 1;
    std::printf("%s, %zu x %zu ranks (groups of heads x parts of their pages), merged by %s\n", options.policy.c_str(),
                grid.rows(), grid.columns(), options.merge.c_str());
    std::printf("%zu of %zu tokens as in one process, largest difference of their logits %.1e; %d ranks differ\n", same,
                answer.tokens.size(), static_cast<double>(difference), differing_ranks);
    std::printf("tokens given up by the heads of a group: %zu\n", attention.evicted_tokens());
  }
  MPI_Bcast(&failed, 1, MPI_INT, 0, MPI_COMM_WORLD);
  return failed;
}

int run(const Options& options) {
  if (options.policy == "dense") return run<kvsparse::Dense>(options);
  if (options.policy == "streaming_llm") return run<kvsparse::StreamingLlm>(options);
  if (options.policy == "h2o") return run<kvsparse::H2o>(options);
  return run<kvsparse::Raas>(options);
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  CLI::App app{"Decodes one sequence on the ranks of MPI and compares with one process.", "tensor_parallel_mpi"};
  const int exit_code =
      run_program(app, "there is not enough memory", [&] { return run(parse_options(app, argc, argv)); });
  // A rank that failed by itself would leave the others waiting.
  if (exit_code == usage_exit_code) MPI_Abort(MPI_COMM_WORLD, exit_code);
  MPI_Finalize();
  return exit_code;
}
