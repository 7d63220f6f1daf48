// Weights of 8 or 4 bits as rows of bytes: blocks along the depth, whose planes follow each other, or lie in the nibbles
// of the same bytes (ops/quantised_linear.py). 16 outputs are turned as 16 x 16 words of memory, so that they lie along
// the lanes.
#pragma once
#include "kernels.h"

namespace liaoyuan {

using Bits = QuantisedBits;

constexpr int PLANES = 4, PLANE = 32;
constexpr int64_t WEIGHTS = PLANES * PLANE;  // of a block: the depth is filled up to a multiple
constexpr int64_t TURNED = 64;               // bytes of an output that are turned at a time

constexpr bool is_four(Bits bits) { return bits == Bits::int4 || bits == Bits::int4_zeros; }
constexpr int64_t block_bytes(Bits bits) { return is_four(bits) ? WEIGHTS / 2 : WEIGHTS; }

#define ALWAYS_INLINE [[gnu::always_inline]] inline  // values stay in registers

// Rows of bytes that follow each other. What is read past the end of one belongs to the next: it is multiplied by zero.
struct ByteRows {
  const uint8_t *bytes, *end;
  int64_t width;

  template <class T>
  static ByteRows of(const T* rows, int64_t first, int64_t count, int64_t width) {
    auto at = [&](int64_t row) { return reinterpret_cast<const uint8_t*>(rows + row * width); };
    return {at(first), at(count), width * int64_t(sizeof(T))};
  }

  // The bytes at ... at + size - 1 of `rows` rows where they lie, or as a copy with zeros past the end of the last.
  ALWAYS_INLINE ByteRows whole(int64_t at, int64_t rows, int64_t size, uint8_t* copy) const {
    if (end - bytes >= (rows - 1) * width + at + size) [[likely]]
      return {bytes + at, end, width};
    std::memset(copy, 0, size_t(rows * size));
    for (int64_t i = 0; i < rows; ++i)
      if (int64_t left = std::min(size, end - bytes - i * width - at); left > 0)
        std::memcpy(copy + i * size, bytes + i * width + at, size_t(left));
    return {copy, copy + rows * size, size};
  }

  // Bytes at ... at + 63 of 16 rows: columns [16 words of memory, 16 rows]; zeros past the end of the last row.
  ALWAYS_INLINE void turn(int64_t at, Vec* columns) const {
    alignas(64) uint8_t copy[LANES * TURNED];
    ByteRows rows = whole(at, LANES, TURNED, copy);
    turn_words(rows.bytes, rows.width, columns);
  }

 private:
  ALWAYS_INLINE static void turn_words(const void* from, int64_t stride, Vec* columns) {
#ifdef __AVX512F__
    transpose_words(from, stride, columns);
#else
    alignas(64) uint32_t turned[LANES * LANES];
    transpose(from, stride, turned);
    for (int i = 0; i < LANES; ++i) read(turned + i * LANES, columns[i]);
#endif
  }
};

}  // namespace liaoyuan
