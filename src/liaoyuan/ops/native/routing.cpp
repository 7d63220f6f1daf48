// The way of tokens to their experts: the choice of experts, rows sorted by expert, and their weighted sum back.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"

namespace liaoyuan {

namespace {

constexpr int64_t ROWS_PER_TASK = 32;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

template <class Body>
void over_rows(int64_t rows, const Body& body) {
  parallel((rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](int64_t task) {
    for (int64_t row = task * ROWS_PER_TASK; row < std::min(rows, (task + 1) * ROWS_PER_TASK); ++row) body(row);
  });
}

// ---- choice

void softmax_row(const float* logits, float* scores, int64_t count) {
  float most = LOWEST;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, logits[i]);
  Vec total{};
  for (int64_t i = 0; i < count; i += LANES) {
    float power[LANES];
    store(power, exponential(load(logits + i, count - i) - splat(most)));
    for (int64_t j = std::min<int64_t>(LANES, count - i); j < LANES; ++j) power[j] = 0;
    total += load(power);
    store(scores + i, load(power), count - i);
  }
  Vec inverse = splat(1.0f / sum(total));
  for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i, count - i) * inverse, count - i);
}

void score_row(const float* logits, float* scores, const RouteShape& s) {
  if (!s.sigmoid) return softmax_row(logits, scores, s.experts);
  for (int64_t i = 0; i < s.experts; i += LANES)
    store(scores + i, sigmoid(load(logits + i, s.experts - i)), s.experts - i);
}

// The places of the `kept` largest, the largest first, of equals the first. What is no number counts as the least.
void largest(const float* values, int64_t count, int64_t kept, int64_t* places) {
  auto value = [&](int64_t i) { return values[i] == values[i] ? values[i] : LOWEST; };
  int64_t held = 0;
  for (int64_t i = 0; i < count; ++i) {
    float own = value(i);
    if (held == kept && !(own > value(places[kept - 1]))) continue;
    int64_t at = held < kept ? held++ : kept - 1;
    for (; at > 0 && own > value(places[at - 1]); --at) places[at] = places[at - 1];
    places[at] = i;
  }
}

// Experts outside the best groups can no longer be chosen.
void limit_to_groups(float* values, const RouteShape& s, float* totals, int64_t* places) {
  int64_t size = s.experts / s.groups, summed = std::min(s.group_best, size);
  for (int64_t group = 0; group < s.groups; ++group) {
    largest(values + group * size, size, summed, places);
    totals[group] = 0;
    for (int64_t i = 0; i < summed; ++i) totals[group] += values[group * size + places[i]];
  }
  largest(totals, s.groups, s.kept_groups, places);
  for (int64_t group = 0; group < s.groups; ++group)
    if (std::find(places, places + s.kept_groups, group) == places + s.kept_groups)
      std::fill(values + group * size, values + (group + 1) * size, LOWEST);
}

constexpr float TINY = 1e-20f;  // keeps weights finite where all scores vanish

// The inverse of the sum of the chosen scores, or 1.
float normaliser(const float* scores, const int64_t* chosen, const RouteShape& s) {
  if (!s.normalise) return 1.0f;
  float total = 0;
  for (int64_t i = 0; i < s.kept; ++i) total += scores[chosen[i]];
  return 1.0f / (total + TINY);
}

}  // namespace

void route(const float* logits, const float* bias, float* weights, int64_t* chosen, const RouteShape& s) {
  over_rows(s.rows, [&](int64_t row) {
    float* scores = static_cast<float*>(scratch(0, size_t(s.experts * 4 * sizeof(float) + 64)));
    float *values = scores + s.experts, *totals = values + s.experts;
    int64_t *own = chosen + row * s.kept, *places = static_cast<int64_t*>(scratch(1, size_t(s.experts) * 8));
    score_row(logits + row * s.experts, scores, s);
    for (int64_t i = 0; i < s.experts; ++i) values[i] = bias ? scores[i] + bias[i] : scores[i];
    if (s.groups > 1) limit_to_groups(values, s, totals, places);
    largest(values, s.experts, s.kept, own);
    float factor = s.scale * normaliser(scores, own, s);
    for (int64_t i = 0; i < s.kept; ++i) weights[row * s.kept + i] = scores[own[i]] * factor;
  });
}

void route_backward(const float* grad, const float* logits, const int64_t* chosen, float* grad_logits,
                    const RouteShape& s) {
  over_rows(s.rows, [&](int64_t row) {
    float* scores = static_cast<float*>(scratch(0, size_t(s.experts) * sizeof(float) + 64));
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
  over_rows(count, [&](int64_t row) {
    std::memcpy(rows + row * row_bytes, x + order[row] / per_token * row_bytes, size_t(row_bytes));
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
    const int64_t* own = places + token * per_token;
    for (int64_t at = 0; at < width; at += LANES) {
      Vec total{};
      for (int64_t i = 0; i < per_token; ++i) {
        Vec row = load(rows + own[i] * width + at, width - at);
        total += weights ? row * splat(weights[token * per_token + i]) : row;
      }
      store(out + token * width + at, total, width - at);
    }
  });
}

template <class T>
void combine_rows_backward(const T* grad, const T* rows, const int64_t* places, const float* weights, T* grad_rows,
                           float* grad_weights, int64_t tokens, int64_t per_token, int64_t width) {
  over_rows(tokens, [&](int64_t token) {
    for (int64_t i = token * per_token; i < (token + 1) * per_token; ++i) {
      Vec inner{}, weight = splat(weights[i]);
      for (int64_t at = 0; at < width; at += LANES) {
        Vec upper = load(grad + token * width + at, width - at);
        inner += upper * load(rows + places[i] * width + at, width - at);
        store(grad_rows + places[i] * width + at, upper * weight, width - at);
      }
      grad_weights[i] = sum(inner);
    }
  });
}

#define INSTANTIATE(T)                                                                                               \
  template void combine_rows<T>(const T*, const int64_t*, const float*, T*, int64_t, int64_t, int64_t);              \
  template void combine_rows_backward<T>(const T*, const T*, const int64_t*, const float*, T*, float*, int64_t,      \
                                         int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan
