// SwiGLU with gate and up alternating in memory: a pair of bf16 values is one 32-bit word.
#include <algorithm>

#include "kernels.h"

namespace liaoyuan {

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 16384;

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
inline void store_pair(BFloat16* to, Vec gate, Vec up) {
  WordVec words = (rounded_words(gate) >> 16) | (rounded_words(up) & 0xffff0000u);
  write(to, words);
}
inline void store_pair(float* to, Vec gate, Vec up) {
  Vec low, high;
  zip(gate, up, low, high);
  store(to, low);
  store(to + LANES, high);
}

// Call body(pointer to 16 pairs, position) over a range, with a padded copy for the ragged end.
template <class T, class Body>
void over_pairs(const T* gate_up, int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) body(gate_up + 2 * i, i, int64_t(LANES));
  if (i < end) {
    T padded[2 * LANES] = {};
    std::memcpy(padded, gate_up + 2 * i, size_t(2 * (end - i)) * sizeof(T));
    body(padded, i, end - i);
  }
}

template <class Body>
void over_chunks(int64_t count, const Body& body) {
  parallel((count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, [&](int64_t task) {
    body(task * ELEMENTS_PER_TASK, std::min(count, (task + 1) * ELEMENTS_PER_TASK));
  });
}

}  // namespace

template <class T>
void swiglu(const T* gate_up, T* out, int64_t rows, int64_t width) {
  over_chunks(rows * width, [&](int64_t begin, int64_t end) {
    over_pairs(gate_up, begin, end, [&](const T* from, int64_t i, int64_t count) {
      Pair pair = load_pair(from);
      store(out + i, pair.gate * sigmoid(pair.gate) * pair.up, count);
    });
  });
}

template <class T>
void swiglu_backward(const T* grad, const T* gate_up, T* grad_gate_up, int64_t rows, int64_t width) {
  over_chunks(rows * width, [&](int64_t begin, int64_t end) {
    over_pairs(gate_up, begin, end, [&](const T* from, int64_t i, int64_t count) {
      Pair pair = load_pair(from);
      Vec g = load(grad + i, count), gate = sigmoid(pair.gate), silu = pair.gate * gate;
      Vec grad_gate = g * pair.up * (gate + silu * (1.0f - gate));
      if (count == LANES) return store_pair(grad_gate_up + 2 * i, grad_gate, g * silu);
      T padded[2 * LANES];
      store_pair(padded, grad_gate, g * silu);
      std::memcpy(grad_gate_up + 2 * i, padded, size_t(2 * count) * sizeof(T));
    });
  });
}

#define INSTANTIATE(T)                                         \
  template void swiglu<T>(const T*, T*, int64_t, int64_t);      \
  template void swiglu_backward<T>(const T*, const T*, T*, int64_t, int64_t);
INSTANTIATE(float)
INSTANTIATE(BFloat16)

}  // namespace liaoyuan
