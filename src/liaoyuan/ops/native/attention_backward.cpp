// Attention backward (Dao 2023, arXiv 2307.08691, sec. 3.1.2), one task for each document and key head.
//
// As in the forward pass, blocks are transposed ([keys, rows]) and the query heads that share a key head are rows
// of one matrix. For a strip of rows, and each block of keys before them:
//   P^T = exp(scale K Q^T - lse)      dS^T = P^T (V dO^T - delta) scale        delta = rowsum(dO * O)
//   dV += P^T dO      dK += dS^T Q      dQ^T += K^T dS^T (for several key blocks at once)
#include <algorithm>

#include "tiles.h"

namespace liaoyuan {

namespace {

constexpr int64_t STRIP = 512 / BLOCK;  // row blocks handled together
constexpr int64_t KEY_GROUP = 4;        // key blocks between two additions to dQ

template <class E>
struct BackwardWorkspace {
  using Word = typename E::Word;
  Word *key, *key_transposed, *value, *query, *query_transposed, *grad, *grad_transposed;  // packed operands
  Word *weights, *score_grad, *score_grad_group;                                            // one strip
  Word* left;                                                                               // one block
  float *scores, *weight_grad, *delta, *lse, *grad_key, *grad_value, *grad_query;
  BackwardWorkspace(const Packing<E>& packing, int64_t keys) {
    int64_t all = packing.words(keys), strip = STRIP * packing.words(BLOCK), square = BLOCK * BLOCK;
    int64_t words = 3 * all + 4 * strip + (2 + KEY_GROUP) * STRIP * square + packing.words(BLOCK);
    Word* word = static_cast<Word*>(scratch(0, size_t(words) * sizeof(Word)));
    auto take = [](auto*& from, int64_t count) { return (from += count) - count; };
    key = take(word, all), key_transposed = take(word, all), value = take(word, all);
    query = take(word, strip), query_transposed = take(word, strip);
    grad = take(word, strip), grad_transposed = take(word, strip);
    weights = take(word, STRIP * square), score_grad = take(word, STRIP * square);
    score_grad_group = take(word, KEY_GROUP * STRIP * square);
    left = take(word, packing.words(BLOCK));
    float* real = static_cast<float*>(
        scratch(1, size_t(2 * square + 2 * STRIP * BLOCK + 2 * all + strip) * sizeof(float)));
    scores = take(real, square), weight_grad = take(real, square);
    delta = take(real, STRIP * BLOCK), lse = take(real, STRIP * BLOCK);
    grad_key = take(real, all), grad_value = take(real, all), grad_query = take(real, strip);
  }
};

template <class E, class T>
struct Backward {
  const T *query, *key, *value, *out, *grad;
  const float* log_sum_exp;
  T *grad_query, *grad_key, *grad_value;
  int64_t tokens, query_stride, key_stride, groups, length;
  float scale;
  Packing<E> packing;

  int64_t offset(int64_t row) const { return row / groups * query_stride + row % groups * packing.dim; }

  void run() {
    BackwardWorkspace<E> work(packing, length);
    int64_t key_blocks = (length + BLOCK - 1) / BLOCK, row_blocks = (length * groups + BLOCK - 1) / BLOCK;
    E::begin();
    pack_keys(work, key_blocks);
    std::fill_n(work.grad_key, packing.words(length), 0.0f);
    std::fill_n(work.grad_value, packing.words(length), 0.0f);
    for (int64_t first = 0; first < row_blocks; first += STRIP)
      strip(work, first, std::min(row_blocks, first + STRIP), key_blocks);
    E::end();
    write_rows(work.grad_key, grad_key);
    write_rows(work.grad_value, grad_value);
  }

  void pack_keys(BackwardWorkspace<E>& work, int64_t key_blocks) {
    for (int64_t b = 0; b < key_blocks; ++b) {
      int64_t j = b * BLOCK, at = packing.words(j);
      auto row_of = [&](const T* base) {
        return [=, this](int i) { return j + i < length ? base + (j + i) * key_stride : nullptr; };
      };
      packing.left(row_of(key), work.key + at);
      packing.left_transposed(work.key + at, work.key_transposed + at);
      packing.left(row_of(value), work.value + at);
    }
  }

  // Pack the rows of a strip; delta and lse of rows past the end make their weights zero.
  void pack_strip(BackwardWorkspace<E>& work, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      int64_t row = b * BLOCK, at = packing.words((b - first) * BLOCK), end = length * groups;
      auto row_of = [&](const T* base) {
        return [=, this](int i) { return row + i < end ? base + offset(row + i) : nullptr; };
      };
      packing.left(row_of(query), work.left);
      packing.right(work.left, work.query + at);
      packing.right_transposed(work.left, work.query_transposed + at);
      packing.left(row_of(grad), work.left);
      packing.right(work.left, work.grad + at);
      packing.right_transposed(work.left, work.grad_transposed + at);
      for (int i = 0; i < BLOCK; ++i) {
        int64_t r = row + i, local = (b - first) * BLOCK + i;
        work.lse[local] = r < end ? log_sum_exp[r % groups * tokens + r / groups] : 3.0e38f;
        Vec product{};
        if (r < end)
          for (int64_t d = 0; d < packing.dim; d += LANES)
            product += load(grad + offset(r) + d, packing.dim - d) * load(out + offset(r) + d, packing.dim - d);
        work.delta[local] = sum(product);
      }
    }
  }

  void strip(BackwardWorkspace<E>& work, int64_t first, int64_t last, int64_t key_blocks) {
    pack_strip(work, first, last);
    std::fill_n(work.grad_query, packing.words((last - first) * BLOCK), 0.0f);
    int64_t last_key = std::min(key_blocks, ((last * BLOCK - 1) / groups) / BLOCK + 1);
    for (int64_t group = 0; group < last_key; group += KEY_GROUP) {
      int64_t group_end = std::min(last_key, group + KEY_GROUP);
      for (int64_t b = group; b < group_end; ++b) {
        int64_t begin = std::max(first, b * groups);  // earlier rows do not see this block of keys
        if (begin >= last) continue;
        for (int64_t r = begin; r < last; ++r) one_block(work, b, r, r - first, b - group);
        add_key_gradients(work, b, begin - first, last - first);
      }
      add_query_gradients(work, group, group_end, first, last);
    }
    write_query_rows(work, first, last);
  }

  void one_block(BackwardWorkspace<E>& work, int64_t b, int64_t r, int64_t local, int64_t in_group) {
    int64_t key_at = packing.words(b * BLOCK), row_at = packing.words(local * BLOCK), depth = packing.depth;
    E::template multiply<2>(work.scores, BLOCK, false, work.key + key_at, depth, 1, work.query_transposed + row_at,
                            depth, 1, depth);
    E::template multiply<2>(work.weight_grad, BLOCK, false, work.value + key_at, depth, 1,
                            work.grad_transposed + row_at, depth, 1, depth);
    alignas(64) int32_t position[BLOCK];
    for (int i = 0; i < BLOCK; ++i) position[i] = int32_t((r * BLOCK + i) / groups);
    bool masked = position[0] < (b + 1) * BLOCK - 1;
    IntVec limit[2];
    Vec lse[2], delta[2];
    for (int n = 0; n < 2; ++n) {
      read(position + 16 * n, limit[n]);
      lse[n] = load(work.lse + local * BLOCK + 16 * n);
      delta[n] = load(work.delta + local * BLOCK + 16 * n);
    }
    typename E::Word* weights = work.weights + local * BLOCK * BLOCK;
    typename E::Word* score_grad = work.score_grad + local * BLOCK * BLOCK;
    typename E::Word* group = work.score_grad_group + (local * KEY_GROUP + in_group) * BLOCK * BLOCK;
    for (int i = 0; i < BLOCK; i += 2) {
      Vec grads[2][2];
      for (int k = 0; k < 2; ++k) {
        Vec p[2];
        for (int n = 0; n < 2; ++n) {
          int at = (i + k) * BLOCK + 16 * n;
          p[n] = exponential(load(work.scores + at) * scale - lse[n]);
          if (masked) p[n] = choose(int32_t(b * BLOCK + i + k) > limit[n], Vec{}, p[n]);
          grads[k][n] = p[n] * (load(work.weight_grad + at) - delta[n]) * scale;
        }
        E::put_left(weights, i + k, p[0], p[1]);
        E::put_left(score_grad, i + k, grads[k][0], grads[k][1]);
      }
      E::put_right(group, i, grads[0][0], grads[0][1], grads[1][0], grads[1][1]);
    }
  }

  // dV and dK of one block of keys, summed over the strip's rows begin ... end - 1 (blocks).
  void add_key_gradients(BackwardWorkspace<E>& work, int64_t b, int64_t begin, int64_t end) {
    int64_t width = packing.columns * 16, at = packing.words(begin * BLOCK), depth = (end - begin) * BLOCK / E::DEPTH;
    for (int64_t d = 0; d < width; d += BLOCK) {
      int64_t tile = at + d / 16 * E::TILE, cell = packing.words(b * BLOCK) + d;
      E::template multiply<2>(work.grad_value + cell, width, true, work.weights + begin * BLOCK * BLOCK, 1, 2,
                              work.grad + tile, 1, packing.columns, depth);
      E::template multiply<2>(work.grad_key + cell, width, true, work.score_grad + begin * BLOCK * BLOCK, 1, 2,
                              work.query + tile, 1, packing.columns, depth);
    }
  }

  void add_query_gradients(BackwardWorkspace<E>& work, int64_t group, int64_t group_end, int64_t first, int64_t last) {
    for (int64_t r = std::max(first, group * groups); r < last; ++r) {
      int64_t seen = std::min(group_end, r / groups + 1) - group, local = r - first;
      for (int64_t d = 0; d < packing.columns * 16; d += BLOCK)
        E::template multiply<2>(work.grad_query + packing.words(local * BLOCK) + d * BLOCK, BLOCK, true,
                                work.key_transposed + packing.words(group * BLOCK) + d / 16 * E::TILE, 1,
                                packing.columns, work.score_grad_group + local * KEY_GROUP * BLOCK * BLOCK, 1, 2,
                                seen * BLOCK / E::DEPTH);
    }
  }

  void write_query_rows(BackwardWorkspace<E>& work, int64_t first, int64_t last) {
    alignas(64) float tile[256];
    for (int64_t row = first * BLOCK; row < std::min(length * groups, last * BLOCK); row += 16)
      for (int64_t d = 0; d < packing.dim; d += 16) {
        int64_t local = row / BLOCK - first;
        transpose(work.grad_query + packing.words(local * BLOCK) + d * BLOCK + row % BLOCK, BLOCK * sizeof(float), tile);
        for (int64_t i = row; i < std::min(length * groups, row + 16); ++i)
          store(grad_query + offset(i) + d, load(tile + (i - row) * 16), packing.dim - d);
      }
  }

  void write_rows(const float* sums, T* to) {
    for (int64_t j = 0; j < length; ++j)
      for (int64_t d = 0; d < packing.dim; d += LANES)
        store(to + j * key_stride + d, load(sums + j * packing.columns * 16 + d), packing.dim - d);
  }
};

template <class E, class T>
void backward(const T* grad, const T* query, const T* key, const T* value, const int32_t* boundaries, const T* out,
              const float* log_sum_exp, T* grad_query, T* grad_key, T* grad_value, const AttentionShape& s) {
  int64_t groups = s.query_heads / s.key_heads;
  parallel(s.documents * s.key_heads, [&](int64_t task) {
    int64_t head = task % s.key_heads, start = boundaries[task / s.key_heads];
    int64_t length = boundaries[task / s.key_heads + 1] - start;
    if (length == 0) return;
    int64_t query_at = (start * s.query_heads + head * groups) * s.dim, key_at = (start * s.key_heads + head) * s.dim;
    Backward<E, T>{query + query_at,
                   key + key_at,
                   value + key_at,
                   out + query_at,
                   grad + query_at,
                   log_sum_exp + head * groups * s.tokens + start,
                   grad_query + query_at,
                   grad_key + key_at,
                   grad_value + key_at,
                   s.tokens,
                   s.query_heads * s.dim,
                   s.key_heads * s.dim,
                   groups,
                   length,
                   s.scale,
                   Packing<E>(s.dim)}
        .run();
  });
}

}  // namespace

template <>
void attention_backward<float>(const float* grad, const float* query, const float* key, const float* value,
                               const int32_t* boundaries, const float* out, const float* log_sum_exp,
                               float* grad_query, float* grad_key, float* grad_value, AttentionShape shape) {
  backward<Wide>(grad, query, key, value, boundaries, out, log_sum_exp, grad_query, grad_key, grad_value, shape);
}

template <>
void attention_backward<BFloat16>(const BFloat16* grad, const BFloat16* query, const BFloat16* key,
                                  const BFloat16* value, const int32_t* boundaries, const BFloat16* out,
                                  const float* log_sum_exp, BFloat16* grad_query, BFloat16* grad_key,
                                  BFloat16* grad_value, AttentionShape shape) {
#ifdef __AMX_BF16__
  if (amx_permitted())
    return backward<Amx>(grad, query, key, value, boundaries, out, log_sum_exp, grad_query, grad_key, grad_value,
                         shape);
#endif
  backward<Wide>(grad, query, key, value, boundaries, out, log_sum_exp, grad_query, grad_key, grad_value, shape);
}

}  // namespace liaoyuan
