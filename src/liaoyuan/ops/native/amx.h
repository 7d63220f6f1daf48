// Intel's tile registers (AMX). Where EMULATED_AMX is defined a model of the instructions in plain C++ takes their
// place, so that what is written with them can be proven on machines that have none.
//
// tdpbf16ps adds the products of even and of odd elements of a pair on their own, each rounded to fp32, then both
// sums to the tile; numbers below the normal ones count as zero. Sums differ from those of other units by roundings.
#pragma once
#include "vector.h"

#if defined(__AMX_BF16__) || defined(EMULATED_AMX)
#define HAS_AMX
#include <immintrin.h>
#endif
#ifdef EMULATED_AMX
#undef __AMX_BF16__  // also where there are units
#endif

namespace liaoyuan {

#if defined(EMULATED_AMX)
inline bool amx_permitted() { return true; }
#elif defined(__AMX_BF16__)
bool amx_permitted();  // asks the kernel of the operating system once
#endif

#ifdef EMULATED_AMX
namespace emulated {

struct Tile {
  uint32_t words[16][16];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline float flushed(float value) { return __builtin_fabsf(value) < 0x1p-126f ? value * 0.0f : value; }
inline float element(uint32_t word, int odd) {
  return flushed(widen(BFloat16{uint16_t(odd ? word >> 16 : word)}));
}

inline void config(const void*) {
  configured = true;
  std::memset(tiles, 0, sizeof tiles);
}
inline void release() { configured = false; }
inline Tile& tile(int number) {
  if (!configured) __builtin_trap();
  return tiles[number];
}
inline void zero(int to) { std::memset(&tile(to), 0, sizeof(Tile)); }
inline void load(int to, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tile(to).words[r], static_cast<const char*>(from) + r * stride, 64);
}
inline void store(int from, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile(from).words[r], 64);
}
inline void dot(int to, int left, int right) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sums[2] = {}, total;
      for (int k = 0; k < 16; ++k)
        for (int odd = 0; odd < 2; ++odd)
          sums[odd] = flushed(__builtin_fmaf(element(tile(left).words[m][k], odd),
                                             element(tile(right).words[k][n], odd), sums[odd]));
      std::memcpy(&total, &tile(to).words[m][n], 4);
      total = flushed(flushed(total) + flushed(sums[0] + sums[1]));
      std::memcpy(&tile(to).words[m][n], &total, 4);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::config
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::dot
#endif

#ifdef HAS_AMX
// All tiles of 16 rows of 64 bytes, until end().
struct Tiles {
  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }
  // The compiler does not know that the instructions read memory: what was written before stays before.
  static void written() { asm volatile("" ::: "memory"); }
};
#endif

}  // namespace liaoyuan
