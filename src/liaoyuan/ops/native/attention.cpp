// Attention forward (FlashAttention's blocked softmax: Dao et al. 2022, arXiv 2205.14135), packed and paged in one.
//
// Scores are computed transposed, [keys, rows], so that the softmax runs down columns without any sum across
// lanes. A row is one query of one head; the query heads that share a key head are rows of the same block. A row
// adds up its keys in blocks counted from the first key of its sequence, whatever is computed beside it, so that
// training, prefill in chunks and decode give the same bits.
#include <algorithm>
#include <cmath>

#include "decode.h"
#include "tiles.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace liaoyuan {

#ifdef __AMX_BF16__
bool amx_permitted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux: arch/x86/include/uapi/asm/prctl.h
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return permitted;
}
#endif

namespace {

constexpr int64_t ROWS_PER_TASK = 512;

template <class T>
struct Rows {  // queries first ... last - 1 of one sequence and one key head
  const T* query;
  T* out;
  float* log_sum_exp;  // of this group's first head, or null; heads `log_sum_exp_stride` apart
  int64_t stride, log_sum_exp_stride, groups, first, last, position;  // position of query 0 in its sequence
  int64_t query_of(int64_t row) const { return row / groups; }
  int64_t offset(int64_t row, int64_t dim) const { return query_of(row) * stride + row % groups * dim; }
};

template <class E>
struct Workspace {
  typename E::Word *key, *value, *weights, *query, *query_left;
  float *scores, *out;
  Workspace(const Packing<E>& packing, int64_t keys) {
    int64_t block = packing.words(BLOCK), all = packing.words(keys);
    int64_t words = 2 * all + KEY_CHUNK * BLOCK + 2 * block;
    key = static_cast<typename E::Word*>(scratch(0, size_t(words) * sizeof(*key)));
    value = key + all;
    weights = value + all;
    query = weights + KEY_CHUNK * BLOCK;
    query_left = query + block;
    scores = static_cast<float*>(scratch(1, size_t(KEY_CHUNK * BLOCK + block) * sizeof(float)));
    out = scores + KEY_CHUNK * BLOCK;
  }
};

// One block of up to 16 * COLUMNS rows against all the keys that they see.
template <class E, class T, int COLUMNS>
void attend_block(const Rows<T>& rows, int64_t begin, int64_t count, const Packing<E>& packing, Workspace<E>& work,
                  float scale) {
  packing.left([&](int i) { return i < count ? rows.query + rows.offset(begin + i, packing.dim) : nullptr; },
               work.query_left);
  packing.right_transposed(work.query_left, work.query);
  alignas(64) int32_t position[BLOCK];
  for (int i = 0; i < BLOCK; ++i)
    position[i] = int32_t(rows.position + rows.query_of(begin + std::min<int64_t>(i, count - 1)));
  IntVec limit[COLUMNS];
  for (int n = 0; n < COLUMNS; ++n) read(position + 16 * n, limit[n]);
  int64_t lowest_limit = position[0], keys = position[count - 1] + 1, out_rows = packing.columns * 16;

  Vec top[COLUMNS], sums[COLUMNS];
  for (int n = 0; n < COLUMNS; ++n) top[n] = splat(LOWEST), sums[n] = Vec{};
  for (int64_t chunk = 0; chunk < keys; chunk += KEY_CHUNK) {
    int64_t blocks = (std::min(keys - chunk, KEY_CHUNK) + BLOCK - 1) / BLOCK;
    Vec old[COLUMNS];
    for (int n = 0; n < COLUMNS; ++n) old[n] = top[n];
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t first_key = chunk + b * BLOCK;
      float* scores = work.scores + b * BLOCK * BLOCK;
      E::template multiply<COLUMNS>(scores, BLOCK, false, work.key + packing.words(first_key), packing.depth, 1,
                                    work.query, packing.depth, 1, packing.depth);
      bool masked = first_key + BLOCK - 1 > lowest_limit;
      for (int i = 0; i < BLOCK; ++i)
        for (int n = 0; n < COLUMNS; ++n) {
          Vec s = load(scores + i * BLOCK + 16 * n) * scale;
          if (masked) s = choose(int32_t(first_key + i) > limit[n], splat(LOWEST), s);
          store(scores + i * BLOCK + 16 * n, s);
          top[n] = maximum(top[n], s);
        }
    }
    if (chunk) {
      Vec shrink[COLUMNS];
      for (int n = 0; n < COLUMNS; ++n) shrink[n] = exponential(old[n] - top[n]), sums[n] *= shrink[n];
      for (int64_t d = 0; d < out_rows; ++d)
        for (int n = 0; n < COLUMNS; ++n) {
          float* cell = work.out + d * BLOCK + 16 * n;
          store(cell, load(cell) * shrink[n]);
        }
    }
    for (int64_t i = 0; i < blocks * BLOCK; i += 2) {
      Vec p[2][2] = {};
      for (int r = 0; r < 2; ++r)
        for (int n = 0; n < COLUMNS; ++n) {
          p[r][n] = exponential(load(work.scores + (i + r) * BLOCK + 16 * n) - top[n]);
          sums[n] += p[r][n];
        }
      E::put_right(work.weights + i / BLOCK * BLOCK * BLOCK, int(i % BLOCK), p[0][0], p[0][1], p[1][0], p[1][1]);
    }
    for (int64_t d = 0; d < out_rows; d += BLOCK)
      E::template multiply<COLUMNS>(work.out + d * BLOCK, BLOCK, chunk > 0,
                                    work.value + packing.words(chunk) + d / 16 * E::TILE, 1, packing.columns,
                                    work.weights, 1, 2, blocks * BLOCK / E::DEPTH);
  }

  alignas(64) float inverse[BLOCK], lse[BLOCK], tile[256];
  for (int n = 0; n < COLUMNS; ++n) {
    store(inverse + 16 * n, 1.0f / sums[n]);
    for (int i = 16 * n; i < 16 * n + 16; ++i) lse[i] = top[n][i % 16] + std::log(sums[n][i % 16]);
  }
  for (int64_t d = 0; d < packing.dim; d += 16)
    for (int n = 0; n < COLUMNS; ++n) {
      transpose(work.out + d * BLOCK + 16 * n, BLOCK * sizeof(float), tile);
      for (int i = 16 * n; i < std::min<int64_t>(count, 16 * n + 16); ++i)
        store(rows.out + rows.offset(begin + i, packing.dim) + d, load(tile + i % 16 * 16) * inverse[i],
              packing.dim - d);
    }
  if (rows.log_sum_exp)
    for (int i = 0; i < count; ++i)
      rows.log_sum_exp[(begin + i) % rows.groups * rows.log_sum_exp_stride + rows.query_of(begin + i)] = lse[i];
}

// key(j), value(j): pointers to the rows of this sequence's cached tokens.
template <class E, class T, class Key, class Value>
void attend(const Rows<T>& rows, const Key& key, const Value& value, int64_t dim, float scale) {
  Packing<E> packing(dim);
  int64_t keys = rows.position + rows.last;
  Workspace<E> work(packing, keys);
  E::begin();
  for (int64_t j = 0; j < keys; j += BLOCK) {
    packing.left([&](int i) { return j + i < keys ? key(j + i) : nullptr; }, work.key + packing.words(j));
    typename E::Word* value_left = work.query_left;
    packing.left([&](int i) { return j + i < keys ? value(j + i) : nullptr; }, value_left);
    packing.left_transposed(value_left, work.value + packing.words(j));
  }
  for (int64_t row = rows.first * rows.groups; row < rows.last * rows.groups; row += BLOCK) {
    int64_t count = std::min<int64_t>(BLOCK, rows.last * rows.groups - row);
    if (count > 16)
      attend_block<E, T, 2>(rows, row, count, packing, work, scale);
    else
      attend_block<E, T, 1>(rows, row, count, packing, work, scale);
  }
  E::end();
}

int64_t cuts_of(int64_t queries, int64_t groups) {
  return (queries * groups + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
}

template <class E, class T>
void packed(const T* query, const T* key, const T* value, const int32_t* boundaries, T* out, float* log_sum_exp,
            const AttentionShape& s) {
  int64_t groups = s.query_heads / s.key_heads, longest = 0;
  for (int64_t m = 0; m < s.documents; ++m) longest = std::max<int64_t>(longest, boundaries[m + 1] - boundaries[m]);
  int64_t cuts = cuts_of(longest, groups);
  parallel(s.documents * cuts * s.key_heads, [&](int64_t task) {
    int64_t head = task % s.key_heads, cut = task / s.key_heads % cuts, document = task / s.key_heads / cuts;
    int64_t start = boundaries[document], length = boundaries[document + 1] - start, parts = cuts_of(length, groups);
    if (cut >= parts) return;
    Rows<T> rows;
    rows.groups = groups;
    rows.stride = s.query_heads * s.dim;
    rows.query = query + start * rows.stride + head * groups * s.dim;
    rows.out = out + start * rows.stride + head * groups * s.dim;
    rows.log_sum_exp = log_sum_exp + head * groups * s.tokens + start;
    rows.log_sum_exp_stride = s.tokens;
    rows.position = 0;
    rows.first = length * cut / parts;
    rows.last = length * (cut + 1) / parts;
    auto row_of = [&](const T* base) {
      return [=](int64_t j) { return base + ((start + j) * s.key_heads + head) * s.dim; };
    };
    attend<E>(rows, row_of(key), row_of(value), s.dim, s.scale);
  });
}

template <class E, class T>
void paged(const T* query, const T* key_cache, const T* value_cache, const int32_t* block_tables,
           const int32_t* query_starts, const int32_t* lengths, T* out, const PagedShape& s) {
  int64_t groups = s.query_heads / s.key_heads, longest = 0;
  for (int64_t m = 0; m < s.sequences; ++m) longest = std::max<int64_t>(longest, query_starts[m + 1] - query_starts[m]);
  int64_t cuts = std::max<int64_t>(1, cuts_of(longest, groups));
  parallel(s.sequences * cuts * s.key_heads, [&](int64_t task) {
    int64_t head = task % s.key_heads, cut = task / s.key_heads % cuts, sequence = task / s.key_heads / cuts;
    int64_t start = query_starts[sequence], queries = query_starts[sequence + 1] - start;
    int64_t parts = cuts_of(queries, groups);
    if (cut >= parts || lengths[sequence] < queries) return;
    Rows<T> rows;
    rows.groups = groups;
    rows.stride = s.query_heads * s.dim;
    rows.query = query + start * rows.stride + head * groups * s.dim;
    rows.out = out + start * rows.stride + head * groups * s.dim;
    rows.log_sum_exp = nullptr;
    rows.position = lengths[sequence] - queries;
    rows.first = queries * cut / parts;
    rows.last = queries * (cut + 1) / parts;
    const int32_t* table = block_tables + sequence * s.max_blocks;
    if (queries == 1 && can_decode<E>(s.dim, s.block_size)) {
      Pages pages{table, s.block_size, s.block_size * s.key_heads * s.dim, s.key_heads * s.dim};
      return decode<E>(rows.query, rows.out, groups, key_cache + head * s.dim, value_cache + head * s.dim, pages,
                       lengths[sequence], s.dim, s.scale);
    }
    auto row_of = [&](const T* base) {
      return [=](int64_t j) {
        int64_t slot = table[j / s.block_size] * s.block_size + j % s.block_size;
        return base + (slot * s.key_heads + head) * s.dim;
      };
    };
    attend<E>(rows, row_of(key_cache), row_of(value_cache), s.dim, s.scale);
  });
}

}  // namespace

template <>
void attention<float>(const float* query, const float* key, const float* value, const int32_t* boundaries, float* out,
                      float* log_sum_exp, AttentionShape shape) {
  packed<Wide>(query, key, value, boundaries, out, log_sum_exp, shape);
}

template <>
void attention<BFloat16>(const BFloat16* query, const BFloat16* key, const BFloat16* value, const int32_t* boundaries,
                         BFloat16* out, float* log_sum_exp, AttentionShape shape) {
#ifdef __AMX_BF16__
  if (amx_permitted()) return packed<Amx>(query, key, value, boundaries, out, log_sum_exp, shape);
#endif
  packed<Wide>(query, key, value, boundaries, out, log_sum_exp, shape);
}

template <>
void paged_attention<float>(const float* query, const float* key_cache, const float* value_cache,
                            const int32_t* block_tables, const int32_t* query_starts, const int32_t* lengths,
                            float* out, PagedShape shape) {
  paged<Wide>(query, key_cache, value_cache, block_tables, query_starts, lengths, out, shape);
}

template <>
void paged_attention<BFloat16>(const BFloat16* query, const BFloat16* key_cache, const BFloat16* value_cache,
                               const int32_t* block_tables, const int32_t* query_starts, const int32_t* lengths,
                               BFloat16* out, PagedShape shape) {
#ifdef __AMX_BF16__
  if (amx_permitted())
    return paged<Amx>(query, key_cache, value_cache, block_tables, query_starts, lengths, out, shape);
#endif
  paged<Wide>(query, key_cache, value_cache, block_tables, query_starts, lengths, out, shape);
}

}  // namespace liaoyuan
