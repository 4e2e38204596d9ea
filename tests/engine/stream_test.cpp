// SPDX-License-Identifier: Apache-2.0
//
// A stream through the trained model of examples/model, a hundred times as long as the 1024 tokens it was trained on.
// With StreamingLlm's in-cache positions it foresees the last words as well as the first; with everything kept, at true
// positions, it is lost after a few thousand.
#include <gtest/gtest.h>

#include <cctype>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/decoder.hpp"
#include "engine/generate.hpp"
#include "engine/tokenizer.hpp"

namespace kvsparse_test {
namespace {

using namespace kvsparse_tools;

/// A problem of the model's task: lemmas, and the chain of steps that solves them.
struct Problem {
  std::vector<TokenId> lemmas, chain;
  std::size_t size() const { return lemmas.size() + chain.size(); }
};

/// The model and the fresh problems beside it.
struct Subject {
  explicit Subject(const std::filesystem::path& directory)
      : model(directory), tokenizer(directory, model.config().vocab_size) {
    std::ifstream file(directory / "problems.jsonl");
    for (std::string line; std::getline(file, line);) {
      const auto json = nlohmann::json::parse(line);
      problems.push_back({tokenizer.encode(json.at("prompt").get<std::string>()).ids,
                          tokenizer.encode(json.at("chain").get<std::string>()).ids});
    }
  }
  /// Names of lemmas and of facts, digits, or the very word: what may stand in a place of a step.
  char kind_of(TokenId token) const {
    const std::string word = tokenizer.text_of(token, true);
    if (word.size() > 1 && (word[0] == 'S' || word[0] == 'g') && std::isdigit(word[1]) != 0) return 'S';
    return std::isdigit(word[0]) != 0 ? '0' : static_cast<char>(token);
  }

  Model model;
  Tokenizer tokenizer;
  std::vector<Problem> problems;
};
Subject& subject() {
  static Subject the_subject(KVSPARSE_MODEL_DIRECTORY);
  return the_subject;
}

/// How well the words of chains were foreseen.
struct Score {
  std::size_t words = 0, of_right_kind = 0;
  double surprise = 0.0;  // summed negative log-likelihood
  bool finite = true;
  double perplexity() const { return std::exp(surprise / static_cast<double>(words)); }
  double right_kind() const { return static_cast<double>(of_right_kind) / static_cast<double>(words); }

  void judge(const Vector& logits, TokenId word) {
    finite = finite && logits.allFinite();
    const double largest = static_cast<double>(logits.maxCoeff());
    double sum = 0.0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
    surprise += largest + std::log(sum) - static_cast<double>(logits[static_cast<Eigen::Index>(word)]);
    of_right_kind += subject().kind_of(greedy_choice(logits)) == subject().kind_of(word) ? 1 : 0;
    ++words;
  }
};

/// Sinks and a window of half the length that the model was trained on.
CacheChoice streaming() {
  CacheChoice choice;
  choice.policy = "streaming_llm";
  choice.budget_tokens = 512;
  choice.settings.options = {{"in_cache_positions", "true"}};
  return choice;
}

void read(Decoder& decoder, const Problem& problem, Score& score) {
  for (const TokenId token : problem.lemmas) decoder.feed(token);
  for (const TokenId token : problem.chain) {
    score.judge(decoder.logits(), token);
    decoder.feed(token);
  }
}

/// Each problem by itself: what the model can do with this cache within the length it was trained on.
Score score_alone(const CacheChoice& choice) {
  Score score;
  for (const Problem& problem : subject().problems) {
    Decoder decoder(subject().model, choice, problem.size());
    read(decoder, problem, score);
  }
  return score;
}

TEST(Stream, OfAHundredThousandTokensIsUnderstoodToItsEnd) {
  const Score alone = score_alone(streaming());
  Decoder decoder(subject().model, streaming(), 0);
  std::vector<Score> passes;  // all problems one behind the other, again and again
  while (decoder.position() < 100000) {
    Score& score = passes.emplace_back();
    for (const Problem& problem : subject().problems) read(decoder, problem, score);
    ASSERT_TRUE(score.finite) << "before token " << decoder.position();
  }
  ASSERT_GT(passes.size(), 1U);
  for (const Score& score : passes) {
    EXPECT_LT(score.perplexity(), 1.02 * passes.front().perplexity()) << "the length tells";
    EXPECT_LT(score.perplexity(), 1.2 * alone.perplexity()) << "more than an older problem in the window explains";
    EXPECT_GT(score.right_kind(), 0.99) << "this is not the language any more";
  }
  for (const kvsparse::AnyCache& cache : decoder.caches()) EXPECT_LE(cache.stats().peak_resident_tokens, 512U);
}

TEST(Stream, ThatIsKeptWholeAtTruePositionsIsNot) {
  const double alone = score_alone({}).perplexity();
  Decoder decoder(subject().model, {}, 8000);
  Score score;
  for (std::size_t next = 0; decoder.position() < 5000; ++next) {
    score = {};
    read(decoder, subject().problems[next], score);
  }
  EXPECT_LT(alone, 1.01);
  EXPECT_GT(score.perplexity(), 2.0 * alone)
      << "the length does not matter to this model, and the test above says nothing";
}

}  // namespace
}  // namespace kvsparse_test
