// Weights of few bits where registers hold fewer than 16 lanes: the bytes of a block of as many outputs as a register
// has lanes are turned, so that those of one step lie side by side, and become floats a register at a time.
#pragma once
#include "byte_rows.h"
#include "engines.h"

namespace liaoyuan {

// Memory that is needed later, asked for line by line while work goes on: `bytes` at a time, parts of lines too.
struct Evenly {
  const uint8_t* next;
  int64_t bytes;
  const uint8_t* until = next;
  ALWAYS_INLINE void ask() {
    for (until += bytes; next < until; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// A block of WIDTH outputs as small integers: the weights themselves, the bits of fp8, or how far nibbles lie above 8
// (where outputs have zeros of their own: above 0).
template <Bits B>
class NarrowBlock {
  static constexpr int BYTES = 32;  // of an output, turned at once; [steps / 2, two halves of those steps, 2, outputs]
  static constexpr int TURNS = int(block_bytes(B)) / BYTES, SIZE = BYTES * WIDTH;
  alignas(32) int8_t values[WEIGHTS * WIDTH];

 public:
  // The steps of a plane, in their order: [runs, rows, each].
  static constexpr int RUNS = is_four(B) ? 4 : 2, ROWS = 8, EACH = is_four(B) ? 1 : 2;

  ALWAYS_INLINE void read(const ByteRows& outputs, int64_t block) {
    alignas(32) uint8_t copy[WIDTH * block_bytes(B)];
    ByteRows rows = outputs.whole(block * block_bytes(B), WIDTH, block_bytes(B), copy);
    for (int t = 0; t < TURNS; ++t) turn(rows.bytes + t * BYTES, rows.width, values + t * SIZE);
  }

  // The outputs' values of a step of plane P. zeros: what is taken from each, where outputs have zeros of their own.
  template <int P>
  ALWAYS_INLINE Register value(int run, int row, int each, Register zeros) const {
    RegisterInts found = integers(values + place<P>(run, row, each));
    if constexpr (B == Bits::fp8)  // e4m3: the bias is 7, not 127; the sign is all bits above the byte
      return (Register)((found << 20) & int32_t(0x87f00000)) * 0x1p120f;
    else
      return B == Bits::int4_zeros ? to_floats(found) - zeros : to_floats(found);
  }

 private:
  template <int P>
  static constexpr int place(int run, int row, int each) {
    int four = row * 4 * WIDTH;  // what a row of a square holds of each output
    if (is_four(B)) return P % 2 * TURNS * SIZE + run / 2 * SIZE + four + (run % 2 * 2 + P / 2) * WIDTH;
    return P * SIZE + four + (run * 2 + each) * WIDTH;
  }

  // Nibbles part into two: lower ones, and TURNS * SIZE bytes on upper ones.
  ALWAYS_INLINE static void put(int8_t* to, ByteRegister bytes) {
    if constexpr (is_four(B)) {
      constexpr int ZERO = B == Bits::int4 ? 8 : 0;
      ByteRegister upper = (ByteRegister)((RegisterWords)bytes >> 4);
      write(to, (bytes & int8_t(15)) - int8_t(ZERO));
      write(to + TURNS * SIZE, (upper & int8_t(15)) - int8_t(ZERO));
    } else {
      write(to, bytes);
    }
  }
  ALWAYS_INLINE static void turn(const uint8_t* from, int64_t stride, int8_t* to) {
    ByteRegister rows[SIZE / sizeof(ByteRegister)];
    transpose_bytes(from, stride, rows);
    for (int i = 0; i < SIZE; i += int(sizeof(ByteRegister))) put(to + i, rows[i / int(sizeof(ByteRegister))]);
  }
};

}  // namespace liaoyuan
