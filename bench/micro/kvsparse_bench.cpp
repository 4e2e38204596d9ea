// SPDX-License-Identifier: Apache-2.0
// Microbenchmarks of one layer: decode_step, append, select, prefill, and the machine's limits to hold them against. On
// one thread but for the decode_steps whose name says otherwise. bench/README.md says how to choose among them and how
// to read them.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <iostream>
#include <kvsparse/interop/thread_team.hpp>
#include <kvsparse/kvsparse.hpp>
#include <memory>
#include <string>

#include "context.hpp"
#include "machine_limits.hpp"
#include "workload.hpp"

namespace kvsparse_bench {
namespace {

using kvsparse::Bfloat16;
using kvsparse::Compose;
using kvsparse::Half;
using kvsparse::Int8;

CacheSizes caches;
constexpr std::size_t team_size = 2;
MachineLimits limits, team_limits;  // of one thread and of a team, measured once at the start of this process

/// What one benchmark decodes: N tokens seen, L tokens of budget.
struct Case {
  kvsparse::Geometry shape = layer_shape;
  std::size_t tokens = 0;
  std::size_t budget = 1024;

  std::string name() const {
    return "/N:" + std::to_string(tokens) + "/L:" + std::to_string(budget) + "/group:" + std::to_string(shape.group()) +
           "/head_dim:" + std::to_string(shape.head_dim);
  }
};

/// Times `body` alone, rewinding the layer (untimed) whenever what it holds has grown 1 % beyond its N.
template <class Policy, class Scalar, class Body>
void time_steps(benchmark::State& state, const Case& of, Body&& body) {
  using L = Layer<Policy, Scalar>;
  auto layer = std::make_unique<L>(of.shape, of.tokens, of.budget);
  const std::size_t drift = L::drift(of.tokens);
  const bool grows = !kvsparse::Evictor<Policy> || of.tokens < of.budget;
  // A copy to rewind to. Dense layers of 64k tokens would be large, and never drift so far within a measurement.
  const std::unique_ptr<const L> start = grows && of.tokens <= 16384 ? std::make_unique<const L>(*layer) : nullptr;
  std::size_t steps = 0;
  layer->step();  // warms the code and, where it fits, the data
  ++steps;
  for (auto _ : state) {
    if (grows && steps == drift) {
      state.PauseTiming();
      if (start) {
        layer = std::make_unique<L>(*start);
      } else {
        layer->rewind();
      }
      layer->step();
      steps = 1;
      state.ResumeTiming();
    }
    body(*layer);
    ++steps;
  }
  state.counters["resident_bytes"] = static_cast<double>(layer->cache().stats().resident_bytes);
  layer->attend();
  state.counters["kv_bytes_read"] = layer->kv_bytes_read();
  state.counters["flops"] = layer->flops();
}

/// Counter roofline: the share of max(bytes / bandwidth, flops / FMA peak) that the step reaches, the bandwidth being
/// that of the cache level in which the keys and values it reads fit.
template <class Policy, class Scalar>
void decode_step_on(benchmark::State& state, const Case& of, kvsparse::Executor auto&& executor,
                    const MachineLimits& machine) {
  time_steps<Policy, Scalar>(state, of, [&](auto& layer) { layer.step(executor); });
  using benchmark::Counter;
  const double bytes = state.counters["kv_bytes_read"];
  const Roofline bound = roofline(machine, caches, bytes, state.counters["flops"]);
  state.counters["kv_bytes_per_second"] = Counter(bytes, Counter::kIsIterationInvariantRate);
  state.counters["roofline"] = Counter(bound.seconds, Counter::kIsIterationInvariantRate);
  state.SetLabel(bound.is_memory_bound ? std::string("memory, ") + name_of(bound.level) : "arithmetic");
}

template <class Policy, class Scalar>
void decode_step(benchmark::State& state, const Case& of) {
  decode_step_on<Policy, Scalar>(state, of, kvsparse::SerialExecutor{}, limits);
}

template <class Policy, class Scalar>
void decode_step_on_team(benchmark::State& state, const Case& of, std::size_t threads) {
  kvsparse::ThreadTeam team(threads);
  decode_step_on<Policy, Scalar>(state, of, team, threads == 1 ? limits : team_limits);
}

template <class Policy, class Scalar>
void append(benchmark::State& state, const Case& of) {
  time_steps<Policy, Scalar>(state, of, [](auto& layer) { layer.append(); });
}

/// Choosing the pages of all kv heads, without reading them. Counter roofline: the share of what reading the summaries
/// of all pages takes, and multiplying each of their elements with each query head's; the counter bandwidth_share: of
/// the reading alone.
template <class Policy, class Scalar>
void select(benchmark::State& state, const Case& of) {
  Layer<Policy, Scalar> layer(of.shape, of.tokens, of.budget);
  auto& cache = layer.cache();
  layer.attend();
  for (auto _ : state) {
    for (std::size_t head = 0; head < of.shape.kv_heads; ++head) {
      cache.begin_query(head, cache.next_position());
      benchmark::DoNotOptimize(cache.select(head, layer.queries(head)).data());
    }
  }
  const std::size_t pages = of.shape.pages_for(of.tokens) * of.shape.kv_heads;
  state.counters["pages_scored_per_second"] =
      benchmark::Counter(static_cast<double>(pages), benchmark::Counter::kIsIterationInvariantRate);
  const auto bytes =
      static_cast<double>(pages * kvsparse::PageSummaries<kvsparse::SummaryScalar<Scalar>>::bytes_per_page(
                                      of.shape, kvsparse::traits::page_summary(Policy{})));
  const double elements = bytes / sizeof(kvsparse::SummaryScalar<Scalar>);
  const Roofline bound = roofline(limits, caches, bytes, 2.0 * elements * static_cast<double>(of.shape.group()));
  const double reading = bytes / limits.bandwidth[static_cast<std::size_t>(bound.level)];
  using benchmark::Counter;
  state.counters["summary_bytes"] = bytes;
  state.counters["roofline"] = Counter(bound.seconds, Counter::kIsIterationInvariantRate);
  state.counters["bandwidth_share"] = Counter(reading, Counter::kIsIterationInvariantRate);
  state.SetLabel(bound.is_memory_bound ? std::string("memory, ") + name_of(bound.level) : "arithmetic");
}

/// Causal attention of the newest `chunk` tokens' queries to all N tokens. Counter roofline: the share of the FMA peak.
template <class Scalar>
void prefill(benchmark::State& state, const Case& of, std::size_t chunk) {
  Layer<kvsparse::Dense, Scalar> layer(of.shape, of.tokens, of.budget);
  std::vector<float> q(chunk * of.shape.query_heads * of.shape.head_dim), out(q.size());
  RandomRows(2).fill(q);
  const kvsparse::TokenRows<const float> queries(q.data(), chunk, of.shape.query_heads, of.shape.head_dim);
  const kvsparse::TokenRows<float> outputs(out.data(), chunk, of.shape.query_heads, of.shape.head_dim);
  for (auto _ : state) {
    if (const kvsparse::Status status = kvsparse::attend_prompt(layer.cache(), queries, outputs); !status) {
      state.SkipWithError(status.message().c_str());
    }
    benchmark::ClobberMemory();
  }
  const double seen =
      static_cast<double>(chunk) * (static_cast<double>(of.tokens) - 0.5 * static_cast<double>(chunk - 1));
  const double flops = 4.0 * seen * static_cast<double>(of.shape.query_heads * of.shape.head_dim);
  using benchmark::Counter;
  state.counters["flops"] = flops;
  state.counters["flops_per_second"] = Counter(flops, Counter::kIsIterationInvariantRate);
  state.counters["roofline"] = Counter(flops / limits.flops, Counter::kIsIterationInvariantRate);
  state.SetLabel("arithmetic");
}

template <class Scalar>
void register_prefill() {
  const Case of{layer_shape, 4096};
  const std::string name = "prefill/dense/" + std::string(kvsparse::scalar_name<Scalar>) + of.name() + "/queries:512";
  benchmark::RegisterBenchmark(name.c_str(), prefill<Scalar>, of, 512U)->Unit(benchmark::kMillisecond);
}

template <MemoryLevel Level>
void bandwidth(benchmark::State& state) {
  LimitProbe probe(caches, 1);
  double sum = 0.0;
  for (auto _ : state) sum += probe.read_bandwidth(Level, 1);
  state.counters["bytes_per_second"] = benchmark::Counter(sum, benchmark::Counter::kAvgIterations);
}

/// The shape, budget and lengths that README's figures refer to. Everything else is run only when a filter names it.
bool is_usual(const Case& of) {
  return of.shape.group() == layer_shape.group() && of.shape.head_dim == layer_shape.head_dim && of.budget == 1024;
}

bool only_usual = false;

template <class Policy>
std::vector<Case> cases() {
  std::vector<Case> cases;
  for (const std::size_t group : {1U, 2U, 4U, 8U}) {
    for (const std::size_t head_dim : {64U, 80U, 96U, 128U, 256U}) {
      for (const std::size_t budget : {256U, 1024U, 4096U}) {
        for (const std::size_t tokens : {1024U, 4096U, 16384U, 65536U}) {
          Case of{layer_shape, tokens, budget};
          of.shape.query_heads = of.shape.kv_heads * group;
          of.shape.head_dim = head_dim;
          const bool has_budget = kvsparse::Evictor<Policy> || kvsparse::Selector<Policy>;
          if ((has_budget || of.budget == 1024) && (!only_usual || is_usual(of))) cases.push_back(of);
        }
      }
    }
  }
  return cases;
}

template <class Policy, class Scalar>
void register_benchmarks() {
  const std::string what = std::string(Policy::name) + "/" + std::string(kvsparse::scalar_name<Scalar>);
  for (const Case& of : cases<Policy>()) {
    const auto add = [&](const std::string& kind, auto run) {
      benchmark::RegisterBenchmark((kind + "/" + what + of.name()).c_str(), run, of)->Unit(benchmark::kMicrosecond);
    };
    add("decode_step", decode_step<Policy, Scalar>);
    if constexpr (kvsparse::Selector<Policy>) {
      if (of.tokens > of.budget) add("select", select<Policy, Scalar>);
    }
    if (of.tokens == 4096) add("append", append<Policy, Scalar>);
  }
}

/// The same step on a team: on one thread by the same clock, then on two.
template <class Policy>
void register_threads() {
  for (const std::size_t tokens : {1024U, 4096U, 16384U, 65536U}) {
    const Case of{layer_shape, tokens};
    for (const std::size_t threads : {std::size_t{1}, team_size}) {
      const std::string name = "decode_step/" + std::string(Policy::name) + "/f16" + of.name() + "/threads:";
      benchmark::RegisterBenchmark((name + std::to_string(threads)).c_str(), decode_step_on_team<Policy, Half>, of,
                                   threads)
          ->Unit(benchmark::kMicrosecond)
          ->UseRealTime();
    }
  }
}

template <class Policy>
void register_storage_types() {
  register_benchmarks<Policy, float>();
  register_benchmarks<Policy, Half>();
  register_benchmarks<Policy, Bfloat16>();
  register_benchmarks<Policy, Int8>();
}

}  // namespace
}  // namespace kvsparse_bench

int main(int argc, char** argv) {
  using namespace kvsparse_bench;
#if !defined(NDEBUG) || !defined(__OPTIMIZE__)
  std::cerr << "kvsparse_bench: this is a debug build, whose times mean nothing; build with the preset 'release'\n";
  return 2;
#endif
  const std::string command = command_line(argc, argv);
  only_usual = std::none_of(argv + 1, argv + argc, [](const char* argument) {
    return std::string_view(argument).starts_with("--benchmark_filter");
  });
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  if (only_usual) {
    std::cerr << "kvsparse_bench: no --benchmark_filter, so only L:1024/group:4/head_dim:128 is run; "
                 "--benchmark_filter=. --benchmark_list_tests=true lists all there is\n";
  }
  register_storage_types<kvsparse::Dense>();
  register_storage_types<kvsparse::StreamingLlm>();
  register_storage_types<kvsparse::H2o>();
  register_storage_types<kvsparse::Quest>();
  register_storage_types<kvsparse::Raas>();
  register_storage_types<kvsparse::Kindred>();
  register_storage_types<kvsparse::Random>();
  register_storage_types<Compose<kvsparse::Raas, kvsparse::Quest>>();
  register_prefill<float>();
  register_prefill<Half>();
  register_prefill<Bfloat16>();
  register_prefill<Int8>();
  register_threads<kvsparse::Dense>();
  register_threads<kvsparse::Quest>();
  register_threads<kvsparse::Raas>();
  caches = cache_sizes();
  benchmark::RegisterBenchmark("bandwidth/L2", bandwidth<MemoryLevel::l2>)->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("bandwidth/L3", bandwidth<MemoryLevel::l3>)->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("bandwidth/DRAM", bandwidth<MemoryLevel::dram>)->Unit(benchmark::kMillisecond);
  limits = measure_limits(caches, 1);
  team_limits = measure_limits(caches, team_size);
  benchmark::AddCustomContext("command", command);
  benchmark::AddCustomContext("processor", processor_name());
  benchmark::AddCustomContext("compiler", build_info::compiler);
  benchmark::AddCustomContext("flags", build_info::flags);
  benchmark::AddCustomContext("commit", build_info::commit);
  benchmark::AddCustomContext("vector_lanes", std::to_string(kvsparse::simd::lanes));
  for (const MemoryLevel level : memory_levels) {
    benchmark::AddCustomContext(name_of(level) + std::string("_bytes_per_second"),
                                std::to_string(limits.bandwidth[static_cast<std::size_t>(level)]));
  }
  benchmark::AddCustomContext("flops_per_second", std::to_string(limits.flops));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
