// SPDX-License-Identifier: Apache-2.0
// LemmaChain: numbered lemmas, each citing an earlier one, that a small model can be trained to write out. The prompt
// lists what every line cites; the answer derives a digit per line. Each line needs its own entry of the prompt (read
// once, long after prefill: a phoenix), the cited lemma's definition (a milestone) and the value of the line before.
// One lost read breaks the rest of the chain.
//
//   plain   <bos> (g d){6} (S_n SRC_n){N} S_o d_o ;     step S_n : use SRC is v_src , get S_n v_n ;
//   varied  the same, and S_{N+1} <eos> before S_o;     an odd v_n adds ", check v_n" before the line's ";", and the
//                                                       chain ends with "step S_{N+1} : use <eos>"
//   long    <bos> (G_g T_g d){6} H_o T_o d_o ;          H_n T_n use SRC is v_src get H_n T_n v_n ;
//
// v_n = (v_{n-1} + v_src) mod 10, v_0 = d_o. Labels count up from a random offset o. SRC is a given, or lemma i <= n-2.
// A long chain's labels and givens are two words each, and its prompt lists no sources, because the list would grow
// with the chain: the two words of SRC are fed to the model instead of decoded, as a user's or a tool's turn would be.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace kvsparse_tools {

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the same numbers from the same seed on every machine.
class FixedRandom {
 public:
  explicit FixedRandom(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    state_ += 0x9E3779B97F4A7C15ULL;
    return mixed(state_);
  }

  /// Uniform over 0 .. limit-1; limit >= 1. Rejects the remainder, so that no value is favoured.
  std::size_t below(std::size_t limit) {
    const std::uint64_t whole = UINT64_MAX - UINT64_MAX % limit;
    std::uint64_t value = next();
    while (value >= whole) value = next();
    return static_cast<std::size_t>(value % limit);
  }

  bool chance(double probability) { return static_cast<double>(next() >> 11) * 0x1p-53 < probability; }

  /// A seed for the `index`-th of many independent streams.
  static std::uint64_t stream(std::uint64_t seed, std::uint64_t index) {
    return mixed(seed ^ mixed(index + 0x632BE59BD9B4E019ULL));
  }

 private:
  static std::uint64_t mixed(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
    return z ^ (z >> 31);
  }

  std::uint64_t state_;
};

/// What a line may cite.
struct SourceRule {
  enum class Kind {
    fall,  // a lemma becomes a milestone with `milestone_share`, dies after Geom(1/life) lines or `max_gap` idle ones
    mile,  // the same without the idle bound
    lru,   // depth k of a stack ordered by recency of use, P(k) ~ 1/k, k <= 16
    age,   // any of the last 24 lines
    uniform,  // any earlier lemma: nothing ever fades
  };
  Kind kind = Kind::fall;
  double milestone_share = 0.3;
  double life = 24;
  std::size_t max_gap = 6;  // lines; 0: no bound

  /// "fall", "fall:gmax=4,life=12", "mile", "lru", "age", "uniform". Throws std::invalid_argument.
  static SourceRule parse(std::string_view text);
};

enum class LineFormat { plain, varied, long_labels };
inline constexpr std::string_view line_format_names[] = {"plain", "varied", "long"};

inline std::string_view line_format_name(LineFormat format) {
  return line_format_names[static_cast<std::size_t>(format)];
}

/// Throws std::invalid_argument.
inline LineFormat parse_line_format(std::string_view text) {
  for (std::size_t i = 0; i < std::size(line_format_names); ++i) {
    if (line_format_names[i] == text) return static_cast<LineFormat>(i);
  }
  throw std::invalid_argument("line format '" + std::string(text) + "' is not plain, varied or long");
}

namespace lemma_chain {

using Words = std::vector<std::string>;

inline constexpr std::size_t givens = 16, givens_per_problem = 6;
inline constexpr double given_share = 0.15;
inline constexpr std::size_t plain_labels = 64;
// Of long labels. So few tails that even a short chain has lemmas that differ in one of their two words alone: a model
// that learns on short chains would otherwise look for that word only.
inline constexpr std::size_t heads_of_labels = 64, tails_of_labels = 6;

/// How many labels a format has; a problem has fewer lines than that, so that no label means two lemmas.
inline std::size_t label_count(LineFormat format) {
  return format == LineFormat::long_labels ? heads_of_labels * tails_of_labels : plain_labels;
}

inline std::string numbered(const char* name, std::size_t number) {
  std::string word(name);
  word += std::to_string(number);
  return word;
}

/// The vocabulary of a format in the order of its ids.
inline Words vocabulary(LineFormat format) {
  Words words{"<bos>"};
  if (format == LineFormat::long_labels) {
    for (std::size_t i = 0; i < heads_of_labels; ++i) words.push_back(numbered("H", i));
    for (std::size_t i = 0; i < tails_of_labels; ++i) words.push_back(numbered("T", i));
    for (std::size_t i = 0; i * tails_of_labels < givens; ++i) words.push_back(numbered("G", i));
  } else {
    for (std::size_t i = 0; i < plain_labels; ++i) words.push_back(numbered("S", i));
    for (std::size_t i = 0; i < givens; ++i) words.push_back(numbered("g", i));
  }
  for (std::size_t i = 0; i < 10; ++i) words.push_back(std::to_string(i));
  for (const char* word : {"step", ":", "use", "is", ",", "get", ";", "<eos>", "check"}) words.emplace_back(word);
  return words;
}

}  // namespace lemma_chain

/// One problem and its solution.
struct LemmaChain {
  /// A line of the solution. Positions are in words of the whole sequence, prompt included.
  struct Line {
    std::size_t begin, end;                        // [begin, end)
    std::size_t source;                            // the line cited, counted from 1; 0 is a given
    std::vector<std::size_t> informative;          // the words that cannot be guessed from the line so far
    std::vector<std::size_t> fed;                  // the words that the model is given instead of decoding them
    std::size_t definition_begin, definition_end;  // where this lemma's value can be read later
  };

  lemma_chain::Words prompt, chain;
  std::string answer;
  std::vector<Line> lines;
};

namespace lemma_chain {

/// Draws the line that line `n` cites, n = 1, 2, ...; 0 stands for "no lemma to cite: a given".
class Sources {
 public:
  Sources(const SourceRule& rule, FixedRandom& random) : rule_(rule), random_(random) {}

  std::size_t draw(std::size_t n) {
    switch (rule_.kind) {
      case SourceRule::Kind::fall:
      case SourceRule::Kind::mile: return draw_milestone(n);
      case SourceRule::Kind::lru: return draw_by_recency(n);
      case SourceRule::Kind::age: return draw_between(n > 24 ? n - 24 : 1, n);
      case SourceRule::Kind::uniform: return draw_between(1, n);
    }
    throw std::logic_error("unknown source rule");
  }

 private:
  struct Milestone {
    std::size_t line, last_used, dies_after;
  };

  std::size_t draw_milestone(std::size_t n) {
    if (n > 2 && random_.chance(rule_.milestone_share)) {
      std::size_t lifetime = 1;
      while (!random_.chance(1 / rule_.life)) ++lifetime;
      live_.push_back({n - 2, n - 2, n + lifetime});
    }
    std::erase_if(live_, [&](const Milestone& m) {
      return n > m.dies_after || (rule_.max_gap != 0 && n - m.last_used > rule_.max_gap);
    });
    if (random_.chance(given_share) || live_.empty()) return 0;
    Milestone& chosen = live_[random_.below(live_.size())];
    chosen.last_used = n;
    return chosen.line;
  }

  std::size_t draw_by_recency(std::size_t n) {
    if (n > 2) stack_.push_back(n - 2);
    if (random_.chance(given_share) || stack_.empty()) return 0;
    const std::size_t depths = std::min<std::size_t>(stack_.size(), 16);
    double left = 0;
    for (std::size_t k = 1; k <= depths; ++k) left += 1.0 / static_cast<double>(k);
    left *= static_cast<double>(random_.below(std::size_t{1} << 32)) * 0x1p-32;
    std::size_t depth = 1;
    while (depth < depths && left >= 1.0 / static_cast<double>(depth)) left -= 1.0 / static_cast<double>(depth++);
    const auto chosen = stack_.end() - static_cast<std::ptrdiff_t>(depth);
    const std::size_t line = *chosen;
    stack_.erase(chosen);
    stack_.push_back(line);
    return line;
  }

  /// Lines first .. n-2.
  std::size_t draw_between(std::size_t first, std::size_t n) {
    if (random_.chance(given_share) || n < first + 2) return 0;
    return first + random_.below(n - 1 - first);
  }

  SourceRule rule_;
  FixedRandom& random_;
  std::vector<Milestone> live_;
  std::vector<std::size_t> stack_;  // most recently used last
};

inline Words label_words(LineFormat format, std::size_t label) {
  if (format != LineFormat::long_labels) return {numbered("S", label)};
  return {numbered("H", label / tails_of_labels), numbered("T", label % tails_of_labels)};
}

inline Words given_words(LineFormat format, std::size_t given) {
  if (format != LineFormat::long_labels) return {numbered("g", given)};
  return {numbered("G", given / tails_of_labels), numbered("T", given % tails_of_labels)};
}

inline void append(Words& words, std::span<const std::string> more) {
  words.insert(words.end(), more.begin(), more.end());
}

}  // namespace lemma_chain

/// Problem `index` of the set that `seed` names. Throws std::invalid_argument for a number of lines that the format's
/// labels do not reach.
inline LemmaChain make_lemma_chain(const SourceRule& rule, LineFormat format, std::size_t lines, std::uint64_t seed,
                                   std::uint64_t index) {
  using namespace lemma_chain;
  const std::size_t labels = label_count(format);
  if (lines == 0 || lines + 2 > labels) {
    throw std::invalid_argument("a chain of " + std::to_string(lines) + " lines was asked for, this format has 1 to " +
                                std::to_string(labels - 2));
  }
  FixedRandom random(FixedRandom::stream(seed, index));
  LemmaChain problem;

  // Givens: six of the sixteen, each with a digit.
  std::vector<std::size_t> names(givens);
  for (std::size_t i = 0; i < givens; ++i) names[i] = i;
  std::vector<std::size_t> digits;
  for (std::size_t i = 0; i < givens_per_problem; ++i) {
    std::swap(names[i], names[i + random.below(givens - i)]);
    digits.push_back(random.below(10));
  }
  const std::size_t offset = random.below(labels);
  const auto label_of = [&](std::size_t line) { return label_words(format, (offset + line) % labels); };

  problem.prompt = {"<bos>"};
  for (std::size_t i = 0; i < givens_per_problem; ++i) {
    append(problem.prompt, given_words(format, names[i]));
    problem.prompt.push_back(std::to_string(digits[i]));
  }

  std::vector<std::size_t> cited{0}, values{random.below(10)};
  std::vector<Words> source_words{{}};
  Sources sources(rule, random);
  for (std::size_t n = 1; n <= lines; ++n) {
    const std::size_t source = sources.draw(n);
    std::size_t value = 0;
    if (source == 0) {
      const std::size_t given = random.below(givens_per_problem);
      value = digits[given];
      source_words.push_back(given_words(format, names[given]));
    } else {
      value = values[source];
      source_words.push_back(label_of(source));
    }
    cited.push_back(source);
    values.push_back((values.back() + value) % 10);
    if (format != LineFormat::long_labels) {
      append(problem.prompt, label_of(n));
      append(problem.prompt, source_words.back());
    }
  }
  if (format == LineFormat::varied) {
    append(problem.prompt, label_of(lines + 1));
    problem.prompt.emplace_back("<eos>");
  }
  append(problem.prompt, label_of(0));
  problem.prompt.push_back(std::to_string(values[0]));
  problem.prompt.emplace_back(";");

  Words& chain = problem.chain;
  const bool plain_words = format != LineFormat::long_labels;
  for (std::size_t n = 1; n <= lines; ++n) {
    const auto position = [&] { return problem.prompt.size() + chain.size(); };
    const std::string value = std::to_string(values[n]);
    const std::string source_value = std::to_string((values[n] + 10 - values[n - 1]) % 10);
    LemmaChain::Line line{position(), 0, cited[n], {}, {}, 0, 0};
    if (plain_words) chain.emplace_back("step");
    append(chain, label_of(n));
    if (plain_words) chain.emplace_back(":");
    chain.emplace_back("use");
    for (const std::string& word : source_words[n]) {
      (plain_words ? line.informative : line.fed).push_back(position());
      chain.push_back(word);
    }
    chain.emplace_back("is");
    line.informative.push_back(position());
    chain.push_back(source_value);
    if (plain_words) chain.emplace_back(",");
    line.definition_begin = position();
    chain.emplace_back("get");
    append(chain, label_of(n));
    line.informative.push_back(position());
    chain.push_back(value);
    if (format == LineFormat::varied) line.informative.push_back(position());  // "," or ";"
    if (format == LineFormat::varied && values[n] % 2 == 1) {
      chain.insert(chain.end(), {",", "check"});
      line.informative.push_back(position());
      chain.push_back(value);
    }
    chain.emplace_back(";");
    line.definition_end = line.end = position();
    problem.lines.push_back(std::move(line));
  }
  if (format == LineFormat::varied) {
    chain.emplace_back("step");
    append(chain, label_of(lines + 1));
    chain.insert(chain.end(), {":", "use", "<eos>"});
  }
  problem.answer = std::to_string(values[lines]);
  return problem;
}

inline SourceRule SourceRule::parse(std::string_view text) {
  const auto fail = [&](const std::string& why) {
    throw std::invalid_argument("source rule '" + std::string(text) + "' " + why);
  };
  const std::size_t colon = std::min(text.find(':'), text.size());
  const std::string_view name = text.substr(0, colon);
  SourceRule rule;
  if (name == "mile") {
    rule = {Kind::mile, 0.35, 16, 0};
  } else if (name == "lru") {
    rule.kind = Kind::lru;
  } else if (name == "age") {
    rule.kind = Kind::age;
  } else if (name == "uniform") {
    rule.kind = Kind::uniform;
  } else if (name != "fall") {
    fail("is not fall, mile, lru, age or uniform");
  }
  for (std::size_t begin = colon + 1; begin < text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string setting(text.substr(begin, end - begin));
    const bool is_fall = rule.kind == Kind::fall;
    const std::size_t equals = std::min(setting.find('='), setting.size());
    const std::string key = setting.substr(0, equals), digits = setting.substr(std::min(equals + 1, setting.size()));
    if (!is_fall || (key != "gmax" && key != "life")) fail("has a setting other than fall's gmax=LINES and life=LINES");
    if (digits.empty() || digits.size() > 4 || digits.find_first_not_of("0123456789") != std::string::npos ||
        std::stoul(digits) == 0) {
      fail("needs whole numbers from 1 to 9999");
    }
    if (key == "gmax") {
      rule.max_gap = std::stoul(digits);
    } else {
      rule.life = std::stod(digits);
    }
    begin = end + 1;
  }
  return rule;
}

}  // namespace kvsparse_tools
