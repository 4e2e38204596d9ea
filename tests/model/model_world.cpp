// SPDX-License-Identifier: Apache-2.0
#include "model_world.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <utility>

#include "kvsparse/attention/exact.hpp"
#include "kvsparse/interop/snapshot.hpp"
#include "witness.hpp"

namespace kvsparse_test {

using namespace kvsparse;
using Code = Status::Code;

namespace {

constexpr std::size_t most_caches = 5;
constexpr std::uint32_t snapshot_slots = 3;

template <class... Parts>
void require(bool kept, const Parts&... parts) {
  if (kept) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw Broken(sentence.str());
}

std::size_t index_of(Position position) { return static_cast<std::size_t>(position.value); }

class ByteCollector final : public ByteWriter {
 public:
  explicit ByteCollector(std::vector<std::byte>& bytes) : bytes_(bytes) {}
  void write(std::span<const std::byte> bytes) override { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }

 private:
  std::vector<std::byte>& bytes_;
};

/// Several threads, as far as attend can tell; the last body comes first.
struct BackwardExecutor {
  void operator()(std::size_t count, RangeBody body) const noexcept {
    while (count-- > 0) body(count);
  }
  static constexpr std::size_t concurrency() { return 3; }
};

template <class State>
const State& state_in(const detail::StatesImage& states, std::size_t index) {
  return *reinterpret_cast<const State*>(states.at(index).data());
}

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
                                   : entry.cache.append(chunk(k, count), chunk(v, count));
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
                                      : entry.cache.append_prompt(chunk(k, count), chunk(v, count));
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
  expect(entry, entry.cache.append_draft(chunk(k, count), chunk(v, count)), expected);
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
  std::vector<float> out(q.size()), lse(geometry().query_heads);
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
  const bool too_many = model.drafts > 0 && model.draft_queries + count > entry.kind->config.max_speculative + 1;
  const Code expected = count > model.length() ? Code::nothing_to_attend
                        : too_many             ? Code::too_many_draft_queries
                                               : Code::ok;
  const std::vector<float> q = queries_of(seed, count);
  std::vector<float> out(q.size());
  const TokenRows<const float> of_tokens(q.data(), count, geometry().query_heads, geometry().head_dim);
  const TokenRows<float> outs(out.data(), count, geometry().query_heads, geometry().head_dim);
  const Status status = entry.cache.attend_prompt(of_tokens, outs);
  expect(entry, status, expected);
  if (!status || count == 0) return;
  entry.model.ask_for_newest(count, seed);
  check_reads(entry);
  const std::size_t row = geometry().query_heads * geometry().head_dim;
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
  const std::vector<float> rows(4 * (shape.query_heads + 1) * (shape.head_dim + 1));
  std::vector<float> out(rows.size());
  const std::span<const float> flat(rows);
  const std::size_t kv = shape.kv_heads * shape.head_dim;
  const std::size_t q = shape.query_heads * shape.head_dim;
  const HeadRows<const float> right(rows.data(), shape.kv_heads, shape.head_dim);
  const TokenRows<const float> two(rows.data(), 2, shape.kv_heads, shape.head_dim);
  AnyCache& cache = entry.cache;
  const auto refuse = [&](Status status) { require(!status.ok(), "a wrong shape was taken"); };
  switch (seed % 8) {
    case 0: refuse(cache.append(flat.first(kv + 1), flat.first(kv))); break;
    case 1: refuse(cache.append(flat.first(kv), flat.first(kv - 1))); break;
    case 2: refuse(cache.append(right, HeadRows<const float>(rows.data(), shape.kv_heads + 1, shape.head_dim))); break;
    case 3: refuse(cache.append(HeadRows<const float>(rows.data(), shape.kv_heads, shape.head_dim + 1), right)); break;
    case 4: refuse(cache.append(two, TokenRows<const float>(rows.data(), 1, shape.kv_heads, shape.head_dim))); break;
    case 5: refuse(cache.append_prompt(flat.first(2 * kv), flat.first(kv))); break;
    case 6: refuse(cache.attend(flat.first(q), std::span(out).first(q + 1))); break;
    case 7:
      refuse(cache.append_draft(two, TokenRows<const float>(rows.data(), 2, shape.kv_heads, shape.head_dim + 1)));
      break;
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
      case Kind::prompt: status = twin.append_prompt(chunk(k, count), chunk(v, count)); break;
      case Kind::end_prompt: twin.end_prompt(); break;
      case Kind::append: status = twin.append(chunk(k, count), chunk(v, count)); break;
      case Kind::draft: status = twin.append_draft(chunk(k, count), chunk(v, count)); break;
      case Kind::query:
      case Kind::queries:
        q = queries_of(event.row, count);
        out.resize(q.size());
        if (event.kind == Kind::query) {
          status = twin.attend(std::span<const float>(q), std::span<float>(out));
        } else {
          status = twin.attend_prompt({q.data(), count, geometry().query_heads, geometry().head_dim},
                                      {out.data(), count, geometry().query_heads, geometry().head_dim});
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
    require(footprint_of(image).state == footprint_of(entry.image).state, what,
            " differs from a twin that only had what counts");
  };
  compare("the state");
  require(twin.drafts() == entry.cache.drafts(), "the twin has other drafts");
  const std::size_t oldest = entry.cache.oldest_reachable();
  require(entry.model.was_loaded ? oldest >= twin.oldest_reachable() : oldest == twin.oldest_reachable(),
          "oldest_reachable is ", oldest, ", the twin's ", twin.oldest_reachable());
  const NaiveSequence& model = entry.model;
  const bool may_ask =
      model.length() > 0 && (model.drafts == 0 || model.draft_queries <= entry.kind->config.max_speculative);
  if (!query_seed || !may_ask) return;
  const std::vector<float> q = queries_of(*query_seed, 1);
  std::vector<float> out(q.size()), lse(geometry().query_heads), out_of_twin(out), lse_of_twin(lse);
  expect(entry, entry.cache.attend(std::span(q), std::span(out), lse), Code::ok);
  require(twin.attend(std::span(q), std::span(out_of_twin), lse_of_twin).ok(), "the twin was refused a query");
  require(same_bits(out, out_of_twin) && same_bits(lse, lse_of_twin), "the twin answers otherwise");
  entry.model.ask(*query_seed);
  compare("the state after a query");
}

// --- promises -------------------------------------------------------------------------------------------------------

ModelWorld::Footprint ModelWorld::footprint_of(const detail::LayerImage& image) {
  Footprint footprint;
  detail::LayerImage without_peaks = image;
  std::size_t none = 0;
  without_peaks.peak_resident_tokens = without_peaks.peak_resident_pages = without_peaks.evicted_shared_pages = &none;
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
  require(table.size() <= most, table.size(), " pages are resident; ", most, " may be");
  require(kind.trims || table.size() == most, table.size(), " pages are resident; ", most, " fit");
  require(!kind.evicts || !model.prompt_ended || pinned + kind.decode_pages() <= budget, pinned,
          " pinned pages leave no room to decode in ", budget);
  require(*entry.image.heads[head].evictions == opened - table.size(), *entry.image.heads[head].evictions,
          " evictions of ", opened, " pages left ", table.size());
}

void ModelWorld::check_rows(const Entry& entry, std::size_t head) const {
  const PageTable& table = *entry.image.heads[head].table;
  const std::size_t head_dim = geometry().head_dim;
  std::vector<float> row(head_dim), lowest(head_dim), highest(head_dim), sum(head_dim);
  const auto check = [&](const auto& pool) {
    const auto& [rows, summaries] = pool.memory();
    using Summary = std::remove_cvref_t<decltype(*summaries.min({0}))>;
    for (std::uint32_t i = 0; i < table.size(); ++i) {
      const ResidentPage& page = table[{i}];
      for (std::uint32_t slot = 0; slot < page.tokens; ++slot) {
        const std::size_t position = index_of(page.first_position) + slot;
        const auto expected = [&](std::span<const float> of_model, const char* what) {
          require(std::equal(row.begin(), row.end(), of_model.begin()), "the ", what, " at position ", position,
                  " is not what came");
        };
        load_row(rows.key_row(page.page, {slot}), row);
        expected(stock_.stored_key(entry.model.rows[position], head), "key");
        for (std::size_t d = 0; d < head_dim; ++d) {
          lowest[d] = slot == 0 ? row[d] : std::min(lowest[d], row[d]);
          highest[d] = slot == 0 ? row[d] : std::max(highest[d], row[d]);
          sum[d] = (slot == 0 ? 0.0F : sum[d]) + row[d];
        }
        load_row(rows.value_row(page.page, {slot}), row);
        expected(stock_.stored_value(entry.model.rows[position], head), "value");
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
  std::size_t pages = 0;
  std::size_t shared = 0;
  std::size_t evicted = 0;
  for (const detail::HeadImage& head : entry.image.heads) {
    most_tokens = std::max(most_tokens, head.table->resident_tokens());
    pages += head.table->size();
    evicted += entry.model.length() - head.table->resident_tokens();
    for (std::uint32_t i = 0; i < head.table->size(); ++i) {
      shared += entry.image.pages.is_shared(entry.image.pages.store, (*head.table)[{i}].page) ? 1 : 0;
    }
  }
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
    const bool reads_all = !kind.selects || (!kind.selects_always && entry.image.heads[h].table->size() <= read_pages);
    require(!reads_all || read.size() == visible, "a query read ", read.size(), " of ", visible, " tokens");
    require(reads_all || kind.selects_always || read.size() <= kind.config.read_budget_tokens, "a query read ",
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

void ModelWorld::check_output(const Entry& entry, std::size_t row, std::size_t end,
                              const std::vector<std::int64_t>& read, std::size_t head, std::span<const float> out,
                              const float* lse) const {
  const CacheConfig& config = entry.kind->config;
  const std::size_t head_dim = geometry().head_dim;
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
      return stock_.stored_key(entry.model.rows[static_cast<std::size_t>(read[i])], head);
    };
    const auto value = [&](std::size_t i) {
      return stock_.stored_value(entry.model.rows[static_cast<std::size_t>(read[i])], head);
    };
    const ExactAttention exact = exact_attention(
        query, read.size(), key, value, [&](std::size_t i) { return read[i]; }, logits, head_dim);
    // The rounding error of a logit grows with the products that are summed.
    double products = 0;
    double largest = 1;
    for (std::size_t i = 0; i < read.size(); ++i) {
      double sum = 0;
      for (std::size_t d = 0; d < head_dim; ++d) {
        sum += std::abs(static_cast<double>(query[d]) * static_cast<double>(key(i)[d]));
        largest = std::max(largest, std::abs(static_cast<double>(value(i)[d])));
      }
      products = std::max(products, sum * logits.scale);
    }
    const double tolerance = 2e-6 * (4 + products + static_cast<double>(read.size()));
    for (std::size_t d = 0; d < head_dim; ++d) {
      const auto got = static_cast<double>(out[query_head * head_dim + d]);
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
TokenRows<const float> ModelWorld::chunk(const std::vector<float>& rows, std::size_t count) const {
  return {rows.data(), count, geometry().kv_heads, geometry().head_dim};
}
std::size_t ModelWorld::free_pages() const {
  return std::visit([](const auto& pool) { return pool.free_pages(); }, pool_);
}

}  // namespace kvsparse_test
