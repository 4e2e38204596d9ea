// SPDX-License-Identifier: Apache-2.0
// A policy as the brain of somebody else's engine. The engine has its keys and values in arrays of its own, its own
// block allocator and its own paged attention, as a GPU engine would; kvsparse holds no key and no value. What crosses:
//
//     to the engine     where each token's rows go, which blocks are free again, which blocks the kernel reads
//     to the policy     each block's share of the softmax, and, because Quest asks for them, the bounds of its keys
//
// RaaS decides what stays, Quest what of it a query reads. The program checks itself against PagedKvCache and attend():
// the same tokens held and read at every step, and the same outputs up to rounding.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <kvsparse/interop/page_steering.hpp>
#include <kvsparse/kvsparse.hpp>
#include <limits>
#include <random>
#include <span>
#include <vector>

namespace {

using kvsparse::PageId;
using kvsparse::Slot;
using Policy = kvsparse::Compose<kvsparse::Raas, kvsparse::Quest>;

/// Everything that would lie on the GPU. A block belongs to one kv head: [blocks, page_size, head_dim].
class FakeGpu {
 public:
  FakeGpu(std::size_t blocks, std::size_t page_size, std::size_t head_dim)
      : page_size_(page_size),
        head_dim_(head_dim),
        keys_(blocks * page_size * head_dim),
        values_(keys_.size()),
        lowest_(blocks * head_dim),
        highest_(lowest_.size()) {
    for (std::size_t block = blocks; block > 0; --block) free_.push_back({static_cast<std::uint32_t>(block - 1)});
  }

  // The block allocator, which kvsparse calls.
  PageId acquire() {
    const PageId block = free_.back();
    free_.pop_back();
    return block;
  }
  void release(PageId block) { free_.push_back(block); }
  std::size_t free_blocks() const { return free_.size(); }

  /// One token's key and value of one kv head, and the block's channel-wise bounds, which a real engine would update in
  /// the same kernel.
  void write(PageId block, Slot slot, const float* key, const float* value) {
    std::copy_n(key, head_dim_, &keys_[row(block, slot.value)]);
    std::copy_n(value, head_dim_, &values_[row(block, slot.value)]);
    for (std::size_t i = 0; i < head_dim_; ++i) {
      float& low = lowest_[block.value * head_dim_ + i];
      float& high = highest_[block.value * head_dim_ + i];
      low = slot.value == 0 ? key[i] : std::min(low, key[i]);
      high = slot.value == 0 ? key[i] : std::max(high, key[i]);
    }
  }

  /// What the policy may look at.
  kvsparse::RowAccess rows() const {
    kvsparse::RowAccess access;
    access.load_bounds = load_bounds;
    access.upper_bounds = kvsparse::upper_bounds_from<load_bounds>;
    return access;
  }

  /// Paged attention over FlashInfer's lists, one request after another; a request is a kv head and has `group`
  /// queries. q, out: [requests, group, head_dim]; log_sum_exp: [requests, group]; page_mass: [entries, group], each
  /// page's share of the softmax. Two passes, because this is to be read; a kernel has the mass from its running sums.
  void attend(const kvsparse::CsrPageLists& lists, std::size_t group, const float* q, float* out, float* log_sum_exp,
              float* page_mass) const {
    const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim_));
    for (std::size_t query = 0; query < lists.rows() * group; ++query, q += head_dim_, out += head_dim_) {
      const std::size_t request = query / group;
      const auto begin = static_cast<std::size_t>(lists.kv_indptr()[request]);
      const auto end = static_cast<std::size_t>(lists.kv_indptr()[request + 1]);
      const auto for_each_token = [&](auto&& visit) {
        for (std::size_t entry = begin; entry < end; ++entry) {
          const PageId block{static_cast<std::uint32_t>(lists.kv_indices()[entry])};
          const bool last = entry + 1 == end;
          const auto tokens = last ? static_cast<std::size_t>(lists.last_page_len()[request]) : page_size_;
          for (std::size_t slot = 0; slot < tokens; ++slot) {
            const float* key = &keys_[row(block, slot)];
            float logit = 0.0F;
            for (std::size_t i = 0; i < head_dim_; ++i) logit += q[i] * key[i];
            visit(entry, logit * scale, &values_[row(block, slot)]);
          }
        }
      };
      float max = -std::numeric_limits<float>::infinity(), sum = 0.0F;
      for_each_token([&](std::size_t, float logit, const float*) { max = std::max(max, logit); });
      for_each_token([&](std::size_t, float logit, const float*) { sum += std::exp(logit - max); });
      std::fill_n(out, head_dim_, 0.0F);
      for (std::size_t entry = begin; entry < end; ++entry) page_mass[entry * group + query % group] = 0.0F;
      for_each_token([&](std::size_t entry, float logit, const float* value) {
        const float weight = std::exp(logit - max) / sum;
        page_mass[entry * group + query % group] += weight;
        for (std::size_t i = 0; i < head_dim_; ++i) out[i] += weight * value[i];
      });
      log_sum_exp[query] = max + std::log(sum);
    }
  }

 private:
  std::size_t row(PageId block, std::size_t slot) const { return (block.value * page_size_ + slot) * head_dim_; }

  static void load_bounds(const void* store, PageId block, std::span<float> lowest, std::span<float> highest) {
    const auto& gpu = *static_cast<const FakeGpu*>(store);
    std::copy_n(&gpu.lowest_[block.value * gpu.head_dim_], lowest.size(), lowest.begin());
    std::copy_n(&gpu.highest_[block.value * gpu.head_dim_], highest.size(), highest.begin());
  }

  std::size_t page_size_, head_dim_;
  std::vector<float> keys_, values_;     // [blocks, page_size, head_dim]
  std::vector<float> lowest_, highest_;  // [blocks, head_dim]
  std::vector<PageId> free_;
};

}  // namespace

int main() {
  constexpr std::size_t prompt = 40, tokens = 600;
  const kvsparse::CacheConfig config{
      .query_heads = 8, .kv_heads = 2, .head_dim = 32, .page_size = 8, .budget_tokens = 128, .read_budget_tokens = 64};
  const std::size_t group = config.query_heads / config.kv_heads;
  const std::size_t pages_of_head = config.budget_tokens / config.page_size;

  FakeGpu gpu(config.kv_heads * pages_of_head, config.page_size, config.head_dim);
  kvsparse::PageSteering<Policy, FakeGpu> brain(config, gpu, Policy{}, gpu.rows(), &gpu);
  kvsparse::PagedKvCache<Policy> reference(config);

  // The lists lie where the engine wants them; nothing is allocated while it decodes.
  std::vector<std::int32_t> indptr(config.kv_heads + 1), indices(config.kv_heads * pages_of_head);
  std::vector<std::int32_t> last_page_len(config.kv_heads);
  kvsparse::CsrPageLists lists(indptr, indices, last_page_len);

  std::mt19937 random(1);
  std::normal_distribution<float> gaussian;
  std::vector<float> k(config.kv_heads * config.head_dim), v(k.size()), q(config.query_heads * config.head_dim);
  std::vector<float> out(q.size()), expected(q.size()), log_sum_exp(config.query_heads);
  std::vector<float> page_mass(indices.size() * group);
  float largest_difference = 0.0F;
  std::size_t steps_that_differ = 0;
  const auto require = [](kvsparse::Status status) {
    if (status) return;
    std::fprintf(stderr, "brain_only: %s\n", status.message().c_str());
    std::exit(1);
  };

  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::vector<float>* row : {&k, &v}) {
      for (float& x : *row) x = gaussian(random);
    }
    for (float& x : q) x = 2.0F * gaussian(random);

    // 1. The token's rows go where the brain says; when the budget is reached, a block was released for them.
    const auto write = [&](std::size_t kv_head, PageId block, Slot slot) {
      gpu.write(block, slot, &k[kv_head * config.head_dim], &v[kv_head * config.head_dim]);
    };
    if (t < prompt) {
      require(brain.append_prompt(
          1, [&](std::size_t, std::size_t kv_head, PageId block, Slot slot) { write(kv_head, block, slot); }));
    } else {
      require(brain.append(write));
    }
    // 2. The brain lists what the kernel reads, 3. the kernel reads it, 4. the brain learns what it saw.
    const kvsparse::HeadRows<const float> queries(q.data(), config.query_heads, config.head_dim);
    lists.clear();
    require(brain.select(queries, lists));
    gpu.attend(lists, group, q.data(), out.data(), log_sum_exp.data(), page_mass.data());
    require(brain.observe(queries, std::span<const float>(page_mass).first(lists.entries() * group), log_sum_exp));

    // The same with our own storage and kernel.
    require(t < prompt ? reference.append_prompt(k, v) : reference.append(k, v));
    require(kvsparse::attend(reference, q, expected));
    bool same = true;
    for (std::size_t h = 0; h < config.kv_heads; ++h) {
      same = same && brain.resident_positions(h) == reference.resident_positions(h) &&
             brain.read_positions(h) == reference.read_positions(h);
    }
    steps_that_differ += same ? 0 : 1;
    for (std::size_t i = 0; i < out.size(); ++i) {
      largest_difference = std::max(largest_difference, std::abs(out[i] - expected[i]));
    }
  }

  const std::size_t evicted = brain.stats(0).evicted_tokens;
  std::printf("%zu tokens under %s: %zu kept a head, %zu given up by %zu heads, %zu of %zu blocks free\n", tokens,
              Policy::name.data(), brain.resident_tokens(0), evicted, config.kv_heads, gpu.free_blocks(),
              config.kv_heads * pages_of_head);
  std::printf("steps whose decisions differ from PagedKvCache's: %zu; largest difference of an output: %.1e\n",
              steps_that_differ, static_cast<double>(largest_difference));
  return steps_that_differ == 0 && largest_difference < 1e-4F && evicted > 0 ? 0 : 1;
}
