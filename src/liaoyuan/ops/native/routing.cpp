// The way of tokens to their experts: the choice of experts, rows sorted by expert, and their weighted sum back.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "stream.h"

namespace liaoyuan {

namespace {

constexpr int64_t ROWS_PER_TASK = 32;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

template <class Body>
void over_rows(int64_t rows, const Body& body) {
  parallel((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](int64_t task) {
    for (int64_t row = task * ROWS_PER_TASK; row < std::min(rows, (task + 1) * ROWS_PER_TASK); ++row) body(row);
    settle();
  });
}

// ---- choice

void softmax_row(const float* logits, float* scores, int64_t count) {
  Vec most = splat(LOWEST), total{};
  const IntVec lane = lane_numbers();
  for (int64_t i = 0; i < count; i += LANES)
    most = maximum(choose(lane < int32_t(count - i), load(logits + i, count - i), splat(LOWEST)), most);
  most = splat(highest(most));
  for (int64_t i = 0; i < count; i += LANES) {
    Vec power = choose(lane < int32_t(count - i), exponential(load(logits + i, count - i) - most), Vec{});
    total += power;
    store(scores + i, power);
  }
  Vec inverse = splat(1.0f / sum(total));
  for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i) * inverse);
}

int64_t padded(int64_t experts) { return (experts + LANES - 1) / LANES * LANES; }

// scores has `padded` places.
void score_row(const float* logits, float* scores, const RouteShape& s) {
  if (!s.sigmoid) return softmax_row(logits, scores, s.experts);
  for (int64_t i = 0; i < s.experts; i += LANES) store(scores + i, sigmoid(load(logits + i, s.experts - i)));
}

// ---- the largest of sixteen rows at once, one row a lane

// Integers in the order of the numbers, and the way back. What is no number counts as the least number.
constexpr int32_t NOTHING = std::numeric_limits<int32_t>::min();  // less than all of them
IntVec pick(IntVec condition, IntVec yes, IntVec no) { return (IntVec)choose(condition, (Vec)yes, (Vec)no); }
IntVec turned(IntVec bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
IntVec key_of(Vec value) { return turned((IntVec)choose(value != value, splat(LOWEST), value)); }
Vec value_of(IntVec key) { return (Vec)turned(key); }

struct Best {
  IntVec key, place;
};

// The K largest of [count][16] keys after `last`, the largest first, of equals the first.
template <int K, bool AFTER>
void largest_few(const IntVec* keys, int64_t count, Best last, Best* found) {
  Best best[K];
  for (int j = 0; j < K; ++j) best[j] = {IntVec{} + NOTHING, IntVec{}};
  for (int64_t i = 0; i < count; ++i) {
    IntVec key = keys[i], here = IntVec{} + int32_t(i);
    if (AFTER) key = pick((last.key > key) | (~(last.key != key) & (here > last.place)), key, IntVec{} + NOTHING);
#pragma GCC unroll 8
    for (int j = K - 1; j > 0; --j) {
      IntVec own = key > best[j].key, above = key > best[j - 1].key;
      best[j].place = pick(above, best[j - 1].place, pick(own, here, best[j].place));
      best[j].key = pick(above, best[j - 1].key, pick(own, key, best[j].key));
    }
    IntVec first = key > best[0].key;
    best[0] = {pick(first, key, best[0].key), pick(first, here, best[0].place)};
  }
  std::copy_n(best, K, found);
}

template <int K>
int64_t some(const IntVec* keys, int64_t count, int64_t at, Best* found) {
  if (at)
    largest_few<K, true>(keys, count, found[at - 1], found + at);
  else
    largest_few<K, false>(keys, count, Best{}, found);
  return at + K;
}

// `found` has room for seven more than are kept.
void largest(const IntVec* keys, int64_t count, int64_t kept, Best* found) {
  for (int64_t at = 0; at < kept;) {
    int64_t left = kept - at;
    at = left > 4   ? some<8>(keys, count, at, found)
         : left > 2 ? some<4>(keys, count, at, found)
         : left > 1 ? some<2>(keys, count, at, found)
                    : some<1>(keys, count, at, found);
  }
}

// Experts outside the best groups can no longer be chosen.
void limit_to_groups(IntVec* keys, const RouteShape& s, IntVec* totals, Best* best) {
  int64_t size = s.experts / s.groups, summed = std::min(s.group_best, size);
  for (int64_t group = 0; group < s.groups; ++group) {
    largest(keys + group * size, size, summed, best);
    Vec total{};
    for (int64_t i = 0; i < summed; ++i) total += value_of(best[i].key);
    totals[group] = key_of(total);
  }
  largest(totals, s.groups, s.kept_groups, best);
  for (int64_t group = 0; group < s.groups; ++group) {
    IntVec is_kept{};
    for (int64_t i = 0; i < s.kept_groups; ++i) is_kept = is_kept | ~(best[i].place != IntVec{} + int32_t(group));
    for (int64_t i = group * size; i < (group + 1) * size; ++i) keys[i] = pick(is_kept, keys[i], key_of(splat(LOWEST)));
  }
}

// ---- choice

constexpr float TINY = 1e-20f;  // keeps weights finite where all scores vanish

// The inverse of the sum of the chosen scores, or 1.
float normaliser(const float* scores, const int64_t* chosen, const RouteShape& s) {
  if (!s.normalise) return 1.0f;
  float total = 0;
  for (int64_t i = 0; i < s.kept; ++i) total += scores[chosen[i]];
  return 1.0f / (total + TINY);
}

struct RouteSpace {  // of sixteen rows
  IntVec *keys, *totals;
  float* scores;  // [16][padded]
  Best* best;

  explicit RouteSpace(int64_t experts) {
    int64_t width = padded(experts);
    keys = static_cast<IntVec*>(scratch(0, size_t(width * 3 + (width + 8) * 2) * sizeof(IntVec)));
    totals = keys + width, scores = reinterpret_cast<float*>(totals + width);
    best = reinterpret_cast<Best*>(scores + LANES * width);
  }
};

// The first `count` of sixteen rows.
void route_rows(const float* logits, const float* bias, float* weights, int64_t* chosen, int64_t count,
                const RouteShape& s) {
  RouteSpace space(s.experts);
  int64_t width = padded(s.experts);
  for (int64_t r = 0; r < LANES; ++r)
    score_row(logits + std::min(r, count - 1) * s.experts, space.scores + r * width, s);
  for (int64_t i = 0; i < width; i += LANES)
    transpose(space.scores + i, width * int64_t(sizeof(float)), space.keys + i);
  for (int64_t i = 0; i < s.experts; ++i) space.keys[i] = key_of((Vec)space.keys[i] + (bias ? bias[i] : 0.0f));
  if (s.groups > 1) limit_to_groups(space.keys, s, space.totals, space.best);
  largest(space.keys, s.experts, s.kept, space.best);
  for (int64_t r = 0; r < count; ++r) {
    const float* scores = space.scores + r * width;
    int64_t* own = chosen + r * s.kept;
    for (int64_t i = 0; i < s.kept; ++i) own[i] = reinterpret_cast<const int32_t*>(&space.best[i].place)[r];
    float factor = s.scale * normaliser(scores, own, s);
    for (int64_t i = 0; i < s.kept; ++i) weights[r * s.kept + i] = scores[own[i]] * factor;
  }
}

}  // namespace

void route(const float* logits, const float* bias, float* weights, int64_t* chosen, const RouteShape& s) {
  parallel((s.rows + LANES - 1) / LANES, [&](int64_t task) {
    int64_t row = task * LANES;
    route_rows(logits + row * s.experts, bias, weights + row * s.kept, chosen + row * s.kept,
               std::min<int64_t>(LANES, s.rows - row), s);
  });
}

void route_backward(const float* grad, const float* logits, const int64_t* chosen, float* grad_logits,
                    const RouteShape& s) {
  over_rows(s.rows, [&](int64_t row) {
    float* scores = static_cast<float*>(scratch(0, size_t(padded(s.experts)) * sizeof(float)));
    const int64_t* own = chosen + row * s.kept;
    const float* upper = grad + row * s.kept;
    float* result = grad_logits + row * s.experts;
    score_row(logits + row * s.experts, scores, s);
    std::fill(result, result + s.experts, 0.0f);
    float inverse = normaliser(scores, own, s), common = 0, mean = 0;
    for (int64_t i = 0; s.normalise && i < s.kept; ++i) common += upper[i] * scores[own[i]] * inverse;
    for (int64_t i = 0; i < s.kept; ++i) {
      float of_score = s.scale * inverse * (upper[i] - common), score = scores[own[i]];
      mean += of_score * score;
      result[own[i]] += of_score * score * (s.sigmoid ? 1.0f - score : 1.0f);
    }
    if (s.sigmoid) return;
    for (int64_t i = 0; i < s.experts; i += LANES)
      store(result + i, load(result + i, s.experts - i) - load(scores + i, s.experts - i) * splat(mean), s.experts - i);
  });
}

// ---- rows to experts and back

bool sort_by_expert(const int64_t* chosen, int64_t count, int64_t experts, int64_t* order, int64_t* sizes) {
  std::fill(sizes, sizes + experts, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (chosen[i] < 0 || chosen[i] >= experts) return false;
    ++sizes[chosen[i]];
  }
  std::vector<int64_t> next(size_t(experts), 0);
  for (int64_t e = 1; e < experts; ++e) next[e] = next[e - 1] + sizes[e - 1];
  for (int64_t i = 0; i < count; ++i) order[next[chosen[i]]++] = i;
  return true;
}

void gather_rows(const char* x, const int64_t* order, char* rows, int64_t count, int64_t per_token, int64_t row_bytes) {
  bool whole = is_aligned(rows, row_bytes), past = whole && is_beyond_caches(count * row_bytes);
  over_rows(count, [&](int64_t row) {
    const char* from = x + order[row] / per_token * row_bytes;
    char* to = rows + row * row_bytes;
    if (!whole) return void(std::memcpy(to, from, size_t(row_bytes)));
    for (int64_t at = 0; at < row_bytes; at += 64) {
      WordVec words;
      read(from + at, words);
      if (past) {
        write_past(to + at, words);
      } else {
        __builtin_prefetch(to + at + AHEAD, 1);
        write(to + at, words);
      }
    }
  });
}

bool places_of(const int64_t* order, int64_t count, int64_t* places) {
  std::fill(places, places + count, int64_t(-1));
  for (int64_t row = 0; row < count; ++row) {
    if (order[row] < 0 || order[row] >= count || places[order[row]] >= 0) return false;
    places[order[row]] = row;
  }
  return true;
}

template <class T>
void combine_rows(const T* rows, const int64_t* places, const float* weights, T* out, int64_t tokens, int64_t per_token,
                  int64_t width) {
  over_rows(tokens, [&](int64_t token) {
    const int64_t *own = places + token * per_token, *next = token + 1 < tokens ? own + per_token : own;
    over_row(width, [&](int64_t at, auto count) {
      Two total{};
      for (int64_t i = 0; i < per_token; ++i) {
        ask(rows + next[i] * width + at);
        Two row = load_two(rows + own[i] * width + at, count);
        total += weights ? row * splat(weights[token * per_token + i]) : row;
      }
      store_two(out + token * width + at, total, count);
    });
  });
}

namespace {

template <class T>
struct RowBack {
  const T *from, *next;  // next: what is asked for meanwhile
  T *to, *next_to;
  Vec weight;
};

// Rows of one token: their gradients, and those of their weights.
template <class Full, int ROWS, class T>
void combined_backward(const T* grad, const RowBack<T>* row, float* grad_weights, int64_t width) {
  Two inner[ROWS] = {};
  over_row<Full>(width, [&](int64_t at, auto count) {
    Two upper = load_two(grad + at, count);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      ask(row[r].next + at);
      if (std::is_same_v<Full, Whole>) ask_to_write(row[r].next_to + at);
      inner[r] += upper * load_two(row[r].from + at, count);
      store_two(row[r].to + at, upper * row[r].weight, count);
    }
  });
  for (int r = 0; r < ROWS; ++r) grad_weights[r] = sum(inner[r]);
}

template <class Full, class T>
void combine_backward(const T* grad, const T* rows, const int64_t* places, const float* weights, T* grad_rows,
                      float* grad_weights, int64_t tokens, int64_t per_token, int64_t width) {
  constexpr int TOGETHER = 4;
  over_rows(tokens, [&](int64_t token) {
    const T* upper = grad + token * width;
    int64_t end = (token + 1) * per_token, last = tokens * per_token - 1;
    for (int64_t i = token * per_token, count; i < end; i += count) {
      count = end - i >= TOGETHER ? TOGETHER : 1;
      RowBack<T> group[TOGETHER];
      for (int r = 0; r < count; ++r) {
        int64_t here = places[i + r] * width, next = places[std::min(i + r + count, last)] * width;
        group[r] = {rows + here, rows + next, grad_rows + here, grad_rows + next, splat(weights[i + r])};
      }
      if (count == TOGETHER)
        combined_backward<Full, TOGETHER>(upper, group, grad_weights + i, width);
      else
        combined_backward<Full, 1>(upper, group, grad_weights + i, width);
    }
  });
}

}  // namespace

template <class T>
void combine_rows_backward(const T* grad, const T* rows, const int64_t* places, const float* weights, T* grad_rows,
                           float* grad_weights, int64_t tokens, int64_t per_token, int64_t width) {
  int64_t row_bytes = width * int64_t(sizeof(T));
  bool past = is_beyond_caches(tokens * per_token * row_bytes) && is_aligned(grad_rows, row_bytes);
  (past ? combine_backward<Past, T> : combine_backward<Whole, T>)(grad, rows, places, weights, grad_rows, grad_weights,
                                                                  tokens, per_token, width);
}

#define INSTANTIATE(T)                                                                                               \
  template void combine_rows<T>(const T*, const int64_t*, const float*, T*, int64_t, int64_t, int64_t);              \
  template void combine_rows_backward<T>(const T*, const T*, const int64_t*, const float*, T*, float*, int64_t,      \
                                         int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

// The gradients of experts' biases: the sum of each group of rows.
template <class T>
void grouped_sum(const T* rows, T* sums, const Groups& groups, int64_t columns) {
  parallel(groups.experts, [&](int64_t expert) {
    for (int64_t at = 0; at < columns; at += LANES) {
      Vec total{};
      for (int64_t row = groups.starts[expert]; row < groups.starts[expert + 1]; ++row)
        total += load(rows + row * columns + at, columns - at);
      store(sums + expert * columns + at, total, columns - at);
    }
  });
}

template void grouped_sum<float>(const float*, float*, const Groups&, int64_t);
template void grouped_sum<BFloat16>(const BFloat16*, BFloat16*, const Groups&, int64_t);

}  // namespace liaoyuan
