// The rotation of a head's halves, in whole vectors: a half that is none is laid out with room for zeros behind it.
#pragma once
#include "kernels.h"
#include "rounding.h"

namespace liaoyuan {

constexpr int MAX_DIM = 512;  // of a head; the binding refuses more
constexpr int MAX_ROOM = MAX_DIM + 2 * LANES;

template <class T>
inline void copy(const T* from, T* to, int64_t count) {
  constexpr int64_t STEP = sizeof(WordVec) / sizeof(T);
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP) {
    WordVec words;
    read(from + i, words);
    write(to + i, words);
  }
  if (i < count) std::memcpy(to + i, from + i, size_t(count - i) * sizeof(T));
}

struct HeadLayout {
  int64_t half, room;  // elements of a half, and those that it is given

  explicit HeadLayout(int64_t dim) : half(dim / 2), room((dim / 2 + LANES - 1) / LANES * LANES) {}
  bool is_dense() const { return half == room; }

  // The head itself, or its halves with zeros behind them, in `space`.
  template <class T>
  const T* laid_out(const T* head, T* space) const {
    if (is_dense()) return head;
    std::memset(space, 0, size_t(2 * room) * sizeof(T));
    copy(head, space, half);
    copy(head + half, space + room, half);
    return space;
  }
  template <class T>
  void bring_back(const T* space, T* head) const {
    if (space == head) return;
    copy(space, head, half);
    copy(space + room, head + half, half);
  }
};

struct Angle {
  const float *cosine, *sine;
};

// A row's angles, in `space` (two rooms) if a half is not whole vectors.
inline Angle laid_out(const HeadLayout& layout, const float* cosine, const float* sine, float* space) {
  if (layout.is_dense()) return {cosine, sine};
  std::memset(space, 0, size_t(2 * layout.room) * sizeof(float));
  copy(cosine, space, layout.half);
  copy(sine, space + layout.room, layout.half);
  return {space, space + layout.room};
}

// direction is 1, or -1 for the way back.
struct Turned {
  Vec first, second;
};
template <int direction>
inline Turned turned(Vec first, Vec second, const Angle& angle, int64_t i) {
  Vec c = load(angle.cosine + i), s = load(angle.sine + i);
  if constexpr (direction > 0) return {first * c - second * s, second * c + first * s};
  return {first * c + second * s, second * c - first * s};
}

template <int direction, class From, class To>
inline void turn(const From* from, const Angle& angle, To* to, int64_t room) {
  for (int64_t i = 0; i < room; i += LANES) {
    Turned t = turned<direction>(load(from + i), load(from + room + i), angle, i);
    store_apart(to + i, t.first, to + room + i, t.second);
  }
}

// The same for a head with its halves as they lie in memory.
template <int direction, class T>
inline void turn_head(const T* from, const Angle& angle, T* to, const HeadLayout& layout) {
  if (layout.is_dense()) return turn<direction>(from, angle, to, layout.room);
  T space[MAX_ROOM];
  turn<direction>(layout.laid_out(from, space), angle, space, layout.room);
  layout.bring_back(space, to);
}

}  // namespace liaoyuan
