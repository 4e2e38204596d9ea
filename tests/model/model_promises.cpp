// SPDX-License-Identifier: Apache-2.0
//
// What must hold of a cache and of its pool after every verb, each computed from scratch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <type_traits>
#include <variant>
#include <vector>

#include "kvsparse/attention/exact.hpp"
#include "model_world.hpp"
#include "support/padding.hpp"
#include "witness.hpp"

namespace kvsparse_test {

using namespace kvsparse;
using Code = Status::Code;

namespace {

class ByteCollector final : public ByteWriter {
 public:
  explicit ByteCollector(std::vector<std::byte>& bytes) : bytes_(bytes) {}
  void write(std::span<const std::byte> bytes) override { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }

 private:
  std::vector<std::byte>& bytes_;
};

template <class State>
const State& state_in(const detail::StatesImage& states, std::size_t index) {
  return *reinterpret_cast<const State*>(states.at(index).data());
}

}  // namespace

std::string ModelWorld::difference(const detail::LayerImage& a, const detail::LayerImage& b) {
  const auto same = [](std::span<const std::byte> x, std::span<const std::byte> y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end());
  };
  if (*a.next != *b.next) return "the length";
  if (*a.prompt_tokens != *b.prompt_tokens || *a.prompt_ended != *b.prompt_ended) return "the prompt";
  if (!same(a.layer_state.bytes, b.layer_state.bytes)) return "the layer's state";
  constexpr const char* counters[] = {"evicted tokens", "tokens read", "tokens skipped", "queries seen"};
  for (std::size_t h = 0; h < a.heads.size(); ++h) {
    const detail::HeadImage& x = a.heads[h];
    const detail::HeadImage& y = b.heads[h];
    const std::string of_head = " of head " + std::to_string(h);
    if (*x.evictions != *y.evictions) return "evictions" + of_head;
    for (std::size_t i = 0; i < std::size(counters); ++i) {
      if (*x.counters[i] == *y.counters[i]) continue;
      return counters[i] + of_head + ", " + std::to_string(*x.counters[i]) + " and " + std::to_string(*y.counters[i]);
    }
    if (!same(x.state.bytes, y.state.bytes)) return "the policy's state" + of_head;
    if (!same(x.query_window, y.query_window)) return "recent queries" + of_head;
    if (x.table->size() != y.table->size()) return "the number of pages" + of_head;
    for (std::uint32_t i = 0; i < x.table->size(); ++i) {
      const ResidentPage& page = (*x.table)[{i}];
      const std::string of_page = " of page " + std::to_string(i) + of_head;
      if (page.first_position != (*y.table)[{i}].first_position) return "the position" + of_page;
      if (page.pinned != (*y.table)[{i}].pinned) return "the pin" + of_page;
      if (x.page_states.size != 0 && !same(x.page_states.at(i), y.page_states.at(i))) return "the state" + of_page;
    }
  }
  return "stored rows";
}

ModelWorld::Footprint ModelWorld::footprint_of(const detail::LayerImage& image) {
  Footprint footprint;
  detail::LayerImage without_peaks = image;
  std::size_t none = 0;
  without_peaks.peak_resident_tokens = without_peaks.peak_resident_pages = without_peaks.evicted_shared_pages = &none;
  if constexpr (!padding_is_cleared) {  // what a policy knows then shows in its answers alone
    without_peaks.layer_state = {};
    for (detail::HeadImage& head : without_peaks.heads) head.state = head.page_states = {};
  }
  ByteCollector collector(footprint.state);
  detail::write_state(without_peaks, collector);
  footprint.beside = {*image.peak_resident_tokens, *image.peak_resident_pages, *image.evicted_shared_pages,
                      *image.drafts, *image.running_page_budget};
  for (const detail::HeadImage& head : image.heads) {
    for (std::uint32_t i = 0; i < head.table->size(); ++i) footprint.beside.push_back((*head.table)[{i}].page.value);
  }
  return footprint;
}

void ModelWorld::expect(Entry& entry, Status status, Code code) {
  ++sights_.outcomes[status.code()];
  require(status.code() == code, "the outcome was \"", status.message(), "\"; expected was \"",
          Status(code, 0, 0).message(), "\"");
  if (code != Code::ok) expect_unchanged(entry, "a refusal");
}

void ModelWorld::expect_unchanged(const Entry& entry, const char* after) const {
  require(footprint_of(entry.image) == entry.footprint, "a cache changed by ", after);
}

void ModelWorld::check_entry(Entry& entry) const {
  const NaiveSequence& model = entry.model;
  require(entry.cache.next_position() == Position{0} + model.length(), "next_position is ",
          entry.cache.next_position().value, ", not ", model.length());
  require(*entry.image.prompt_tokens == model.prompt && *entry.image.prompt_ended == model.prompt_ended,
          "the prompt has ", *entry.image.prompt_tokens, " tokens, ended: ", *entry.image.prompt_ended,
          "; it should have ", model.prompt, ", ended: ", model.prompt_ended);
  require(entry.cache.drafts() == model.drafts, "there are ", entry.cache.drafts(), " drafts, not ", model.drafts);
  for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
    check_pages(entry, h);
    check_rows(entry, h);
  }
  check_stats(entry);
  for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
    entry.pages[h].clear();
    const PageTable& table = *entry.image.heads[h].table;
    for (std::uint32_t i = 0; i < table.size(); ++i) entry.pages[h].push_back(table[{i}].first_position.value);
  }
  entry.page_end = geometry().pages_for(model.length()) * geometry().page_size;
  entry.footprint = footprint_of(entry.image);
}

void ModelWorld::check_pages(const Entry& entry, std::size_t head) const {
  const CacheKind& kind = *entry.kind;
  const NaiveSequence& model = entry.model;
  const PageTable& table = *entry.image.heads[head].table;
  const std::size_t page_size = geometry().page_size;
  const std::size_t opened = geometry().pages_for(model.length());
  std::size_t tokens = 0;
  std::size_t pinned = 0;
  std::int64_t before = -1;
  std::vector<Position> positions;
  for (std::uint32_t i = 0; i < table.size(); ++i) {
    const ResidentPage& page = table[{i}];
    const std::int64_t first = page.first_position.value;
    require(first > before, "positions do not increase: ", first, " after ", before);
    require(first % static_cast<std::int64_t>(page_size) == 0, "a page begins at ", first);
    require(first < static_cast<std::int64_t>(model.length()), "position ", first, " has not come yet");
    require(page.tokens == std::min(page_size, model.length() - static_cast<std::size_t>(first)), "the page at ", first,
            " has ", page.tokens, " tokens");
    const std::vector<std::int64_t>& known = entry.pages[head];
    require(first >= static_cast<std::int64_t>(entry.page_end) || std::binary_search(known.begin(), known.end(), first),
            "the page at ", first, " was given up and is back");
    const bool is_sink = geometry().page_number(page.first_position) < kind.sink_pages;
    const bool is_prompt = kind.pins_prompt && first < static_cast<std::int64_t>(model.prompt);
    const bool may_lose_pin = kind.config.prompt_overflow == PromptOverflow::unpin_middle;
    require(page.pinned ? is_sink || is_prompt : !is_sink && (!is_prompt || may_lose_pin), "the page at ", first,
            page.pinned ? " is pinned" : " is not pinned");
    for (std::size_t slot = 0; slot < page.tokens; ++slot) positions.push_back(page.first_position + slot);
    tokens += page.tokens;
    pinned += page.pinned ? 1 : 0;
    before = first;
  }
  require(table.resident_tokens() == tokens && table.pinned_pages() == pinned, "the table miscounts tokens or pins");
  require(entry.cache.resident_positions(head) == positions, "resident_positions tells something else");
  require(opened == 0 || (table.size() > 0 && geometry().page_number(table.back().first_position) + 1 == opened),
          "the open page is not resident");
  const bool keeps_prompt = kind.pins_prompt && kind.config.prompt_overflow != PromptOverflow::unpin_middle;
  const std::size_t first_pages =
      std::min(opened, std::max(kind.sink_pages, keeps_prompt ? geometry().pages_for(model.prompt) : 0));
  for (std::uint32_t i = 0; i < first_pages; ++i) {
    require(i < table.size() && geometry().page_number(table[{i}].first_position) == i, "pinned page ", i, " is gone");
  }

  // Drafts stand beyond the budget; of what came before them as much is kept as fits, or less by a policy that trims.
  const std::size_t settled = geometry().pages_for(model.length() - model.drafts);
  const std::size_t budget = kind.page_budget_after(model.prompt);
  const std::size_t most = std::min(settled, budget) + opened - settled;
  if (kind.shares_budget) {
    const std::size_t least = std::min(settled, kind.page_floor()) + opened - settled;
    require(table.size() >= least, table.size(), " pages are resident; ", least, " at least are left to each head");
    std::size_t pages = 0;
    for (const detail::HeadImage& other : entry.image.heads) pages += other.table->size();
    require(pages == geometry().kv_heads * most, pages, " pages of all heads are resident; ",
            geometry().kv_heads * most, " fit");
  } else {
    require(table.size() <= most, table.size(), " pages are resident; ", most, " may be");
    require(kind.trims || table.size() == most, table.size(), " pages are resident; ", most, " fit");
  }
  require(!kind.evicts || !model.prompt_ended || pinned + kind.decode_pages() <= budget, pinned,
          " pinned pages leave no room to decode in ", budget);
  require(*entry.image.heads[head].evictions == opened - table.size(), *entry.image.heads[head].evictions,
          " evictions of ", opened, " pages left ", table.size());
}

void ModelWorld::check_rows(const Entry& entry, std::size_t head) const {
  const PageTable& table = *entry.image.heads[head].table;
  const std::size_t head_dim = geometry().head_dim;
  std::vector<float> key(head_dim), value(geometry().dim_of_values()), lowest(head_dim), highest(head_dim),
      sum(head_dim);
  const auto check = [&](const auto& pool) {
    const auto& [rows, summaries] = pool.memory();
    using Summary = std::remove_cvref_t<decltype(*summaries.min({0}))>;
    for (std::uint32_t i = 0; i < table.size(); ++i) {
      const ResidentPage& page = table[{i}];
      for (std::uint32_t slot = 0; slot < page.tokens; ++slot) {
        const std::size_t position = index_of(page.first_position) + slot;
        const auto expected = [&](const std::vector<float>& row, std::span<const float> of_model, const char* what) {
          require(std::equal(row.begin(), row.end(), of_model.begin()), "the ", what, " at position ", position,
                  " is not what came");
        };
        load_row(rows.key_row(page.page, {slot}), key);
        expected(key, stock_.stored_key(entry.model.rows[position], head), "key");
        for (std::size_t d = 0; d < head_dim; ++d) {
          lowest[d] = slot == 0 ? key[d] : std::min(lowest[d], key[d]);
          highest[d] = slot == 0 ? key[d] : std::max(highest[d], key[d]);
          sum[d] = (slot == 0 ? 0.0F : sum[d]) + key[d];
        }
        load_row(rows.value_row(page.page, {slot}), value);
        expected(value, stock_.stored_value(entry.model.rows[position], head), "value");
      }
      const std::int64_t first = page.first_position.value;
      for (std::size_t d = 0; d < head_dim && summaries.kind() == PageSummary::min_max; ++d) {
        const auto low = static_cast<float>(summaries.min(page.page)[d]);
        const auto high = static_cast<float>(summaries.max(page.page)[d]);
        require(low <= lowest[d] && high >= highest[d], "channel ", d, " of the page at ", first, " is within ",
                lowest[d], " .. ", highest[d], ", its summary ", low, " .. ", high);
        require(low == static_cast<float>(at_most<Summary>(lowest[d])) &&
                    high == static_cast<float>(at_least<Summary>(highest[d])),
                "the summary of the page at ", first, " is not tight");
      }
      for (std::size_t d = 0; d < head_dim && summaries.kind() == PageSummary::mean; ++d) {
        const float of_page = summaries.sum(page.page)[d];
        require(std::abs(of_page - sum[d]) <= 1e-4F * (1 + std::abs(sum[d])), "the key sum of the page at ", first,
                " is ", of_page, ", not ", sum[d]);
      }
    }
  };
  std::visit(check, pool_);
}

void ModelWorld::check_stats(const Entry& entry) const {
  const CacheStats stats = entry.cache.stats();
  const std::size_t bytes_per_page = std::visit([](const auto& pool) { return pool.bytes_per_page(); }, pool_);
  std::size_t most_tokens = 0;
  std::size_t tokens = 0;
  std::size_t pages = 0;
  std::size_t shared = 0;
  std::size_t evicted = 0;
  for (const detail::HeadImage& head : entry.image.heads) {
    most_tokens = std::max(most_tokens, head.table->resident_tokens());
    tokens += head.table->resident_tokens();
    pages += head.table->size();
    evicted += entry.model.length() - head.table->resident_tokens();
    for (std::uint32_t i = 0; i < head.table->size(); ++i) {
      shared += entry.image.pages.is_shared(entry.image.pages.store, (*head.table)[{i}].page) ? 1 : 0;
    }
  }
  const std::size_t heads = geometry().kv_heads;
  if (entry.kind->shares_budget) most_tokens = tokens / heads + (tokens % heads == 0 ? 0 : 1);
  require(stats.tokens == entry.model.length(), "stats().tokens is ", stats.tokens);
  require(stats.resident_tokens == most_tokens, "stats().resident_tokens is ", stats.resident_tokens);
  require(stats.peak_resident_tokens >= most_tokens, "the peak of tokens is below what is resident");
  require(stats.peak_resident_bytes >= stats.resident_bytes, "the peak of bytes is below what is resident");
  require(stats.resident_bytes == pages * (bytes_per_page + entry.image.heads[0].page_states.size),
          "stats().resident_bytes is ", stats.resident_bytes);
  require(stats.shared_bytes == shared * bytes_per_page, "stats().shared_bytes is ", stats.shared_bytes);
  require(entry.cache.bytes_reclaimable() == (pages - shared) * bytes_per_page, "bytes_reclaimable is wrong");
  require(stats.evicted_tokens == evicted, "stats().evicted_tokens is ", stats.evicted_tokens, ", not ", evicted);
}

void ModelWorld::check_pool() const {
  const auto check = [&](const auto& pool) {
    std::vector<std::uint32_t> references(pool.page_count(), 0);
    for (const Entry& entry : entries_) {
      for (const detail::HeadImage& head : entry.image.heads) {
        for (std::uint32_t i = 0; i < head.table->size(); ++i) {
          const PageId page = (*head.table)[{i}].page;
          require(page.value < references.size(), "there is no page ", page.value);
          ++references[page.value];
        }
      }
    }
    std::size_t free = 0;
    std::size_t shared = 0;
    for (std::uint32_t page = 0; page < references.size(); ++page) {
      require(pool.references({page}) == references[page], "page ", page, " has ", pool.references({page}),
              " references; ", references[page], " tables name it");
      free += references[page] == 0 ? 1 : 0;
      shared += references[page] > 1 ? 1 : 0;
    }
    require(pool.free_pages() == free, pool.free_pages(), " pages are said to be free; ", free, " are");
    require(pool.shared_pages() == shared, pool.shared_pages(), " pages are said to be shared; ", shared, " are");
  };
  std::visit(check, pool_);
}

void ModelWorld::check_reads(const Entry& entry) const {
  const CacheKind& kind = *entry.kind;
  const Position newest = Position{0} + (entry.model.length() - 1);
  std::size_t read_tokens = 0;
  std::size_t skipped_tokens = 0;
  for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
    const std::vector<Position> resident = entry.cache.resident_positions(h);
    const std::vector<Position> read = entry.cache.read_positions(h);
    require(std::includes(resident.begin(), resident.end(), read.begin(), read.end()),
            "a query read what is not resident");
    require(!read.empty() && (!kind.reads_newest || read.back() == newest), "a query did not read the newest token");
    std::size_t visible = 0;
    for (const Position position : resident) {
      visible +=
          kind.config.logits.window == 0 || newest - position < static_cast<std::int64_t>(kind.config.logits.window)
              ? 1
              : 0;
    }
    const std::size_t read_pages = kind.config.read_budget_tokens / geometry().page_size;
    const bool reads_all = !kind.selects || (!kind.reads_as_needed && entry.image.heads[h].table->size() <= read_pages);
    require(!reads_all || read.size() == visible, "a query read ", read.size(), " of ", visible, " tokens");
    require(reads_all || kind.reads_as_needed || read.size() <= kind.config.read_budget_tokens, "a query read ",
            read.size(), " tokens; the budget for reading is ", kind.config.read_budget_tokens);
    read_tokens += read.size();
    skipped_tokens += resident.size() - read.size();
  }
  const CacheStats stats = entry.cache.stats();
  require(stats.last_read_tokens == read_tokens, "stats().last_read_tokens is ", stats.last_read_tokens, ", not ",
          read_tokens);
  require(stats.last_skipped_tokens == skipped_tokens, "stats().last_skipped_tokens is ", stats.last_skipped_tokens,
          ", not ", skipped_tokens);
}

namespace {

/// The key as it is met by a query that stands so many positions nearer.
void turn(std::vector<float>& key, const Rope& rope, std::size_t positions) {
  const std::size_t pairs = rope.rotary_dims / 2;
  for (std::size_t i = 0; i < pairs; ++i) {
    const double frequency =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(rope.rotary_dims));
    const double angle = static_cast<double>(positions) * frequency;
    const auto first = static_cast<double>(key[i]), second = static_cast<double>(key[i + pairs]);
    key[i] = static_cast<float>(first * std::cos(angle) - second * std::sin(angle));
    key[i + pairs] = static_cast<float>(first * std::sin(angle) + second * std::cos(angle));
  }
}

}  // namespace

std::size_t ModelWorld::missing_behind(const Entry& entry, std::size_t head, std::int64_t position,
                                       std::size_t end) const {
  const auto page_size = static_cast<std::int64_t>(geometry().page_size);
  const Position first{position / page_size * page_size};
  std::size_t missing = end - index_of(first);
  for (const Position resident : entry.cache.resident_positions(head)) {
    if (resident >= first && index_of(resident) < end) --missing;
  }
  return missing;
}

void ModelWorld::check_output(const Entry& entry, std::size_t row, std::size_t end,
                              const std::vector<std::int64_t>& read, std::size_t head, std::span<const float> out,
                              const float* lse) const {
  if (entry.kind->answers_for_gone) return;
  const CacheConfig& config = entry.kind->config;
  const std::size_t head_dim = geometry().head_dim;
  const std::size_t value_dim = geometry().dim_of_values();
  ExactLogits logits;
  logits.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  logits.soft_cap = static_cast<double>(config.logits.soft_cap);
  logits.window = static_cast<std::int64_t>(config.logits.window);
  logits.query_position = static_cast<std::int64_t>(end) - 1;
  for (std::size_t q = 0; q < geometry().group(); ++q) {
    const std::size_t query_head = head * geometry().group() + q;
    if (!config.logits.sink_logits.empty()) logits.sink = static_cast<double>(config.logits.sink_logits[query_head]);
    if (!config.logits.alibi_slopes.empty())
      logits.alibi_slope = static_cast<double>(config.logits.alibi_slopes[query_head]);
    const std::span<const float> query = stock_.query(row, query_head);
    const auto key = [&](std::size_t i) {
      const std::span<const float> stored =
          stock_.stored_key(entry.model.rows[static_cast<std::size_t>(read[i])], head);
      std::vector<float> turned(stored.begin(), stored.end());
      if (entry.kind->counts_in_cache) turn(turned, config.rope, missing_behind(entry, head, read[i], end));
      return turned;
    };
    const auto value = [&](std::size_t i) {
      return stock_.stored_value(entry.model.rows[static_cast<std::size_t>(read[i])], head);
    };
    const ExactAttention exact = exact_attention(
        query, read.size(), key, value, [&](std::size_t i) { return read[i]; }, logits, value_dim);
    // The rounding error of a logit grows with the products that are summed.
    double products = 0;
    double largest = 1;
    for (std::size_t i = 0; i < read.size(); ++i) {
      double sum = 0;
      for (std::size_t d = 0; d < head_dim; ++d) {
        sum += std::abs(static_cast<double>(query[d]) * static_cast<double>(key(i)[d]));
      }
      for (const float element : value(i)) largest = std::max(largest, std::abs(static_cast<double>(element)));
      products = std::max(products, sum * logits.scale);
    }
    const double tolerance = 2e-6 * (4 + products + static_cast<double>(read.size()));
    for (std::size_t d = 0; d < value_dim; ++d) {
      const auto got = static_cast<double>(out[query_head * value_dim + d]);
      require(std::abs(got - exact.out[d]) <= tolerance * largest, "query head ", query_head, " gives ", got,
              " in channel ", d, "; the exact softmax over what it read gives ", exact.out[d]);
    }
    if (lse == nullptr) continue;
    require(std::abs(static_cast<double>(lse[query_head]) - exact.log_sum_exp) <=
                tolerance * (1 + std::abs(exact.log_sum_exp)),
            "log-sum-exp of query head ", query_head, " is ", lse[query_head], ", not ", exact.log_sum_exp);
  }
}

void ModelWorld::check_mass(const Entry& entry, std::size_t row) const {
  const bool tokens = entry.kind->policy == TokenWitness::name;
  if (entry.kind->policy != MassWitness::name && !tokens) return;
  const CacheConfig& config = entry.kind->config;
  const std::size_t page_size = geometry().page_size;
  for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
    const detail::HeadImage& head = entry.image.heads[h];
    const std::vector<Position> read = entry.cache.read_positions(h);
    for (std::size_t q = 0; q < geometry().group(); ++q) {
      ExactLogits logits;
      logits.scale = 1.0 / std::sqrt(static_cast<double>(geometry().head_dim));
      logits.soft_cap = static_cast<double>(config.logits.soft_cap);
      const std::size_t query_head = h * geometry().group() + q;
      logits.query_position = static_cast<std::int64_t>(entry.model.length()) - 1;
      logits.window = static_cast<std::int64_t>(config.logits.window);
      if (!config.logits.sink_logits.empty()) logits.sink = static_cast<double>(config.logits.sink_logits[query_head]);
      if (!config.logits.alibi_slopes.empty())
        logits.alibi_slope = static_cast<double>(config.logits.alibi_slopes[query_head]);
      const auto stored = [&](std::size_t i) { return stock_.stored_key(entry.model.rows[index_of(read[i])], h); };
      const ExactAttention exact = exact_attention(
          stock_.query(row, query_head), read.size(), stored, stored, [&](std::size_t i) { return read[i].value; },
          logits, geometry().head_dim);
      std::map<std::int64_t, double> mass, largest;
      for (std::size_t i = 0; i < read.size(); ++i) {
        const std::int64_t page = read[i].value / static_cast<std::int64_t>(page_size);
        mass[page] += exact.weights[i];
        largest[page] = std::max(largest[page], exact.weights[i]);
      }
      double sum = 0;
      for (std::uint32_t i = 0; i < head.table->size(); ++i) {
        const auto& seen = state_in<WitnessedPage>(head.page_states, i);
        const std::int64_t page = (*head.table)[{i}].first_position.value / static_cast<std::int64_t>(page_size);
        const bool visited = mass.count(page) > 0;
        require((seen.mass[q] >= 0) == visited, "page ", page, visited ? " was" : " was not",
                " read, its mass says otherwise");
        if (!visited) continue;
        constexpr double tolerance = 1e-4;
        const auto near = [&](float got, double expected, const char* what) {
          require(std::abs(static_cast<double>(got) - expected) <= tolerance, what, " of page ", page, " is ", got,
                  ", not ", expected);
        };
        near(seen.mass[q], mass[page], "the mass");
        if (tokens) near(seen.largest_token[q], largest[page], "the largest token's mass");
        if (tokens) near(seen.token_sum[q], mass[page], "the sum of token weights");
        sum += static_cast<double>(seen.mass[q]);
      }
      require(std::abs(sum - (1 - std::exp(logits.sink - exact.log_sum_exp))) <= 1e-5, "masses sum to ", sum);
    }
  }
}

}  // namespace kvsparse_test
