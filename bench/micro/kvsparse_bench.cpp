// SPDX-License-Identifier: Apache-2.0
// Microbenchmarks of one layer: decode_step, append, select, and the read bandwidth to hold them against. On one thread
// but for the decode_steps whose name says otherwise.
#include <benchmark/benchmark.h>

#include <fstream>
#include <iostream>
#include <kvsparse/interop/thread_team.hpp>
#include <kvsparse/kvsparse.hpp>
#include <memory>
#include <string>

#include "build_info.hpp"
#include "read_bandwidth.hpp"
#include "workload.hpp"

namespace kvsparse_bench {
namespace {

using kvsparse::Bfloat16;
using kvsparse::Compose;
using kvsparse::Half;

double dram_bandwidth = 0.0;  // bytes per second, measured once at the start of this process

/// Times `body` alone, rewinding the layer (untimed) whenever it has drifted 1 % beyond its N.
template <class Policy, class Scalar, class Body>
void time_steps(benchmark::State& state, std::size_t tokens, std::size_t budget, Body&& body) {
  using L = Layer<Policy, Scalar>;
  auto layer = std::make_unique<L>(tokens, budget);
  const std::size_t drift = std::max<std::size_t>(1, tokens / 100);
  // A copy to rewind to. Dense layers of 64k tokens would be large, and never drift so far within a measurement.
  const bool is_small = kvsparse::Evictor<Policy> || tokens <= 16384;
  const std::unique_ptr<const L> start = is_small ? std::make_unique<const L>(*layer) : nullptr;
  std::size_t steps = 0;
  layer->step();  // warms the code and, where it fits, the data
  ++steps;
  for (auto _ : state) {
    if (steps == drift) {
      state.PauseTiming();
      layer = start ? std::make_unique<L>(*start) : std::make_unique<L>(tokens, budget);
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
}

template <class Policy, class Scalar>
void decode_step_on(benchmark::State& state, std::size_t tokens, std::size_t budget,
                    kvsparse::Executor auto&& executor) {
  time_steps<Policy, Scalar>(state, tokens, budget, [&](auto& layer) { layer.step(executor); });
  using benchmark::Counter;
  const double bytes = state.counters["kv_bytes_read"];
  state.counters["kv_bytes_per_second"] = Counter(bytes, Counter::kIsIterationInvariantRate);
  state.counters["of_dram_bandwidth"] = Counter(bytes / dram_bandwidth, Counter::kIsIterationInvariantRate);
}

template <class Policy, class Scalar>
void decode_step(benchmark::State& state, std::size_t tokens, std::size_t budget) {
  decode_step_on<Policy, Scalar>(state, tokens, budget, kvsparse::SerialExecutor{});
}

/// of_dram_bandwidth refers to what one thread reads.
template <class Policy, class Scalar>
void decode_step_on_team(benchmark::State& state, std::size_t tokens, std::size_t budget, std::size_t threads) {
  kvsparse::ThreadTeam team(threads);
  decode_step_on<Policy, Scalar>(state, tokens, budget, team);
}

template <class Policy, class Scalar>
void append(benchmark::State& state, std::size_t tokens, std::size_t budget) {
  time_steps<Policy, Scalar>(state, tokens, budget, [](auto& layer) { layer.append(); });
}

/// Choosing the pages of all kv heads, without reading them.
template <class Policy, class Scalar>
void select(benchmark::State& state, std::size_t tokens, std::size_t budget) {
  Layer<Policy, Scalar> layer(tokens, budget);
  auto& cache = layer.cache();
  layer.attend();
  for (auto _ : state) {
    for (std::size_t head = 0; head < layer_shape.kv_heads; ++head) {
      cache.begin_query(head, cache.next_position());
      benchmark::DoNotOptimize(cache.select(head, layer.queries(head)).data());
    }
  }
  const std::size_t pages = layer_shape.pages_for(tokens) * layer_shape.kv_heads;
  state.counters["pages_scored_per_second"] =
      benchmark::Counter(static_cast<double>(pages), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["summary_bytes"] = static_cast<double>(
      pages * kvsparse::PageSummaries<Scalar>::bytes_per_page(layer_shape, kvsparse::traits::page_summary(Policy{})));
}

void dram_read(benchmark::State& state) {
  const ReadBuffer buffer(std::size_t{512} << 20);
  for (auto _ : state) benchmark::DoNotOptimize(buffer.read());
  state.SetBytesProcessed(static_cast<std::int64_t>(buffer.bytes()) * state.iterations());
}

constexpr std::size_t budget_tokens = 1024;

template <class Policy, class Scalar>
void register_benchmarks() {
  const std::string what = std::string(Policy::name) + "/" + std::string(kvsparse::scalar_name<Scalar>);
  const auto add = [&](const std::string& kind, std::size_t tokens, auto run) {
    const std::string name = kind + "/" + what + "/N:" + std::to_string(tokens) + "/L:" + std::to_string(budget_tokens);
    benchmark::RegisterBenchmark(name.c_str(), run, tokens, budget_tokens)->Unit(benchmark::kMicrosecond);
  };
  for (const std::size_t tokens : {1024U, 4096U, 16384U, 65536U}) {
    add("decode_step", tokens, decode_step<Policy, Scalar>);
    if constexpr (kvsparse::Selector<Policy>) {
      if (tokens > budget_tokens) add("select", tokens, select<Policy, Scalar>);
    }
  }
  add("append", 4096, append<Policy, Scalar>);
}

/// The same step on a team: on one thread by the same clock, then on two.
template <class Policy>
void register_threads() {
  const std::string what = "decode_step/" + std::string(Policy::name) + "/f16/N:";
  for (const std::size_t tokens : {1024U, 4096U, 16384U, 65536U}) {
    for (const std::size_t threads : {1U, 2U}) {
      const std::string name =
          what + std::to_string(tokens) + "/L:" + std::to_string(budget_tokens) + "/threads:" + std::to_string(threads);
      benchmark::RegisterBenchmark(name.c_str(), decode_step_on_team<Policy, Half>, tokens, budget_tokens, threads)
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
}

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace
}  // namespace kvsparse_bench

int main(int argc, char** argv) {
  using namespace kvsparse_bench;
#if !defined(NDEBUG) || !defined(__OPTIMIZE__)
  std::cerr << "kvsparse_bench: this is a debug build, whose times mean nothing; build with the preset 'release'\n";
  return 2;
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  register_storage_types<kvsparse::Dense>();
  register_storage_types<kvsparse::StreamingLlm>();
  register_storage_types<kvsparse::H2o>();
  register_storage_types<kvsparse::Quest>();
  register_storage_types<kvsparse::Raas>();
  register_storage_types<kvsparse::Kindred>();
  register_storage_types<kvsparse::Random>();
  register_storage_types<Compose<kvsparse::Raas, kvsparse::Quest>>();
  register_threads<kvsparse::Dense>();
  register_threads<kvsparse::Quest>();
  register_threads<kvsparse::Raas>();
  benchmark::RegisterBenchmark("bandwidth/dram_read", dram_read)->Unit(benchmark::kMillisecond)->UseRealTime();
  dram_bandwidth = measure_dram_bandwidth();
  benchmark::AddCustomContext("processor", processor());
  benchmark::AddCustomContext("compiler", build_info::compiler);
  benchmark::AddCustomContext("flags", build_info::flags);
  benchmark::AddCustomContext("commit", build_info::commit);
  benchmark::AddCustomContext("vector_lanes", std::to_string(kvsparse::simd::lanes));
  benchmark::AddCustomContext("dram_read_bytes_per_second", std::to_string(dram_bandwidth));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
