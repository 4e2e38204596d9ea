// SPDX-License-Identifier: Apache-2.0
// An engine as small as one can be: a Llama-like decoder that keeps every key and value in two arrays a layer, and
// reads them all at each step. Its weights are noise, and so is what it says. examples/03_decode_loop.cpp is the same
// engine over kvsparse; what had to change is
//
//     diff examples/minimal_engine.cpp examples/03_decode_loop.cpp
//
// minimal_engine [TOKENS]
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <span>
#include <vector>

namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;  // [tokens, features]

constexpr std::size_t layers = 4, query_heads = 8, kv_heads = 2, head_dim = 32, vocabulary = 512;
constexpr std::size_t hidden = query_heads * head_dim, inner = 2 * hidden;

/// One layer's keys and values, [tokens, kv_heads, head_dim] each.
struct KvCache {
  std::vector<float> k, v;

  void append(const Matrix& keys, const Matrix& values) {
    k.insert(k.end(), keys.data(), keys.data() + keys.size());
    v.insert(v.end(), values.data(), values.data() + values.size());
  }
  std::size_t tokens() const { return k.size() / (kv_heads * head_dim); }
  std::size_t bytes() const { return (k.size() + v.size()) * sizeof(float); }
};

/// Softmax attention of the last q.rows() tokens, each to itself and all before it.
Matrix attend(const KvCache& cache, const Matrix& q) {
  Matrix out = Matrix::Zero(q.rows(), hidden);
  std::vector<float> weights(cache.tokens());
  for (Eigen::Index row = 0; row < q.rows(); ++row) {
    const std::size_t seen = cache.tokens() - static_cast<std::size_t>(q.rows() - 1 - row);
    for (std::size_t head = 0; head < query_heads; ++head) {
      const float* query = q.data() + static_cast<std::size_t>(row) * hidden + head * head_dim;
      const std::size_t of_head = head / (query_heads / kv_heads) * head_dim;
      const auto vector_at = [&](const std::vector<float>& rows, std::size_t token) {
        return Eigen::Map<const Eigen::VectorXf>(&rows[token * kv_heads * head_dim + of_head], head_dim);
      };
      float largest = -INFINITY, sum = 0;
      for (std::size_t t = 0; t < seen; ++t) {
        weights[t] = vector_at(cache.k, t).dot(Eigen::Map<const Eigen::VectorXf>(query, head_dim));
        weights[t] /= std::sqrt(static_cast<float>(head_dim));
        largest = std::max(largest, weights[t]);
      }
      for (std::size_t t = 0; t < seen; ++t) sum += weights[t] = std::exp(weights[t] - largest);
      Eigen::Map<Eigen::VectorXf> result(out.data() + static_cast<std::size_t>(row) * hidden + head * head_dim,
                                         head_dim);
      for (std::size_t t = 0; t < seen; ++t) result += weights[t] / sum * vector_at(cache.v, t);
    }
  }
  return out;
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
  Engine() {
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
      caches_[i].append(k, v);
      x += attend(caches_[i], q) * layer.o;
      x += (normed(x) * layer.up).cwiseMax(0.0F) * layer.down;
    }
    next_position_ += tokens.size();
    Eigen::Index likeliest = 0;
    (normed(x.bottomRows(1)) * head_).row(0).maxCoeff(&likeliest);
    return static_cast<int>(likeliest);
  }

  std::size_t cache_bytes() const {
    std::size_t bytes = 0;
    for (const KvCache& cache : caches_) bytes += cache.bytes();
    return bytes;
  }

 private:
  struct Weights {
    Matrix q, k, v, o, up, down;
  };

  Matrix embedding_, head_;
  std::vector<Weights> weights_;
  std::vector<KvCache> caches_ = std::vector<KvCache>(layers);
  std::size_t next_position_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  const std::size_t decoded = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 200;
  Engine engine;

  std::vector<int> tokens;
  for (int i = 0; i < 48; ++i) tokens.push_back(i * i % static_cast<int>(vocabulary));
  tokens.push_back(engine.forward(tokens));  // prefill
  for (std::size_t step = 1; step < decoded; ++step) tokens.push_back(engine.forward(std::span(&tokens.back(), 1)));

  for (const int token : std::span(tokens).last(std::min<std::size_t>(decoded, 16))) std::printf("%d ", token);
  std::printf("\n%zu tokens, %zu KiB of keys and values\n", tokens.size(), engine.cache_bytes() / 1024);
  return 0;
}
