// Gated activations with gate and up alternating in memory: a pair of bf16 values is one 32-bit word.
#include <algorithm>

#include "activation.h"
#include "kernels.h"
#include "rounding.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 16384, STEP = 2 * LANES;

struct Pair {
  Vec gate, up;
};

inline Pair load_pair(const BFloat16* from) {
  WordVec words;
  read(from, words);
  return {(Vec)(words << 16), (Vec)(words & 0xffff0000u)};
}
inline Pair load_pair(const float* from) {
  Pair pair;
  unzip(load(from), load(from + LANES), pair.gate, pair.up);
  return pair;
}

template <class Activation, class T>
inline Vec result(const Activation& activation, const T* gate_up) {
  Pair pair = load_pair(gate_up);
  return activation.value(pair.gate) * activation.factor(pair.up);
}

// Whole steps; not inlined, so that what is left of a chunk goes through the same instructions as all else.
template <class Activation, class T>
[[gnu::noinline]] void forward(const Activation& activation, const T* gate_up, T* out, int64_t count) {
  for (int64_t i = 0; i < count; i += STEP)
    store_two(out + i, result(activation, gate_up + 2 * i), result(activation, gate_up + 2 * (i + LANES)));
}

template <class Activation, class T>
[[gnu::noinline]] void backward(const Activation& activation, const T* grad, const T* gate_up, T* grad_gate_up,
                                int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    Pair pair = load_pair(gate_up + 2 * i);
    Vec upper = load(grad + i);
    Point gate = activation.at(pair.gate);
    store_pairs(grad_gate_up + 2 * i, upper * activation.factor(pair.up) * gate.slope,
                activation.passed(upper * gate.value, pair.up));
  }
}

// body(first, number of whole steps' elements, number left), in chunks of the same places for any number of threads.
template <class Body>
void over_chunks(int64_t count, const Body& body) {
  parallel((count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, [&](int64_t task) {
    int64_t begin = task * ELEMENTS_PER_TASK, size = std::min(count - begin, ELEMENTS_PER_TASK), left = size % STEP;
    body(begin, size - left, left);
  });
}

template <class T>
void copy(const T* from, T* to, int64_t count) { std::memcpy(to, from, size_t(count) * sizeof(T)); }

template <class Activation, class T>
void forward_all(const Activation& activation, const T* gate_up, T* out, int64_t count) {
  over_chunks(count, [&](int64_t begin, int64_t whole, int64_t left) {
    forward(activation, gate_up + 2 * begin, out + begin, whole);
    if (!left) return;
    T padded[2 * STEP] = {}, results[STEP];
    copy(gate_up + 2 * (begin + whole), padded, 2 * left);
    forward(activation, padded, results, STEP);
    copy(results, out + begin + whole, left);
  });
}

template <class Activation, class T>
void backward_all(const Activation& activation, const T* grad, const T* gate_up, T* grad_gate_up, int64_t count) {
  over_chunks(count, [&](int64_t begin, int64_t whole, int64_t left) {
    backward(activation, grad + begin, gate_up + 2 * begin, grad_gate_up + 2 * begin, whole);
    if (!left) return;
    T upper[STEP] = {}, padded[2 * STEP] = {}, results[2 * STEP];
    copy(grad + begin + whole, upper, left);
    copy(gate_up + 2 * (begin + whole), padded, 2 * left);
    backward(activation, upper, padded, results, STEP);
    copy(results, grad_gate_up + 2 * (begin + whole), 2 * left);
  });
}

template <class Body>
void with_activation(const GateKind& kind, const Body& body) {
  switch (kind.activation) {
    case GateKind::silu: return body(Silu{});
    case GateKind::gelu: return body(Gelu{});
    case GateKind::gelu_tanh: return body(GeluTanh{});
    case GateKind::clamped_silu: return body(ClampedSilu{kind.limit, kind.alpha});
  }
}

}  // namespace

template <class T>
void gated(const T* gate_up, T* out, int64_t count, const GateKind& kind) {
  with_activation(kind, [&](auto activation) { forward_all(activation, gate_up, out, count); });
}

template <class T>
void gated_backward(const T* grad, const T* gate_up, T* grad_gate_up, int64_t count, const GateKind& kind) {
  with_activation(kind, [&](auto activation) { backward_all(activation, grad, gate_up, grad_gate_up, count); });
}

#define INSTANTIATE(T)                                                     \
  template void gated<T>(const T*, T*, int64_t, const GateKind&);          \
  template void gated_backward<T>(const T*, const T*, T*, int64_t, const GateKind&);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan
