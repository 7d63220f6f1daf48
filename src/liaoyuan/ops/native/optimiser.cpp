// What an optimiser does with every element: AdamW's update, sums of squares, checksums; each in one pass over memory.
//
// Work is cut by the number of elements alone and partial results are added in their order, so that nothing depends on
// the number of threads.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "stream.h"

namespace liaoyuan {

namespace {

constexpr int64_t PER_TASK = 1 << 16, CHUNK = 1024;

Vec square_root(Vec x) {
  float lane[LANES];
  store(lane, x);
  for (int i = 0; i < LANES; ++i) lane[i] = __builtin_sqrtf(lane[i]);
  return load(lane);
}

// 32 mixed bits for every number (the finaliser of MurmurHash3, Appleby 2011).
WordVec mixed(WordVec x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

inline void store_rounded(float* to, Vec value, WordVec, int64_t count) { store(to, value, count); }
// Up with the probability of the part that is cut off (Gupta et al. 2015, arXiv 1502.02551, sec. 3).
inline void store_rounded(BFloat16* to, Vec value, WordVec random, int64_t count) {
  WordVec word = (WordVec)value;
  IntVec is_nan = value != value;
  WordVec up = (word + (random >> 16)) & ~(WordVec)is_nan;
  uint16_t half[LANES];
  to_halves(half, (up | ((word | 0x400000u) & (WordVec)is_nan)) >> 16);
  std::memcpy(to, half, size_t(std::min<int64_t>(count, LANES)) * 2);
}

uint64_t mix(uint64_t x) {  // the finaliser of splitmix64 (Steele et al. 2014)
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

template <class T, class G>
void adamw_step(T* weight, const G* gradient, float* first, float* second, int64_t count, const AdamWStep& s) {
  parallel((count + PER_TASK - 1) / PER_TASK, [&](int64_t task) {
    int64_t end = std::min(count, (task + 1) * PER_TASK);
    for (int64_t i = task * PER_TASK; i < end; i += LANES) {
      int64_t left = end - i;
      Vec g = load(gradient + i, left), m = load(first + i, left), v = load(second + i, left);
      m += (g - m) * s.first_rate;
      v = v * s.second_keep + g * g * s.second_rate;
      Vec w = load(weight + i, left) * s.keep;
      w = w - m / (square_root(v) * s.second_scale + s.eps) * s.rate;
      store(first + i, m, left);
      store(second + i, v, left);
      WordVec number = (WordVec)lane_numbers() + uint32_t(s.offset + i);
      store_rounded(weight + i, w, sizeof(T) == 2 ? mixed(number * 0x9e3779b9u + s.key) : number, left);
    }
  });
}

template <class T>
double square_sum(const T* x, int64_t count) {
  int64_t tasks = (count + PER_TASK - 1) / PER_TASK;
  std::vector<double> partial(static_cast<size_t>(tasks));
  parallel(tasks, [&](int64_t task) {
    int64_t end = std::min(count, (task + 1) * PER_TASK);
    double total = 0;
    for (int64_t chunk = task * PER_TASK; chunk < end; chunk += CHUNK) {
      Two sums[2] = {};
      int64_t stop = std::min(end, chunk + CHUNK), i = chunk;
      for (; i + 2 * TWO <= stop; i += 2 * TWO)
        for (int k = 0; k < 2; ++k) {
          Two v = load_two(x + i + k * TWO);
          sums[k] += v * v;
        }
      over_row(stop - i, [&](int64_t at, auto left) {
        Two v = load_two(x + i + at, left);
        sums[0] += v * v;
      });
      total += sum(sums[0] + sums[1]);
    }
    partial[task] = total;
  });
  double total = 0;
  for (double part : partial) total += part;
  return total;
}

uint64_t checksum(const char* bytes, int64_t count) {
  int64_t words = count / 8, tasks = (words + PER_TASK - 1) / PER_TASK;
  constexpr uint64_t STEP = 0x9e3779b97f4a7c15u;
  std::vector<uint64_t> partial(static_cast<size_t>(tasks));
  parallel(tasks, [&](int64_t task) {
    uint64_t total = 0, end = uint64_t(std::min(words, (task + 1) * PER_TASK));
    for (uint64_t i = uint64_t(task * PER_TASK); i < end; ++i) {
      uint64_t word;
      std::memcpy(&word, bytes + 8 * i, 8);
      total += mix(word + (i + 1) * STEP);
    }
    partial[task] = total;
  });
  uint64_t total = mix(uint64_t(count)), rest = 0;
  for (uint64_t part : partial) total += part;
  if (count % 8) {
    std::memcpy(&rest, bytes + 8 * words, size_t(count % 8));
    total += mix(rest + uint64_t(words + 1) * STEP);
  }
  return total;
}

template void adamw_step<float, float>(float*, const float*, float*, float*, int64_t, const AdamWStep&);
template void adamw_step<BFloat16, float>(BFloat16*, const float*, float*, float*, int64_t, const AdamWStep&);
template void adamw_step<BFloat16, BFloat16>(BFloat16*, const BFloat16*, float*, float*, int64_t, const AdamWStep&);
template double square_sum<float>(const float*, int64_t);
template double square_sum<BFloat16>(const BFloat16*, int64_t);

}  // namespace liaoyuan
