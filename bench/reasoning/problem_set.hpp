// SPDX-License-Identifier: Apache-2.0
// LemmaChain problems as token ids, and the check that a model reads these ids as its trainer wrote them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/policy_settings.hpp"
#include "engine/generate.hpp"
#include "engine/tokenizer.hpp"
#include "lemma_chain.hpp"

namespace kvsparse_tools {

struct Problem {
  LemmaChain text;
  std::vector<TokenId> prompt, chain;
  std::vector<FedToken> fed;  // the tokens of `chain` that are given instead of decoded
};

class ProblemSet {
 public:
  ProblemSet(const std::string& rule, LineFormat format, std::size_t lines, std::uint64_t seed, std::size_t count) {
    std::map<std::string, TokenId> ids;
    for (const std::string& word : lemma_chain::vocabulary(format)) {
      ids.emplace(word, static_cast<TokenId>(ids.size()));
    }
    const SourceRule source_rule = SourceRule::parse(rule);
    for (std::size_t i = 0; i < count; ++i) {
      Problem problem{make_lemma_chain(source_rule, format, lines, seed, i), {}, {}, {}};
      for (const std::string& word : problem.text.prompt) problem.prompt.push_back(ids_[word] = ids.at(word));
      for (const std::string& word : problem.text.chain) problem.chain.push_back(ids_[word] = ids.at(word));
      for (const LemmaChain::Line& line : problem.text.lines) {
        for (const std::size_t position : line.fed) {
          const std::size_t index = position - problem.prompt.size();
          problem.fed.push_back({index, problem.chain[index]});
        }
      }
      problems_.push_back(std::move(problem));
    }
  }

  const std::vector<Problem>& problems() const { return problems_; }

  /// Every word that occurs must have its id; a tokenizer may know more words. Throws UsageError.
  void check_vocabulary(const Tokenizer& tokenizer) const {
    const std::string file = tokenizer.file().string();
    for (const auto& [word, id] : ids_) {
      const auto known = tokenizer.id_of(word);
      if (!known)
        throw UsageError(file + ": lacks the word " + in_quotes(word) + ", which problems of this --format hold");
      if (*known != id) {
        throw UsageError(file + ": the word " + in_quotes(word) + " has the id " + std::to_string(*known) +
                         ", problems of this --format have " + std::to_string(id));
      }
    }
  }

 private:
  std::vector<Problem> problems_;
  std::map<std::string, TokenId> ids_;  // of the words that occur
};

}  // namespace kvsparse_tools
