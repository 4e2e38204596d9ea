// SPDX-License-Identifier: Apache-2.0
// Softmax states of disjoint parts of a sequence, each on a rank of its own, merged into the state of the whole.
#pragma once

#include <mpi.h>

#include <algorithm>
#include <cstddef>
#include <kvsparse/core/softmax_state.hpp>
#include <span>
#include <vector>

namespace kvsparse_tools {

/// Every rank of a communicator brings the states of the same query heads over its own tokens, and all get, to the bit,
/// the same states over all tokens. That matters: what each rank computes next, and what its policy decides, must not
/// drift from the others'.
///
/// gather: every rank gets all states and merges them in rank order. Float sums depend on their order, and this is the
///     way to fix it; so two runs give the same bits on any MPI and any network. A state is head_dim + 2 floats a query
///     head, which is little beside the keys and values that were read for it.
/// reduce: MPI_Reduce with the merge as its operation, then MPI_Bcast: less traffic on many ranks, and MPI chooses the
///     order. (One MPI_Allreduce would do, if MPI promised the same bits on every rank.)
class StateMerge {
 public:
  enum class Way { gather, reduce };

  StateMerge(MPI_Comm ranks, std::size_t query_heads, std::size_t head_dim, Way way)
      : ranks_(ranks), head_dim_(head_dim), way_(way), mine_(query_heads * (head_dim + 2)) {
    MPI_Comm_size(ranks_, &rank_count_);
    all_.resize(mine_.size() * static_cast<std::size_t>(rank_count_));
    MPI_Type_contiguous(static_cast<int>(head_dim + 2), MPI_FLOAT, &packed_state_);
    MPI_Type_commit(&packed_state_);
    MPI_Op_create(&merge_packed, /*commute=*/0, &merge_states_);
  }
  StateMerge(const StateMerge&) = delete;
  StateMerge& operator=(const StateMerge&) = delete;
  ~StateMerge() {
    MPI_Op_free(&merge_states_);
    MPI_Type_free(&packed_state_);
  }

  /// states: [query_heads] over this rank's tokens, then over all.
  void operator()(std::span<kvsparse::SoftmaxState> states) {
    if (rank_count_ == 1) return;
    const auto count = static_cast<int>(states.size());
    for (std::size_t q = 0; q < states.size(); ++q) pack(states[q], mine_.data() + q * (head_dim_ + 2));
    if (way_ == Way::gather) {
      MPI_Allgather(mine_.data(), count, packed_state_, all_.data(), count, packed_state_, ranks_);
    } else {
      MPI_Reduce(mine_.data(), all_.data(), count, packed_state_, merge_states_, 0, ranks_);
      MPI_Bcast(all_.data(), count, packed_state_, 0, ranks_);
    }
    const int parts = way_ == Way::gather ? rank_count_ : 1;
    for (std::size_t q = 0; q < states.size(); ++q) {
      for (int part = 0; part < parts; ++part) {
        float* packed = all_.data() + static_cast<std::size_t>(part) * mine_.size() + q * (head_dim_ + 2);
        const kvsparse::SoftmaxState state = unpack(packed);
        if (part > 0) {
          kvsparse::merge(states[q], state, head_dim_);
        } else {
          std::copy_n(state.accumulator, head_dim_, states[q].accumulator);
          states[q].max = state.max;
          states[q].sum = state.sum;
        }
      }
    }
  }

 private:
  // On the wire: max, sum, accumulator [head_dim].
  void pack(const kvsparse::SoftmaxState& state, float* packed) const {
    packed[0] = state.max;
    packed[1] = state.sum;
    std::copy_n(state.accumulator, head_dim_, packed + 2);
  }
  static kvsparse::SoftmaxState unpack(float* packed) {
    kvsparse::SoftmaxState state;
    state.accumulator = packed + 2;
    state.max = packed[0];
    state.sum = packed[1];
    return state;
  }
  /// MPI's operation: into[i] = from[i] merged with into[i].
  static void merge_packed(void* from, void* into, int* count, MPI_Datatype* type) {
    int bytes = 0;
    MPI_Type_size(*type, &bytes);
    const std::size_t floats = static_cast<std::size_t>(bytes) / sizeof(float);
    for (std::size_t i = 0; i < static_cast<std::size_t>(*count); ++i) {
      float* packed = static_cast<float*>(into) + i * floats;
      kvsparse::SoftmaxState merged = unpack(packed);
      kvsparse::merge(merged, unpack(static_cast<float*>(from) + i * floats), floats - 2);
      packed[0] = merged.max;
      packed[1] = merged.sum;
    }
  }

  MPI_Comm ranks_;
  int rank_count_ = 1;
  std::size_t head_dim_;
  Way way_;
  std::vector<float> mine_, all_;  // [query_heads, head_dim + 2], and that of every rank
  MPI_Datatype packed_state_;
  MPI_Op merge_states_;
};

}  // namespace kvsparse_tools
