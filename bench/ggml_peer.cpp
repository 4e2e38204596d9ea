// SPDX-License-Identifier: Apache-2.0
// Dense decode attention beside that of ggml, llama.cpp's library: a token of one layer over the same keys and values,
// in turns in one process. Built where CMake finds an installed ggml; bench/README.md says how.
#include <ggml-cpu.h>
#include <ggml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <kvsparse/interop/thread_team.hpp>
#include <kvsparse/kvsparse.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/interrupt.hpp"
#include "common/option_lists.hpp"
#include "common/program.hpp"
#include "common/text_table.hpp"
#include "micro/context.hpp"
#include "micro/machine_limits.hpp"
#include "micro/rival_load.hpp"
#include "micro/workload.hpp"

namespace {

using namespace kvsparse_bench;
using kvsparse_tools::fixed_text;

constexpr kvsparse::Geometry shape = layer_shape;

struct PeerOptions {
  std::vector<std::string> dtypes;
  std::vector<std::size_t> tokens, threads;
  std::size_t rounds = 21;
};

/// What the layer holds, head by head as ggml reads it: k, v [kv_heads, tokens, head_dim], q [query_heads, head_dim].
struct LayerRows {
  explicit LayerRows(std::size_t tokens) : k(shape.kv_heads * tokens * shape.head_dim), v(k.size()) {
    RandomRows random(1);
    random.fill(k);
    random.fill(v);
    random.fill(q);
  }
  std::vector<float> k, v, q = std::vector<float>(shape.query_heads * shape.head_dim);
};

template <class Scalar>
class OurAttention {
 public:
  OurAttention(const LayerRows& rows, std::size_t tokens, std::size_t threads)
      : cache_({.query_heads = shape.query_heads,
                .kv_heads = shape.kv_heads,
                .head_dim = shape.head_dim,
                .page_size = shape.page_size,
                .max_tokens = tokens}),
        team_(threads),
        q_(rows.q),
        out_(rows.q.size()) {
    const std::size_t head_stride = tokens * shape.head_dim;
    for (std::size_t t = 0; t < tokens; ++t) {
      const auto token = [&](const std::vector<float>& x) {
        return kvsparse::HeadRows<const float>(x.data() + t * shape.head_dim, shape.kv_heads, shape.head_dim,
                                               head_stride);
      };
      require(cache_.append(token(rows.k), token(rows.v)));
    }
  }
  void step() { require(kvsparse::attend(cache_, std::span<const float>(q_), std::span<float>(out_), {}, team_)); }
  std::span<const float> out() const { return out_; }

 private:
  static void require(kvsparse::Status status) {
    if (!status) throw std::runtime_error(status.message());
  }
  kvsparse::PagedKvCache<kvsparse::Dense, Scalar> cache_;
  kvsparse::ThreadTeam team_;
  std::vector<float> q_, out_;
};

/// Graph, memory plan and threads are made once; a step computes the graph.
class GgmlAttention {
 public:
  enum class Operators { flash_attention, three };

  GgmlAttention(Operators operators, ggml_type type, const LayerRows& rows, std::size_t tokens, std::size_t threads) {
    const auto n = static_cast<std::int64_t>(tokens);
    constexpr auto dim = static_cast<std::int64_t>(shape.head_dim);
    constexpr auto kv_heads = static_cast<std::int64_t>(shape.kv_heads);
    constexpr auto query_heads = static_cast<std::int64_t>(shape.query_heads);
    const std::size_t stored = ggml_row_size(type, dim) * tokens * shape.kv_heads;
    const std::size_t logits = tokens * shape.query_heads * sizeof(float);
    context_ = ggml_init({2 * stored + 4 * logits + (std::size_t{64} << 20), nullptr, false});
    if (context_ == nullptr) throw std::bad_alloc();
    ggml_tensor* q = ggml_new_tensor_3d(context_, GGML_TYPE_F32, dim, 1, query_heads);
    ggml_tensor* k = ggml_new_tensor_3d(context_, type, dim, n, kv_heads);
    std::copy(rows.q.begin(), rows.q.end(), static_cast<float*>(q->data));
    store(k, rows.k, shape.head_dim);
    const float scale = 1.0F / std::sqrt(static_cast<float>(shape.head_dim));
    if (operators == Operators::flash_attention) {
      ggml_tensor* v = ggml_new_tensor_3d(context_, type, dim, n, kv_heads);
      store(v, rows.v, shape.head_dim);
      out_ = ggml_flash_attn_ext(context_, q, k, v, nullptr, scale, 0.0F, 0.0F);
    } else {
      // Values transposed, as llama.cpp keeps them for these operators: [kv_heads, head_dim, tokens].
      ggml_tensor* v = ggml_new_tensor_3d(context_, type, n, dim, kv_heads);
      store(v, transposed(rows.v, tokens), tokens);
      ggml_tensor* weights = ggml_soft_max_ext(context_, ggml_mul_mat(context_, k, q), nullptr, scale, 0.0F);
      out_ = ggml_mul_mat(context_, v, weights);
    }
    graph_ = ggml_new_graph(context_);
    ggml_build_forward_expand(graph_, out_);
    ggml_threadpool_params parameters = ggml_threadpool_params_default(static_cast<int>(threads));
    parameters.poll = 100;  // its threads spin between steps, as ours do
    pool_ = ggml_threadpool_new(&parameters);
    plan_ = ggml_graph_plan(graph_, static_cast<int>(threads), pool_);
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
    pause();
  }
  GgmlAttention(const GgmlAttention&) = delete;
  GgmlAttention& operator=(const GgmlAttention&) = delete;
  ~GgmlAttention() {
    ggml_threadpool_free(pool_);
    ggml_free(context_);
  }
  void step() {
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS) throw std::runtime_error("ggml computed no graph");
  }
  void resume() { ggml_threadpool_resume(pool_); }
  void pause() { ggml_threadpool_pause(pool_); }  // while others are timed
  std::span<const float> out() const {
    return {static_cast<const float*>(out_->data), shape.query_heads * shape.head_dim};
  }

 private:
  static void store(ggml_tensor* tensor, const std::vector<float>& rows, std::size_t length) {
    const ggml_from_float_t convert = ggml_get_type_traits_cpu(tensor->type)->from_float;
    const std::size_t stride = ggml_row_size(tensor->type, static_cast<std::int64_t>(length));
    for (std::size_t row = 0; row < rows.size() / length; ++row) {
      char* stored = static_cast<char*>(tensor->data) + row * stride;
      const float* values = rows.data() + row * length;
      if (tensor->type == GGML_TYPE_F32) {
        std::copy_n(values, length, reinterpret_cast<float*>(stored));
      } else {
        convert(values, stored, static_cast<std::int64_t>(length));
      }
    }
  }
  static std::vector<float> transposed(const std::vector<float>& v, std::size_t tokens) {
    std::vector<float> result(v.size());
    for (std::size_t h = 0; h < shape.kv_heads; ++h) {
      for (std::size_t t = 0; t < tokens; ++t) {
        for (std::size_t d = 0; d < shape.head_dim; ++d) {
          result[(h * shape.head_dim + d) * tokens + t] = v[(h * tokens + t) * shape.head_dim + d];
        }
      }
    }
    return result;
  }

  ggml_context* context_ = nullptr;
  ggml_tensor* out_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_threadpool* pool_ = nullptr;
  ggml_cplan plan_{};
  std::vector<std::uint8_t> work_;
};

/// Median of some steps, after one that fetches what others have driven out of the processor's caches.
template <class Attention>
double step_seconds(Attention& attention, std::size_t steps) {
  attention.step();
  std::vector<double> seconds;
  for (std::size_t i = 0; i < steps; ++i) {
    const Clock::time_point start = Clock::now();
    attention.step();
    seconds.push_back(seconds_since(start));
  }
  return median(seconds);
}

/// Both answer the same question. Outputs are means over all tokens and small, so it is |ours - theirs| / |ours| that
/// says something: 1.4 if they have nothing to do with each other. ggml sums f16 values in f16 and makes q8_0 of the
/// weights beside such values, so that its own rounding grows with the root of the tokens, to .08 at 65536.
void require_the_same(std::span<const float> ours, std::span<const float> theirs, std::size_t tokens,
                      const std::string& what) {
  double difference = 0.0, size = 0.0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double value = static_cast<double>(ours[i]);
    difference += std::pow(value - static_cast<double>(theirs[i]), 2);
    size += value * value;
  }
  const double relative = std::sqrt(difference / size);
  const double most = 0.005 + 0.0005 * std::sqrt(static_cast<double>(tokens));
  if (!(relative < most)) throw std::runtime_error(what + " differs from kvsparse by " + std::to_string(relative));
}

std::string ratio_text(const std::vector<double>& ratios) {
  const Spread spread(ratios);
  return fixed_text(spread.median, 1) + " (" + fixed_text(spread.least, 1) + "-" + fixed_text(spread.most, 1) + ")";
}

template <class Scalar>
std::vector<std::string> compare(ggml_type type, std::size_t tokens, std::size_t threads, std::size_t rounds,
                                 RivalLoad& rival) {
  const LayerRows rows(tokens);
  OurAttention<Scalar> ours(rows, tokens, threads);
  GgmlAttention flash(GgmlAttention::Operators::flash_attention, type, rows, tokens, threads);
  GgmlAttention three(GgmlAttention::Operators::three, type, rows, tokens, threads);
  const std::size_t steps = std::clamp<std::size_t>(20 * 4096 / tokens, 2, 20);
  const auto ggml_seconds = [&](GgmlAttention& attention) {
    attention.resume();
    const double seconds = step_seconds(attention, steps);
    attention.pause();
    return seconds;
  };
  std::vector<double> our_seconds, flash_ratios, three_ratios;
  for (std::size_t tried = 0; our_seconds.size() < rounds && !kvsparse_tools::interrupted(); ++tried) {
    rival.begin_round();
    const double our_time = step_seconds(ours, steps);
    const double flash_time = ggml_seconds(flash);
    const double three_time = ggml_seconds(three);
    if (rival.end_round() && tried < rounds) continue;  // as many again at most
    our_seconds.push_back(our_time);
    flash_ratios.push_back(flash_time / our_time);
    three_ratios.push_back(three_time / our_time);
  }
  if (our_seconds.empty()) return {};
  require_the_same(ours.out(), flash.out(), tokens, "ggml_flash_attn_ext");
  require_the_same(ours.out(), three.out(), tokens, "mul_mat, soft_max, mul_mat");
  return {fixed_text(median(our_seconds) * 1e6, 0), ratio_text(flash_ratios), ratio_text(three_ratios)};
}

std::vector<std::string> compare_in(const std::string& dtype, std::size_t tokens, std::size_t threads,
                                    std::size_t rounds, RivalLoad& rival) {
  if (dtype == "f32") return compare<float>(GGML_TYPE_F32, tokens, threads, rounds, rival);
  if (dtype == "f16") return compare<kvsparse::Half>(GGML_TYPE_F16, tokens, threads, rounds, rival);
  if (dtype == "bf16") return compare<kvsparse::Bfloat16>(GGML_TYPE_BF16, tokens, threads, rounds, rival);
  return compare<kvsparse::Int8>(GGML_TYPE_Q8_0, tokens, threads, rounds, rival);
}

int run(const PeerOptions& options) {
  refuse_debug_build();
  ggml_cpu_init();
  RivalLoad rival;
  kvsparse_tools::TextTable table({"dtype", "threads", "N", "kvsparse us", "ggml_flash_attn_ext, times as long",
                                   "mul_mat, soft_max, mul_mat, times as long"});
  for (const std::string& dtype : options.dtypes) {
    for (const std::size_t threads : options.threads) {
      for (const std::size_t tokens : options.tokens) {
        std::vector<std::string> row{dtype == "int8" ? "int8, q8_0" : dtype, std::to_string(threads),
                                     std::to_string(tokens)};
        for (std::string& cell : compare_in(dtype, tokens, threads, options.rounds, rival)) row.push_back(cell);
        if (kvsparse_tools::interrupted()) return kvsparse_tools::interrupted_exit_code;
        table.add_row(std::move(row));
      }
    }
  }
  std::cout << processor_name() << "; kvsparse: " << build_info::compiler << ",  " << build_info::flags << ", commit "
            << build_info::commit << "; ggml " << ggml_version() << " " << ggml_commit() << "\n\n";
  table.print(std::cout);
  std::cout << "\nMedians of " << options.rounds << " rounds, in brackets their range; " << shape.query_heads
            << " query heads, " << shape.kv_heads << " kv heads, head_dim " << shape.head_dim << ".\n";
  if (rival.disturbed_rounds() > 0) {
    std::cout << rival.sentence() << "; of each row at most " << options.rounds << " were repeated\n";
  }
  return 0;
}

PeerOptions parse_options(CLI::App& app, int argc, char** argv) {
  using namespace kvsparse_tools;
  PeerOptions options;
  std::string dtypes = "f16", tokens = "1024,4096,16384,65536", threads = "1,2";
  std::string rounds = std::to_string(options.rounds);
  app.add_option("--dtype", dtypes, "one or several of f32, f16, bf16, int8 (ggml's q8_0) [" + dtypes + "]");
  app.add_option("--tokens", tokens, "tokens in the cache, one or several separated by commas [" + tokens + "]");
  app.add_option("--threads", threads, "threads of each side [" + threads + "]");
  app.add_option("--rounds", rounds, "rounds in which the three take turns, 3 to 1000 [" + rounds + "]");
  app.parse(argc, argv);
  options.dtypes = list_of(dtypes);
  for (const std::string& dtype : options.dtypes) parse_dtype(dtype);
  options.tokens = parse_counts("--tokens", tokens, 1, std::size_t{1} << 20);
  const bool in_blocks = std::find(options.dtypes.begin(), options.dtypes.end(), "int8") != options.dtypes.end();
  for (const std::size_t count : options.tokens) {
    if (!in_blocks || count % 32 == 0) continue;
    throw UsageError("--tokens " + std::to_string(count) + " is not a multiple of 32, as blocks of q8_0 want it");
  }
  options.threads = parse_counts("--threads", threads, 1, hardware_threads());
  options.rounds = parse_count("--rounds", rounds, 3, 1000);
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Times dense decode attention beside that of ggml, over the same keys and values.", "ggml_peer");
  return kvsparse_tools::run_program(app, "not enough memory for these caches", [&] {
    const PeerOptions options = parse_options(app, argc, argv);
    kvsparse_tools::catch_interrupts();
    return run(options);
  });
}
