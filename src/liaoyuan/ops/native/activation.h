// Activations of a gate and their slopes, of which gated.cpp makes gated feed-forward layers.
#pragma once
#include "vector.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace liaoyuan {

// A NaN in x stays one in both.
#ifdef __AVX512F__
inline Vec at_most(Vec x, float limit) { return (Vec)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)x); }
inline Vec at_least(Vec x, float limit) { return (Vec)_mm512_max_ps(_mm512_set1_ps(limit), (__m512)x); }
#else
inline Vec at_most(Vec x, float limit) { return choose(x > splat(limit), splat(limit), x); }
inline Vec at_least(Vec x, float limit) { return choose(x < splat(limit), splat(limit), x); }
#endif

inline Vec nearest(Vec x) {  // integer, for |x| < 2^22
#ifdef __AVX512F__
  return (Vec)_mm512_roundscale_ps((__m512)x, 8);
#else
  const float round = 12582912.0f;  // adding and taking away 1.5 * 2^23 rounds to an integer
  return (x + round) - round;
#endif
}
inline Vec scaled(Vec x, Vec n) {  // x * 2^n, no number on the way or at the end out of range; n an integer
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  return (Vec)((IntVec)x + ((IntVec)(n + 12582912.0f) << 23));
#endif
}

// e^x and 2^x, by polynomials fitted to them between the halves of two powers of two; relative errors below 2e-7. What
// is beyond the bounds, -87 and 88, -126 and 127, counts as the nearer of them.
inline Vec bounded_exponential(Vec x) {
  x = at_least(at_most(x, 88.0f), -87.0f);
  Vec n = nearest(x * 1.44269504f);
  Vec r = x - n * 0.693359375f;  // the first bits of log(2), so that the product is exact
  r = r + n * 2.12194440e-4f;
  Vec p = r * 8.29031478e-03f + 4.18979308e-02f;
  p = p * r + 1.66676357e-01f;
  p = p * r + 4.99991502e-01f;
  p = p * r + 9.99999745e-01f;
  p = p * r + 1.0f;
  return scaled(p, n);
}
inline Vec bounded_power_of_two(Vec x) {
  x = at_least(at_most(x, 127.0f), -126.0f);
  Vec n = nearest(x), r = x - n;
  Vec p = r * 1.32647273e-3f + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  return scaled(p, n);
}
constexpr float LOG2_E = 1.44269504f;

struct Point {
  Vec value, slope;
};

// Of an activation whose result is multiplied with `up` as it is.
struct PlainUp {
  Vec factor(Vec up) const { return up; }
  Vec passed(Vec grad, Vec) const { return grad; }  // the gradient of `up`, given that of its factor
};

struct Silu : PlainUp {
  Vec value(Vec x) const { return x / (1.0f + bounded_exponential(-x)); }
  Point at(Vec x) const {
    Vec e = bounded_exponential(-x), sigmoid = 1.0f / (1.0f + e), value = x * sigmoid;
    return {value, sigmoid + value * (e * sigmoid)};  // 1 - sigmoid would lose what is near one
  }
};

// x times the normal distribution's function, whose tail is e^(-x^2 / 2) times a polynomial in 1 / (1 + 0.3 |x|) fitted
// to it for |x| < 13.2; relative error below 4e-7, and of the exponential's x^2 more beyond 3.
struct Gelu : PlainUp {
  struct Normal {
    Vec below, bell;  // the share below x; e^(-x^2 / 2)
  };
  static Normal normal(Vec x) {
    Vec size = choose(x < Vec{}, -x, x), t = 1.0f / (1.0f + size * 0.3f);
    Vec bell = bounded_exponential(x * x * -0.5f);
    Vec p = t * 3.60888019e-2f - 1.58933580e-1f;
    p = p * t + 2.09346145e-1f;
    p = p * t - 5.64498752e-2f;
    p = p * t + 1.30032510e-1f;
    p = p * t + 9.94650945e-2f;
    p = p * t + 1.20826311e-1f;
    p = p * t + 1.19624540e-1f;
    Vec tail = bell * (p * t);
    return {choose(x < Vec{}, tail, 1.0f - tail), bell};
  }
  Vec value(Vec x) const { return x * normal(x).below; }
  Point at(Vec x) const {
    Normal n = normal(x);
    return {x * n.below, n.below + x * n.bell * 0.398942280f};  // 1 / sqrt(2 pi)
  }
};

// The approximation of GELU by tanh: x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
struct GeluTanh : PlainUp {
  static constexpr float LINEAR = 1.59576912f, CUBIC = 0.0713548163f;  // of 2 u

  static Vec exponential(Vec x, Vec square) {  // of -2 u
    return bounded_power_of_two(x * (square * (-CUBIC * LOG2_E) - LINEAR * LOG2_E));
  }
  Vec value(Vec x) const { return x / (1.0f + exponential(x, x * x)); }
  Point at(Vec x) const {
    Vec square = x * x, e = exponential(x, square), sigmoid = 1.0f / (1.0f + e), value = x * sigmoid;
    return {value, sigmoid + value * (e * sigmoid) * (square * (3.0f * CUBIC) + LINEAR)};
  }
};

// gpt-oss's: gate and up are held within limits, the sigmoid is steeper, and up is raised by one.
struct ClampedSilu {
  float limit, alpha;

  Vec value(Vec x) const {
    x = at_most(x, limit);
    return x / (1.0f + bounded_power_of_two(x * (-alpha * LOG2_E)));
  }
  Point at(Vec x) const {
    Vec held = at_most(x, limit), e = bounded_power_of_two(held * (-alpha * LOG2_E)), sigmoid = 1.0f / (1.0f + e);
    Vec value = held * sigmoid, slope = sigmoid + value * (e * sigmoid) * alpha;
    return {value, choose(held != x, Vec{}, slope)};
  }
  Vec held_up(Vec up) const { return at_least(at_most(up, limit), -limit); }
  Vec factor(Vec up) const { return held_up(up) + 1.0f; }
  Vec passed(Vec grad, Vec up) const { return choose(held_up(up) != up, Vec{}, grad); }
};

}  // namespace liaoyuan
