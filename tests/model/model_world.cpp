// SPDX-License-Identifier: Apache-2.0
#include "model_world.hpp"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "kvsparse/interop/snapshot.hpp"

namespace kvsparse_test {

using namespace kvsparse;
using Code = Status::Code;

namespace {

constexpr std::size_t most_caches = 5;
constexpr std::uint32_t snapshot_slots = 3;

/// Several threads, as far as attend can tell; the last body comes first.
struct BackwardExecutor {
  void operator()(std::size_t count, RangeBody body) const noexcept {
    while (count-- > 0) body(count);
  }
  static constexpr std::size_t concurrency() { return 3; }
};

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

struct NamedVerb {
  Verb::Kind kind;
  const char* name;
  int weight;
};
constexpr NamedVerb verbs[] = {
    {Verb::Kind::append, "append", 22},
    {Verb::Kind::append_chunk, "append_chunk", 6},
    {Verb::Kind::append_prompt, "append_prompt", 12},
    {Verb::Kind::end_prompt, "end_prompt", 1},
    {Verb::Kind::append_draft, "append_draft", 9},
    {Verb::Kind::truncate, "truncate", 8},
    {Verb::Kind::query, "query", 20},
    {Verb::Kind::queries, "queries", 6},
    {Verb::Kind::clear, "clear", 2},
    {Verb::Kind::fork, "fork", 4},
    {Verb::Kind::release, "release", 3},
    {Verb::Kind::make, "make", 4},
    {Verb::Kind::save, "save", 3},
    {Verb::Kind::load, "load", 4},
    {Verb::Kind::load_damaged, "load_damaged", 1},
    {Verb::Kind::copy, "copy", 1},
    {Verb::Kind::wrong_shape, "wrong_shape", 2},
    {Verb::Kind::compare_with_twin, "compare_with_twin", 2},
};

}  // namespace

// --- verbs ----------------------------------------------------------------------------------------------------------

Verb Verb::random(TestRng& rng) {
  int sum = 0;
  for (const NamedVerb& verb : verbs) sum += verb.weight;
  int pick = rng.below(sum);
  const NamedVerb* drawn = std::begin(verbs);
  while (pick >= drawn->weight) pick -= drawn++->weight;
  const auto number = [&](int below) { return static_cast<std::uint32_t>(rng.below(below)); };
  return {drawn->kind, number(60), number(60), number(1 << 20)};
}

std::string Verb::describe() const {
  const auto named =
      std::find_if(std::begin(verbs), std::end(verbs), [&](const NamedVerb& v) { return v.kind == kind; });
  return std::string(named->name) + "(cache " + std::to_string(cache) + ", amount " + std::to_string(amount) +
         ", seed " + std::to_string(seed) + ")";
}

void Sights::add(const Sights& other) {
  for (const auto& [code, count] : other.outcomes) outcomes[code] += count;
  evicted_pages += other.evicted_pages;
  shared_pages += other.shared_pages;
  forks += other.forks;
  loads += other.loads;
  refused_loads += other.refused_loads;
  drafts_taken_back += other.drafts_taken_back;
  settled_tokens_taken_back += other.settled_tokens_taken_back;
}

// --- the world ------------------------------------------------------------------------------------------------------

ModelWorld::Entry::Entry(const CacheKind& of_kind, AnyCache&& made, NaiveSequence naive)
    : kind(&of_kind),
      cache(std::move(made)),
      image(detail::ImageAccess::of(cache)),
      model(std::move(naive)),
      footprint(footprint_of(image)),
      pages(image.heads.size()) {}

namespace {

/// The policy's own kind, and another that may use the same pool.
std::vector<CacheKind> draw_kinds(std::string_view policy, ScalarType scalar, const PoolShape& shape, TestRng& rng) {
  std::vector<CacheKind> kinds(1, draw_kind(policy, scalar, shape, rng));
  const std::vector<std::string> policies = policies_to_model();
  const std::string& other = policies[static_cast<std::size_t>(rng.below(static_cast<int>(policies.size())))];
  try {
    if (shape.group == 1 || other.find("oracle") == std::string::npos) {
      kinds.push_back(draw_kind(other, scalar, shape, rng));
      return kinds;
    }
  } catch (const std::runtime_error&) {  // the pool does not suit that policy
  }
  kinds.push_back(draw_kind(policy, scalar, shape, rng));
  return kinds;
}

std::size_t pages_for_some(const std::vector<CacheKind>& kinds, TestRng& rng) {
  std::size_t most = 0;
  for (const CacheKind& kind : kinds) {
    const std::size_t drafts = kind.evicts ? kind.geometry().pages_for(kind.config.max_speculative) : 0;
    most = std::max(most, kind.page_capacity() + drafts);
  }
  return most + static_cast<std::size_t>(rng.below(static_cast<int>(2 * most)));
}

TestRng rng_of(std::string_view policy, ScalarType scalar, std::size_t page_size, std::uint64_t seed) {
  std::uint64_t mixed = seed;
  for (const char c : policy) mixed = mixed * 1000003 + static_cast<unsigned char>(c);
  return TestRng(mixed * 64 * 1024 + page_size * 8 + static_cast<std::uint64_t>(scalar));
}

}  // namespace

struct ModelWorld::Drawn {
  Drawn(std::string_view policy, ScalarType of, std::size_t page_size, std::uint64_t seed)
      : rng(rng_of(policy, of, page_size, seed)),
        shape(draw_shape(policy, page_size, rng)),
        kinds(draw_kinds(policy, of, shape, rng)),
        pages(pages_for_some(kinds, rng)) {}
  TestRng rng;
  PoolShape shape;
  std::vector<CacheKind> kinds;
  std::size_t pages;
};

ModelWorld::ModelWorld(std::string_view policy, ScalarType scalar, std::size_t page_size, std::uint64_t seed)
    : ModelWorld(scalar, Drawn(policy, scalar, page_size, seed)) {}
ModelWorld::ModelWorld(ScalarType scalar, const Drawn& drawn)
    : kinds_(drawn.kinds),
      stock_(kinds_[0].geometry(), scalar, TestRng(drawn.rng).next()),
      pool_(make_pool(scalar, drawn.shape, drawn.pages)) {}

std::string ModelWorld::describe() const {
  std::string text;
  for (const CacheKind& kind : kinds_) text += kind.describe() + "\n";
  return text + std::to_string(std::visit([](const auto& pool) { return pool.page_count(); }, pool_)) + " pages\n";
}

void ModelWorld::run(const Verb& verb) {
  using Kind = Verb::Kind;
  if (entries_.empty() || verb.kind == Kind::make) {
    make(verb.seed);
  } else {
    const std::size_t index = verb.cache % entries_.size();
    Entry& entry = entries_[index];
    // Long enough for every page to be given up several times; the twin has to live through all of it.
    const std::size_t long_enough = 64 + 14 * geometry().page_size;
    if (entry.model.length() > long_enough) clear(entry);
    const std::size_t count = verb.amount % (2 * geometry().page_size + 3);
    switch (verb.kind) {
      case Kind::append: append(entry, 1, verb.seed, true); break;
      case Kind::append_chunk: append(entry, count, verb.seed, false); break;
      case Kind::append_prompt: append_prompt(entry, count, verb.seed); break;
      case Kind::end_prompt:
        entry.cache.end_prompt();
        entry.model.end_prompt();
        break;
      case Kind::append_draft:
        append_draft(entry, verb.amount % (entry.kind->config.max_speculative + 2), verb.seed);
        break;
      case Kind::truncate: truncate(entry, verb.amount); break;
      case Kind::query: query(entry, verb.seed); break;
      case Kind::queries: queries(entry, count, verb.seed); break;
      case Kind::clear: clear(entry); break;
      case Kind::fork: fork(index); break;
      case Kind::release: entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(index)); break;
      case Kind::make: break;
      case Kind::save: save(entry, verb.seed); break;
      case Kind::load: load(entry, verb.seed); break;
      case Kind::load_damaged: load_damaged(entry, verb.seed); break;
      case Kind::copy: copy(entry); break;
      case Kind::wrong_shape: wrong_shape(entry, verb.seed); break;
      case Kind::compare_with_twin: compare_with_twin(entry, verb.seed); break;
    }
    if (verb.kind != Kind::release) {
      const std::uint64_t evictions = *entries_[index].image.heads[0].evictions;
      check_entry(entries_[index]);
      if (evictions > entries_[index].evictions_before)
        sights_.evicted_pages += evictions - entries_[index].evictions_before;
      entries_[index].evictions_before = evictions;
    }
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (i == index || (verb.kind == Kind::fork && i + 1 == entries_.size())) continue;
      expect_unchanged(entries_[i], "a verb of another cache");
    }
  }
  check_pool();
  sights_.shared_pages += std::visit([](const auto& pool) { return pool.shared_pages(); }, pool_);
}

void ModelWorld::finish() {
  for (Entry& entry : entries_) compare_with_twin(entry, std::nullopt);
  entries_.clear();
  check_pool();
  std::visit(
      [](auto& pool) {
        // The free list names every page once.
        std::vector<bool> taken(pool.page_count(), false);
        for (std::size_t i = 0; i < taken.size(); ++i) {
          const PageId page = pool.acquire();
          require(page.value < taken.size() && !taken[page.value], "the free list names page ", page.value, " twice");
          taken[page.value] = true;
        }
        for (std::uint32_t page = 0; page < taken.size(); ++page) pool.release({page});
      },
      pool_);
}

void ModelWorld::clear(Entry& entry) {
  entry.cache.clear();
  entry.model = {};
  entry.footprint = footprint_of(entry.image);
  entry.forget_pages();
}

// --- growing --------------------------------------------------------------------------------------------------------

void ModelWorld::append(Entry& entry, std::size_t count, std::uint32_t seed, bool one_by_one) {
  const PoolDemand demand = entry.cache.pool_demand(count);
  const bool pool_has_room = count == 0 || demand.pages <= demand.free_pages;
  const std::size_t length = entry.model.length() + count;
  const bool too_long = !entry.kind->evicts && length > entry.kind->config.max_tokens;
  const Code expected = too_long ? Code::max_tokens_reached : pool_has_room ? Code::ok : Code::pool_exhausted;
  require(entry.cache.can_append(count) == (expected == Code::ok), "can_append(", count, ") promises something else");
  const std::vector<float> k = keys(seed, count);
  const std::vector<float> v = values(seed, count);
  const std::size_t free_before = free_pages();
  const Status status = one_by_one ? entry.cache.append(std::span(k), std::span(v))
                                   : entry.cache.append(key_chunk(k, count), value_chunk(v, count));
  expect(entry, status, expected);
  if (!status || count == 0) return;
  require(free_pages() + demand.pages >= free_before, count, " tokens took ", free_before - free_pages(),
          " pages; pool_demand said ", demand.pages);
  entry.model.append(count, seed);
}

void ModelWorld::append_prompt(Entry& entry, std::size_t count, std::uint32_t seed) {
  const CacheKind& kind = *entry.kind;
  const NaiveSequence& model = entry.model;
  const PoolDemand demand = entry.cache.pool_demand(count);
  const std::size_t pinned = kind.pages_pinned_by(model.prompt + count);
  Code expected = count == 0 || demand.pages <= demand.free_pages ? Code::ok : Code::pool_exhausted;
  if (kind.evicts && pinned + kind.decode_pages() > kind.page_capacity()) expected = Code::prompt_exceeds_budget;
  if (!kind.evicts && model.length() + count > kind.config.max_tokens) expected = Code::max_tokens_reached;
  if (model.prompt_ended) expected = Code::prompt_ended;
  require(entry.cache.can_append_prompt(count) == (expected == Code::ok), "can_append_prompt(", count,
          ") promises something else");
  const std::vector<float> k = keys(seed, count);
  const std::vector<float> v = values(seed, count);
  const std::size_t free_before = free_pages();
  const Status status = seed % 2 == 0 ? entry.cache.append_prompt(std::span(k), std::span(v))
                                      : entry.cache.append_prompt(key_chunk(k, count), value_chunk(v, count));
  expect(entry, status, expected);
  if (!status || count == 0) return;
  require(free_pages() + demand.pages >= free_before, "a prompt of ", count, " tokens took ",
          free_before - free_pages(), " pages; pool_demand said ", demand.pages);
  entry.model.add_prompt(count, seed);
}

void ModelWorld::append_draft(Entry& entry, std::size_t count, std::uint32_t seed) {
  const CacheKind& kind = *entry.kind;
  const NaiveSequence& model = entry.model;
  const Geometry& shape = geometry();
  std::size_t pages = shape.kv_heads * (shape.pages_for(model.length() + count) - shape.pages_for(model.length()));
  for (const detail::HeadImage& head : entry.image.heads) {
    if (model.length() % shape.page_size == 0) continue;
    pages += entry.image.pages.is_shared(entry.image.pages.store, head.table->back().page) ? 1 : 0;
  }
  Code expected = count == 0 || pages <= free_pages() ? Code::ok : Code::pool_exhausted;
  if (!kind.evicts && model.length() + count > kind.config.max_tokens) expected = Code::max_tokens_reached;
  if (model.drafts + count > kind.config.max_speculative) expected = Code::too_many_drafts;
  const std::vector<float> k = keys(seed, count);
  const std::vector<float> v = values(seed, count);
  const std::size_t free_before = free_pages();
  expect(entry, entry.cache.append_draft(key_chunk(k, count), value_chunk(v, count)), expected);
  if (expected != Code::ok || count == 0) return;
  // The end of the prompt may give pages back.
  require(free_pages() + pages >= free_before, "drafts took more pages than they open and copy");
  entry.model.append_draft(count, seed);
}

void ModelWorld::truncate(Entry& entry, std::uint32_t amount) {
  const std::size_t length = entry.model.length();
  // Most often among the drafts or close by; now and then beyond either end.
  const std::int64_t back = amount % 4 == 3 ? amount : amount % (entry.model.drafts + 2);
  const Position position{static_cast<std::int64_t>(length) - back + (amount == 7 ? 9 : 0)};
  const std::size_t oldest = entry.cache.oldest_reachable();
  require(oldest + entry.model.drafts <= length, "oldest_reachable is ", oldest, ", within the drafts");
  const bool reachable = position >= Position{0} + oldest && position <= Position{0} + length;
  Code expected = reachable ? Code::ok : Code::unreachable_length;
  if (reachable) {
    const PoolDemand demand = entry.cache.truncate_demand(position);
    if (demand.pages > demand.free_pages) expected = Code::pool_exhausted;
  }
  expect(entry, entry.cache.truncate(position), expected);
  if (expected != Code::ok) return;
  const std::size_t taken_back = length - index_of(position);
  sights_.drafts_taken_back += std::min(taken_back, entry.model.drafts);
  sights_.settled_tokens_taken_back += taken_back - std::min(taken_back, entry.model.drafts);
  entry.model.truncate(index_of(position));
  compare_with_twin(entry, std::nullopt);
}

// --- asking ---------------------------------------------------------------------------------------------------------

void ModelWorld::query(Entry& entry, std::uint32_t seed) {
  const NaiveSequence& model = entry.model;
  const bool too_many = model.drafts > 0 && model.draft_queries > entry.kind->config.max_speculative;
  const Code expected = model.length() == 0 ? Code::nothing_to_attend
                        : too_many          ? Code::too_many_draft_queries
                                            : Code::ok;
  const std::vector<float> q = queries_of(seed, 1);
  std::vector<float> out(output_row()), lse(geometry().query_heads);
  const BackwardExecutor backward;
  const Status status = seed % 2 == 0 ? entry.cache.attend(std::span(q), std::span(out), lse)
                                      : entry.cache.attend(std::span(q), std::span(out), lse, backward);
  expect(entry, status, expected);
  if (!status) return;
  entry.model.ask(seed);
  check_reads(entry);
  for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
    std::vector<std::int64_t> read;
    for (const Position position : entry.cache.read_positions(h)) read.push_back(position.value);
    check_output(entry, seed, model.length(), read, h, out, lse.data());
  }
  check_mass(entry, seed);
}

void ModelWorld::queries(Entry& entry, std::size_t count, std::uint32_t seed) {
  const NaiveSequence& model = entry.model;
  // Those of older tokens would be answered one by one beside drafts, and several at a time by a twin that never had
  // the drafts: the same sums in another order.
  if (model.drafts > 0) count = std::min(count, model.drafts);
  const bool too_many = model.drafts > 0 && model.draft_queries + count > entry.kind->config.max_speculative + 1;
  const Code expected = count > model.length() ? Code::nothing_to_attend
                        : too_many             ? Code::too_many_draft_queries
                                               : Code::ok;
  const std::vector<float> q = queries_of(seed, count);
  std::vector<float> out(count * output_row());
  const TokenRows<const float> of_tokens(q.data(), count, geometry().query_heads, geometry().head_dim);
  const TokenRows<float> outs(out.data(), count, geometry().query_heads, geometry().dim_of_values());
  const Status status = entry.cache.attend_prompt(of_tokens, outs);
  expect(entry, status, expected);
  if (!status || count == 0) return;
  entry.model.ask_for_newest(count, seed);
  check_reads(entry);
  const std::size_t row = output_row();
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t end = model.length() - count + 1 + i;
    if (entry.kind->selects && i + 1 < count) continue;  // only the last one's reads are known
    for (std::size_t h = 0; h < geometry().kv_heads; ++h) {
      std::vector<std::int64_t> read;
      const auto positions = entry.kind->selects ? entry.cache.read_positions(h) : entry.cache.resident_positions(h);
      for (const Position position : positions) {
        if (index_of(position) < end) read.push_back(position.value);
      }
      check_output(entry, seed + i, end, read, h, std::span<const float>(out).subspan(i * row, row), nullptr);
    }
  }
  check_mass(entry, seed + count - 1);
}

// --- coming and going -----------------------------------------------------------------------------------------------

void ModelWorld::make(std::uint32_t seed) {
  if (entries_.size() == most_caches) return;
  const CacheKind& kind = kinds_[seed % 4 == 0 ? 1 : 0];
  entries_.push_back(Entry(kind, kind.make(pool_), {}));
  check_entry(entries_.back());
}

void ModelWorld::fork(std::size_t index) {
  if (entries_.size() == most_caches) return;
  Entry& parent = entries_[index];
  AnyCache child = parent.cache.fork();
  expect_unchanged(parent, "fork");
  Entry entry(*parent.kind, std::move(child), parent.model);
  require(entry.footprint == parent.footprint, "a fork differs from its parent");
  entry.pages = parent.pages;
  entry.page_end = parent.page_end;
  entries_.push_back(std::move(entry));
  ++sights_.forks;
  check_entry(entries_.back());
  compare_with_twin(entries_.back(), std::nullopt);
}

void ModelWorld::save(const Entry& entry, std::uint32_t seed) {
  std::ostringstream out;
  try {
    kvsparse::save(entry.cache, out);
    require(entry.model.drafts == 0, "a snapshot was taken while drafts were outstanding");
    std::size_t pages = 0;
    for (const detail::HeadImage& head : entry.image.heads) pages += head.table->size();
    saved_.insert_or_assign(seed % snapshot_slots,
                            Saved{entry.image.facts, out.str(), entry.model, entry.footprint.state, pages});
  } catch (const SnapshotError& error) {
    require(entry.model.drafts != 0, "save failed: ", error.what());
  }
  expect_unchanged(entry, "save");
}

void ModelWorld::load(Entry& entry, std::uint32_t seed) {
  const auto found = saved_.find(seed % snapshot_slots);
  if (found == saved_.end()) return;
  const Saved& saved = found->second;
  std::size_t room = free_pages();
  for (const detail::HeadImage& head : entry.image.heads) {
    for (std::uint32_t i = 0; i < head.table->size(); ++i) {
      room += entry.image.pages.is_shared(entry.image.pages.store, (*head.table)[{i}].page) ? 0 : 1;
    }
  }
  const std::string other = detail::difference(saved.facts, entry.image.facts);
  std::istringstream in(saved.bytes);
  try {
    kvsparse::load(entry.cache, in);
  } catch (const SnapshotError& error) {
    require(!other.empty() || saved.pages > room, "load failed: ", error.what());
    expect_unchanged(entry, "a refused load");
    ++sights_.refused_loads;
    return;
  }
  require(other.empty(), "a snapshot of another cache was loaded: ", other);
  require(saved.pages <= room, "load took ", saved.pages, " pages where there were ", room);
  require(in.peek() == std::istringstream::traits_type::eof(), "load left some of the snapshot unread");
  require(footprint_of(entry.image).state == saved.state, "what was loaded is not what was saved");
  entry.forget_pages();
  ++sights_.loads;
  entry.model = saved.model;
  entry.model.was_loaded = true;
  compare_with_twin(entry, std::nullopt);
}

void ModelWorld::load_damaged(Entry& entry, std::uint32_t seed) {
  const auto found = saved_.find(seed % snapshot_slots);
  if (found == saved_.end()) return;
  std::string bytes = found->second.bytes;
  const std::size_t at = seed * std::size_t{7919} % bytes.size();
  if (seed % 2 == 0) {
    bytes.resize(at);
  } else {
    bytes[at] = static_cast<char>(bytes[at] ^ (1 << seed % 8));
  }
  std::istringstream in(bytes);
  try {
    kvsparse::load(entry.cache, in);
  } catch (const SnapshotError&) {
    expect_unchanged(entry, "a damaged load");
    return;
  }
  throw Broken("a snapshot damaged at byte " + std::to_string(at) + " was loaded");
}

void ModelWorld::copy(const Entry& entry) {
  AnyCache copied(entry.cache);
  require(footprint_of(detail::ImageAccess::of(copied)).state == entry.footprint.state, "a copy differs");
  expect_unchanged(entry, "a copy of it");
}

void ModelWorld::wrong_shape(Entry& entry, std::uint32_t seed) {
  const Geometry& shape = geometry();
  const std::size_t head_dim = shape.head_dim, value_dim = shape.dim_of_values();
  const std::vector<float> rows(4 * (shape.query_heads + 1) * (std::max(head_dim, value_dim) + 1));
  std::vector<float> out(rows.size());
  const std::span<const float> flat(rows);
  const std::size_t k = shape.kv_heads * head_dim, v = shape.kv_heads * value_dim;
  const HeadRows<const float> right_k(rows.data(), shape.kv_heads, head_dim);
  const HeadRows<const float> right_v(rows.data(), shape.kv_heads, value_dim);
  const TokenRows<const float> two_k(rows.data(), 2, shape.kv_heads, head_dim);
  const auto values = [&](std::size_t tokens, std::size_t dim) {
    return TokenRows<const float>(rows.data(), tokens, shape.kv_heads, dim);
  };
  AnyCache& cache = entry.cache;
  const auto refuse = [&](Status status) { require(!status.ok(), "a wrong shape was taken"); };
  switch (seed % 8) {
    case 0: refuse(cache.append(flat.first(k + 1), flat.first(v))); break;
    case 1: refuse(cache.append(flat.first(k), flat.first(v - 1))); break;
    case 2: refuse(cache.append(right_k, HeadRows<const float>(rows.data(), shape.kv_heads + 1, value_dim))); break;
    case 3: refuse(cache.append(HeadRows<const float>(rows.data(), shape.kv_heads, head_dim + 1), right_v)); break;
    case 4: refuse(cache.append(two_k, values(1, value_dim))); break;
    case 5: refuse(cache.append_prompt(flat.first(2 * k), flat.first(v))); break;
    case 6: refuse(cache.attend(flat.first(k * shape.group()), std::span(out).first(output_row() + 1))); break;
    case 7: refuse(cache.append_draft(two_k, values(2, value_dim + 1))); break;
    default: break;
  }
  expect_unchanged(entry, "a wrong shape");
}

// --- the twin -------------------------------------------------------------------------------------------------------

AnyCache ModelWorld::twin_of(const Entry& entry) const {
  using Kind = NaiveSequence::Event::Kind;
  AnyCache twin = entry.kind->make();
  for (const NaiveSequence::Event& event : entry.model.history) {
    const std::size_t count = event.count;
    std::vector<float> k, v;
    // Chunk by chunk as it came: what is left of a chunk that was cut are its first tokens.
    for (std::size_t i = event.length; i < event.length + count && event.kind < Kind::query; ++i) {
      if (event.kind == Kind::end_prompt) break;
      const std::size_t row = entry.model.rows[i];
      k.insert(k.end(), stock_.k(row).begin(), stock_.k(row).end());
      v.insert(v.end(), stock_.v(row).begin(), stock_.v(row).end());
    }
    Status status;
    std::vector<float> q, out;
    switch (event.kind) {
      case Kind::prompt: status = twin.append_prompt(key_chunk(k, count), value_chunk(v, count)); break;
      case Kind::end_prompt: twin.end_prompt(); break;
      case Kind::append: status = twin.append(key_chunk(k, count), value_chunk(v, count)); break;
      case Kind::draft: status = twin.append_draft(key_chunk(k, count), value_chunk(v, count)); break;
      case Kind::query:
      case Kind::queries:
        q = queries_of(event.row, count);
        out.resize(count * output_row());
        if (event.kind == Kind::query) {
          status = twin.attend(std::span<const float>(q), std::span<float>(out));
        } else {
          status = twin.attend_prompt({q.data(), count, geometry().query_heads, geometry().head_dim},
                                      {out.data(), count, geometry().query_heads, geometry().dim_of_values()});
        }
        break;
      case Kind::settle: status = twin.truncate(twin.next_position()); break;
    }
    require(status.ok(), "the twin was refused what its cache was not: ", status.message());
  }
  return twin;
}

void ModelWorld::compare_with_twin(Entry& entry, std::optional<std::uint32_t> query_seed) {
  AnyCache twin = twin_of(entry);
  const auto compare = [&](const char* what) {
    const detail::LayerImage image = detail::ImageAccess::of(twin);
    if (footprint_of(image).state == footprint_of(entry.image).state) return;
    throw Broken(std::string(what) +
                 " differs from a twin that only had what counts: " + difference(entry.image, image));
  };
  compare("the state");
  require(twin.drafts() == entry.cache.drafts(), "the twin has other drafts");
  // When a page was given up last is not in a snapshot, so how far a loaded cache can go back is its own affair.
  const std::size_t oldest = entry.cache.oldest_reachable();
  require(entry.model.was_loaded || oldest == twin.oldest_reachable(), "oldest_reachable is ", oldest, ", the twin's ",
          twin.oldest_reachable());
  const NaiveSequence& model = entry.model;
  const bool may_ask =
      model.length() > 0 && (model.drafts == 0 || model.draft_queries <= entry.kind->config.max_speculative);
  if (!query_seed || !may_ask) return;
  const std::vector<float> q = queries_of(*query_seed, 1);
  std::vector<float> out(output_row()), lse(geometry().query_heads), out_of_twin(out), lse_of_twin(lse);
  expect(entry, entry.cache.attend(std::span(q), std::span(out), lse), Code::ok);
  require(twin.attend(std::span(q), std::span(out_of_twin), lse_of_twin).ok(), "the twin was refused a query");
  require(same_bits(out, out_of_twin) && same_bits(lse, lse_of_twin), "the twin answers otherwise");
  entry.model.ask(*query_seed);
  compare("the state after a query");
}

// --- rows -----------------------------------------------------------------------------------------------------------

namespace {
template <class Row>
std::vector<float> joined(std::size_t first, std::size_t count, Row&& row) {
  std::vector<float> rows;
  for (std::size_t i = 0; i < count; ++i) rows.insert(rows.end(), row(first + i).begin(), row(first + i).end());
  return rows;
}
}  // namespace

std::vector<float> ModelWorld::keys(std::size_t first_row, std::size_t count) const {
  return joined(first_row, count, [&](std::size_t i) { return stock_.k(i); });
}
std::vector<float> ModelWorld::values(std::size_t first_row, std::size_t count) const {
  return joined(first_row, count, [&](std::size_t i) { return stock_.v(i); });
}
std::vector<float> ModelWorld::queries_of(std::size_t first_row, std::size_t count) const {
  return joined(first_row, count, [&](std::size_t i) { return stock_.q(i); });
}
TokenRows<const float> ModelWorld::key_chunk(const std::vector<float>& rows, std::size_t count) const {
  return {rows.data(), count, geometry().kv_heads, geometry().head_dim};
}
TokenRows<const float> ModelWorld::value_chunk(const std::vector<float>& rows, std::size_t count) const {
  return {rows.data(), count, geometry().kv_heads, geometry().dim_of_values()};
}
std::size_t ModelWorld::free_pages() const {
  return std::visit([](const auto& pool) { return pool.free_pages(); }, pool_);
}

}  // namespace kvsparse_test
