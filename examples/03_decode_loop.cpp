// SPDX-License-Identifier: Apache-2.0
// examples/minimal_engine.cpp over kvsparse: RaaS in a budget of tokens, halves instead of floats, a prompt in one
// chunk, two threads. What had to change for it is
//
//     diff examples/minimal_engine.cpp examples/03_decode_loop.cpp
//
// 03_decode_loop [TOKENS [BUDGET]]
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <kvsparse/cache/sequence_cache.hpp>
#include <kvsparse/interop/thread_team.hpp>
#include <kvsparse/kvsparse.hpp>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;  // [tokens, features]

constexpr std::size_t layers = 4, query_heads = 8, kv_heads = 2, head_dim = 32, vocabulary = 512;
constexpr std::size_t hidden = query_heads * head_dim, inner = 2 * hidden;

using Cache = kvsparse::PagedKvCache<kvsparse::Raas, kvsparse::Half>;  // of one layer

void check(kvsparse::Status status) {
  if (!status) throw std::runtime_error(status.message());
}

/// Rows as the library takes them: [tokens, heads, head_dim].
auto rows_of(const Matrix& x) {
  const auto tokens = static_cast<std::size_t>(x.rows()), heads = static_cast<std::size_t>(x.cols()) / head_dim;
  return kvsparse::TokenRows<const float>(x.data(), tokens, heads, head_dim);
}

/// Rotary positions, written into queries and keys before anybody caches them.
void rotate(Matrix& rows, std::size_t first_position) {
  for (Eigen::Index row = 0; row < rows.rows(); ++row) {
    const auto position = static_cast<double>(first_position) + static_cast<double>(row);
    for (std::size_t at = 0; at < static_cast<std::size_t>(rows.cols()); at += head_dim) {
      for (std::size_t i = 0; i < head_dim / 2; ++i) {
        const double angle = position * std::pow(10000.0, -2.0 * static_cast<double>(i) / head_dim);
        float& a = rows(row, static_cast<Eigen::Index>(at + i));
        float& b = rows(row, static_cast<Eigen::Index>(at + i + head_dim / 2));
        const auto cosine = static_cast<float>(std::cos(angle)), sine = static_cast<float>(std::sin(angle));
        const float turned = a * cosine - b * sine;
        b = a * sine + b * cosine;
        a = turned;
      }
    }
  }
}

Matrix normed(const Matrix& x) {
  return (x.array().colwise() / (x.array().square().rowwise().mean() + 1e-5F).sqrt()).matrix();
}

class Engine {
 public:
  explicit Engine(std::size_t budget_tokens)
      : caches_(std::vector<kvsparse::CacheConfig>(layers, {.query_heads = query_heads,
                                                            .kv_heads = kv_heads,
                                                            .head_dim = head_dim,
                                                            .budget_tokens = budget_tokens}),
                kvsparse::Raas{}) {
    std::mt19937 random(1);
    const auto noise = [&](std::size_t rows, std::size_t columns) -> Matrix {
      std::uniform_real_distribution<float> uniform(-1, 1);
      const float size = 3 / std::sqrt(static_cast<float>(rows));
      return Matrix::NullaryExpr(static_cast<Eigen::Index>(rows), static_cast<Eigen::Index>(columns),
                                 [&] { return uniform(random) * size; });
    };
    embedding_ = noise(vocabulary, hidden);
    head_ = noise(hidden, vocabulary);
    for (std::size_t i = 0; i < layers; ++i) {
      weights_.push_back({noise(hidden, hidden), noise(hidden, kv_heads * head_dim), noise(hidden, kv_heads * head_dim),
                          noise(hidden, hidden), noise(hidden, inner), noise(inner, hidden)});
    }
  }

  /// Takes in the next tokens of the sequence, a whole prompt or one; returns the most likely token behind them.
  int forward(std::span<const int> tokens) {
    Matrix x(static_cast<Eigen::Index>(tokens.size()), static_cast<Eigen::Index>(hidden));
    for (std::size_t i = 0; i < tokens.size(); ++i) x.row(static_cast<Eigen::Index>(i)) = embedding_.row(tokens[i]);
    for (std::size_t i = 0; i < layers; ++i) {
      const Weights& layer = weights_[i];
      const Matrix in = normed(x);
      Matrix q = in * layer.q, k = in * layer.k;
      const Matrix v = in * layer.v;
      rotate(q, next_position_);
      rotate(k, next_position_);
      Matrix attended(q.rows(), q.cols());
      const kvsparse::TokenRows<float> out(attended.data(), tokens.size(), query_heads, head_dim);
      if (tokens.size() > 1) {
        check(caches_.append_prompt(i, rows_of(k), rows_of(v)));
        check(caches_.attend_prompt(i, rows_of(q), out, threads_));
      } else {
        check(caches_.append(i, rows_of(k).token(0), rows_of(v).token(0)));
        check(caches_.attend(i, rows_of(q).token(0), out.token(0), std::span<float>(), threads_));
      }
      x += attended * layer.o;
      x += (normed(x) * layer.up).cwiseMax(0.0F) * layer.down;
    }
    next_position_ += tokens.size();
    Eigen::Index likeliest = 0;
    (normed(x.bottomRows(1)) * head_).row(0).maxCoeff(&likeliest);
    return static_cast<int>(likeliest);
  }

  std::size_t cache_bytes() const { return caches_.stats().peak_resident_bytes; }

 private:
  struct Weights {
    Matrix q, k, v, o, up, down;
  };

  Matrix embedding_, head_;
  std::vector<Weights> weights_;
  kvsparse::SequenceCache<Cache> caches_;
  kvsparse::ThreadTeam threads_{2};
  std::size_t next_position_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  const std::size_t decoded = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 200;
  const std::size_t budget = count > 2 ? std::strtoul(arguments[2], nullptr, 10) : 128;
  Engine engine(budget);

  std::vector<int> tokens;
  for (int i = 0; i < 48; ++i) tokens.push_back(i * i % static_cast<int>(vocabulary));
  tokens.push_back(engine.forward(tokens));  // prefill
  for (std::size_t step = 1; step < decoded; ++step) tokens.push_back(engine.forward(std::span(&tokens.back(), 1)));

  for (const int token : std::span(tokens).last(std::min<std::size_t>(decoded, 16))) std::printf("%d ", token);
  std::printf("\n%zu tokens, %zu KiB of keys and values\n", tokens.size(), engine.cache_bytes() / 1024);
  return 0;
}
