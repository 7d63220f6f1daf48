// Linear with weights of 8 or 4 bits, which are widened on their way from memory to the multiplication: by registers of
// 16 lanes word by word (widening.h), by others byte by byte (narrow.h).
//
// A few rows are multiplied by them in registers. For more, a panel of outputs is widened into the nearest cache, some
// of the depth at a time, and multiplied by all rows there (plane_products.h). Both sum in the same order, so a row's
// bits depend on that row alone.
#include "plane_products.h"
#ifdef __AVX512F__
#include "widening.h"
#else
#include "narrow.h"
#endif

namespace liaoyuan {

namespace {

constexpr int64_t FEW = 4;  // rows, as far as the registers reach
constexpr int64_t ROWS_PER_TASK = 256, OUTPUTS_PER_TASK = 64;

template <Bits B>
using Kind = std::integral_constant<Bits, B>;

// SCALED: planes have scales, one for `of_scale` of them; else a whole output has one.
template <class E, class T, Bits B, bool SCALED>
class Plan {
  using Word = typename E::Word;
  static constexpr int64_t STEPS = PLANES * PLANE_STEPS<E>;
  static constexpr int64_t CUT = (E::WHOLE_STRIPS ? 128 : 256) / STEPS;  // blocks: at most 32 KiB of a panel
  static constexpr int CHAINS = liaoyuan::CHAINS<E, SCALED>;

  QuantisedWeights w;
  QuantisedShape s;
  const T *x, *bias;
  T* result;
  int64_t blocks, row_bytes, stride, of_scale;
  Word* rows = nullptr;

 public:
  Plan(const QuantisedWeights& weights, const T* x, const T* bias, T* result, const QuantisedShape& shape)
      : w(weights), s(shape), x(x), bias(bias), result(result), blocks(parts(s.depth, WEIGHTS)),
        row_bytes(is_four(B) ? blocks * block_bytes(B) : s.depth), stride((blocks * STEPS / LANES | 1) * LANES),
        of_scale(SCALED ? s.group / PLANE : PLANES) {}

  void run() {
    int64_t strips = parts(s.rows, E::STRIP), row_tasks = parts(s.rows, ROWS_PER_TASK);
    rows = static_cast<Word*>(scratch(3, size_t(strips * E::STRIP * stride) * sizeof(Word)));
    parallel(strips, [&](int64_t strip) { copy_rows(strip * E::STRIP, (strip + 1) * E::STRIP); });
    int64_t tasks = parts(s.columns, OUTPUTS_PER_TASK);
    bool few = !E::WHOLE_STRIPS && s.rows <= FEW;
    auto work = [&](int64_t task) {
      int64_t first = task % tasks * OUTPUTS_PER_TASK, end = std::min(s.columns, first + OUTPUTS_PER_TASK);
      if constexpr (!E::WHOLE_STRIPS)
        for (; few && first < end; first += LANES) with_rows([&](auto count) { few_rows<count>(first); });
      E::begin();
      for (; first < end; first += PANEL) many_rows(first, task / tasks * ROWS_PER_TASK);
      E::end();
    };
    // Of few rows: a thread's outputs follow each other in memory, task after task.
    few ? parallel_ranges(tasks * row_tasks, work) : parallel(tasks * row_tasks, work);
  }

 private:
  // Rows of x as words, zeros to the end of the last block; then rows of zeros, as far as they are read.
  void copy_rows(int64_t first, int64_t end) const {
    for (int64_t r = first; r < (E::WHOLE_STRIPS ? end : std::max(FEW, std::min(end, s.rows))); ++r)
      for (int64_t step = 0; step < blocks * STEPS; step += LANES) {
        int64_t left = r < s.rows ? s.depth - step * E::VALUES : 0;
        write(rows + r * stride + step, left > 0 ? E::along(x + r * s.depth + step * E::VALUES, left) : Vec{});
      }
  }

  // body(number of rows as a constant): a power of two, and rows past the end are zeros.
  template <int COUNT = 1, class Body>
  void with_rows(const Body& body) const {
    if (s.rows <= COUNT) return body(std::integral_constant<int, COUNT>{});
    if constexpr (COUNT < FEW) with_rows<COUNT * 2>(body);
  }

  struct Scales {  // [scales of all blocks, outputs]
    const float* scales = nullptr;
    const uint32_t* zeros = nullptr;  // twice in each word
    WordVec zero(int64_t at) const {
      WordVec found{};
      if (B == Bits::int4_zeros) read(zeros + at, found);
      return found;
    }
    Scales from(int64_t lane) const { return {scales + lane, zeros + lane}; }
    Register part(int64_t at) const {
      Register found;
      read(scales + at, found);
      return found;
    }
    Register zero_part(int64_t at) const {
      if (B != Bits::int4_zeros) return Register{};
      RegisterWords found;
      read(zeros + at, found);
      return (Register)((found & 0xfu) | 0x4b000000u) - 8388608.0f;  // 2^23 + n is n in the lowest bits
    }
  };

#ifdef __AVX512F__
  // 16 outputs from `first`.
  template <int COUNT>
  void few_rows(int64_t first) const {
    constexpr int TURNS = block_bytes(B) / TURNED, HELD = PLANES / TURNS;
    ByteRows outputs = ByteRows::of(w.data, first, s.columns, row_bytes);
    // Bytes take long enough to widen for what comes to be asked for line by line; nibbles do not.
    Ahead ahead{w.data + next(first, LANES) * row_bytes, is_four(B) ? TURNED * LANES / 64 : 1};
    Scales scales = scales_of(first, LANES);
    Vec sums[COUNT][CHAINS] = {};
    for (int64_t b = 0; b < blocks; ++b)
#pragma GCC unroll 2
      for (int t = 0; t < TURNS; ++t) {
        if (is_four(B)) ahead.ask();
        Vec columns[LANES], parts[HELD][COUNT] = {};
        outputs.turn(b * block_bytes(B) + t * TURNED, columns);
        auto at = [&](int p) { return b * PLANES + t * HELD + p; };
        auto zero = [&](int p) { return scales.zero(at(p) / of_scale * LANES); };
        over_words<B, Word>(columns, zero, [&](int p, int step, const Vec& word) {
          if (!is_four(B) && step % (4 / E::VALUES) == 0) ahead.ask();
#pragma GCC unroll 4
          for (int r = 0; r < COUNT; ++r) {
            Vec& sum = SCALED ? parts[p][r] : sums[r][SCALED ? 0 : t * HELD + p];
            E::add_product(sum, rows[r * stride + at(p) * PLANE_STEPS<E> + step], word);
          }
        });
#pragma GCC unroll 4
        for (int p = 0; p < HELD && SCALED; ++p)
#pragma GCC unroll 4
          for (int r = 0; r < COUNT; ++r)
            sums[r][0] = fused(parts[p][r], load(scales.scales + at(p) / of_scale * LANES), sums[r][0]);
      }
#pragma GCC unroll 4
    for (int r = 0; r < COUNT; ++r)
      if (r < s.rows) finish(r, first, total_of(sums[r]));
  }

  // Words [steps, 16] of the blocks b ... end - 1 of 16 outputs.
  void widen(int64_t first, int64_t b, int64_t end, const Scales& scales, int64_t n, int64_t width, Word* to) const {
    constexpr int TURNS = block_bytes(B) / TURNED, HELD = PLANES / TURNS;
    ByteRows outputs = ByteRows::of(w.data, first, s.columns, row_bytes);
    for (int64_t turn = b * TURNS; turn < end * TURNS; ++turn) {
      Vec columns[LANES];
      outputs.turn(turn * TURNED, columns);
      auto zero = [&](int p) { return scales.zero((turn * HELD + p) / of_scale * width + n); };
      over_words<B, Word>(columns, zero, [&](int p, int step, const Vec& word) {
        write(to + (((turn - b * TURNS) * HELD + p) * PLANE_STEPS<E> + step) * width, word);
      });
    }
  }
#else
  // 16 outputs from `first`: of them, and of the planes, as many at once as leave registers for their sums.
  template <int COUNT>
  void few_rows(int64_t first) const {
    constexpr int AT_ONCE = std::clamp(8 / COUNT, 1, PLANES), SIDES = COUNT == 1 && REGISTERS == 2 ? 2 : 1;
    constexpr int64_t TIMES = NarrowBlock<B>::RUNS * NarrowBlock<B>::ROWS * PLANES / AT_ONCE;  // a block
    Evenly ahead{w.data + std::min(s.columns, first + LANES) * row_bytes, block_bytes(B) * WIDTH * SIDES / TIMES};
    Scales scales = scales_of(first, LANES);
    alignas(64) float totals[COUNT][CHAINS][LANES];
    for (int64_t lane = 0; lane < LANES; lane += SIDES * WIDTH) {
      Register sums[COUNT][CHAINS][SIDES] = {};
      for (int64_t b = 0; b < blocks; ++b) {
        NarrowBlock<B> sides[SIDES];
        for (int i = 0; i < SIDES; ++i)
          sides[i].read(ByteRows::of(w.data, first + lane + i * WIDTH, s.columns, row_bytes), b);
        add_planes<AT_ONCE>(sides, b * PLANES, scales.from(lane), ahead, sums);
      }
      for (int r = 0; r < COUNT; ++r)
        for (int c = 0; c < CHAINS; ++c)
          for (int i = 0; i < SIDES; ++i) write(totals[r][c] + lane + i * WIDTH, sums[r][c][i]);
    }
    for (int r = 0; r < std::min<int64_t>(COUNT, s.rows); ++r) {
      Vec sums[CHAINS];
      for (int c = 0; c < CHAINS; ++c) sums[c] = load(totals[r][c]);
      finish(r, first, total_of(sums));
    }
  }

  // sums += planes P ... 3 of blocks side by side, the first of which is plane `at` of the depth.
  template <int AT_ONCE, int P = 0, int COUNT, int SIDES>
  ALWAYS_INLINE void add_planes(const NarrowBlock<B> (&sides)[SIDES], int64_t at, const Scales& scales, Evenly& ahead,
                                Register (&sums)[COUNT][CHAINS][SIDES]) const {
    constexpr int CHAIN = SCALED ? 0 : P;
    Register parts[AT_ONCE][COUNT][SIDES] = {}, zeros[AT_ONCE][SIDES];
#pragma GCC unroll 4
    for (int p = 0; p < AT_ONCE; ++p)
#pragma GCC unroll 2
      for (int i = 0; i < SIDES; ++i) {
        zeros[p][i] = scales.zero_part((at + P + p) / of_scale * LANES + i * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT && !SCALED; ++r) parts[p][r][i] = sums[r][CHAIN + p][i];
      }
    const Word* x = rows + (at + P) * PLANE;
    for (int run = 0; run < NarrowBlock<B>::RUNS; ++run)
      for (int row = 0; row < NarrowBlock<B>::ROWS; ++row, ahead.ask())
#pragma GCC unroll 2
        for (int each = 0; each < NarrowBlock<B>::EACH; ++each, ++x)
          [&]<int... p>(std::integer_sequence<int, p...>) {
            (add_step<P + p>(sides, run, row, each, zeros[p], x + p * PLANE, parts[p]), ...);
          }(std::make_integer_sequence<int, AT_ONCE>{});
#pragma GCC unroll 4
    for (int p = 0; p < AT_ONCE; ++p)
#pragma GCC unroll 2
      for (int i = 0; i < SIDES; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; ++r)
          if constexpr (SCALED)
            sums[r][0][i] =
                fused(parts[p][r][i], scales.part((at + P + p) / of_scale * LANES + i * WIDTH), sums[r][0][i]);
          else
            sums[r][CHAIN + p][i] = parts[p][r][i];
    if constexpr (P + AT_ONCE < PLANES) add_planes<AT_ONCE, P + AT_ONCE>(sides, at, scales, ahead, sums);
  }
  template <int P, int COUNT, int SIDES>
  ALWAYS_INLINE void add_step(const NarrowBlock<B> (&sides)[SIDES], int run, int row, int each,
                              const Register (&zeros)[SIDES], const Word* x, Register (&sums)[COUNT][SIDES]) const {
#pragma GCC unroll 2
    for (int i = 0; i < SIDES; ++i) {
      Register value = sides[i].template value<P>(run, row, each, zeros[i]);
#pragma GCC unroll 8
      for (int r = 0; r < COUNT; ++r) E::add_product(sums[r][i], x[r * stride], value);
    }
  }

  // Words [steps, 16] of the blocks b ... end - 1 of 16 outputs.
  void widen(int64_t first, int64_t b, int64_t end, const Scales& scales, int64_t n, int64_t width, Word* to) const {
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
      ByteRows outputs = ByteRows::of(w.data, first + lane, s.columns, row_bytes);
      Scales own = scales.from(n + lane);
      for (int64_t block = b; block < end; ++block) {
        NarrowBlock<B> turned;
        turned.read(outputs, block);
        Word* from = to + lane + (block - b) * WEIGHTS * width;
        [&]<int... p>(std::integer_sequence<int, p...>) {
          (widen_plane<p>(turned, own.zero_part((block * PLANES + p) / of_scale * width), width,
                          from + p * PLANE * width),
           ...);
        }(std::make_integer_sequence<int, PLANES>{});
      }
    }
  }
  template <int P>
  ALWAYS_INLINE static void widen_plane(const NarrowBlock<B>& block, Register zeros, int64_t width, Word* to) {
    for (int run = 0; run < block.RUNS; ++run)
      for (int row = 0; row < block.ROWS; ++row)
#pragma GCC unroll 2
        for (int each = 0; each < block.EACH; ++each, to += width)
          write(to, block.template value<P>(run, row, each, zeros));
  }
#endif

  // PANEL outputs from `first` of the rows of a task.
  void many_rows(int64_t first, int64_t first_row) const {
    int64_t vectors = parts(std::min<int64_t>(PANEL, s.columns - first), LANES), width = vectors * LANES;
    int64_t count = std::min(s.rows - first_row, ROWS_PER_TASK), chain = count * PANEL;
    auto* words = static_cast<Word*>(scratch(0, size_t(CUT * STEPS * PANEL) * sizeof(Word)));
    auto* sums = static_cast<float*>(scratch(1, size_t(CHAINS * chain) * sizeof(float)));
    std::memset(sums, 0, size_t(CHAINS * chain) * sizeof(float));
    Scales scales = scales_of(first, width);
    Ahead ahead{w.data + next(first, PANEL) * row_bytes, 0};
    for (int64_t b = 0; b < blocks; b += CUT) {
      int64_t end = std::min(blocks, b + CUT);
      for (int64_t n = 0; n < width; n += LANES) widen(first + n, b, end, scales, n, width, words + n);
      ahead.lines = width * (end - b) * block_bytes(B) / 64;
      Items<Word> items{rows + first_row * stride + b * STEPS, stride};
      Cut cut{end - b, of_scale, scales.scales + b * PLANES / of_scale * width, &ahead};
      add_products<E, SCALED>(count, items, words, width, cut, sums);
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t n = 0; n < width; n += LANES) {
        Vec found[CHAINS];
        for (int c = 0; c < CHAINS; ++c) found[c] = load(sums + c * chain + r * PANEL + n);
        finish(first_row + r, first + n, total_of(found));
      }
  }

  // The outputs that this thread takes after `count` from `first`; they follow each other in memory.
  int64_t next(int64_t first, int64_t count) const {
    bool last = (first + count) % OUTPUTS_PER_TASK == 0;
    return std::min(s.columns, first + count + (last ? (threads() - 1) * OUTPUTS_PER_TASK : 0));
  }

  Scales scales_of(int64_t first, int64_t width) const {
    Scales found;
    if constexpr (SCALED) {
      int64_t size = blocks * PLANES / of_scale * width;
      auto* scales = static_cast<float*>(scratch(2, size_t(size) * 2 * sizeof(float)));
      auto* zeros = reinterpret_cast<uint32_t*>(scales + size);
      turn_all(w.scales, first, width, [&](int64_t at, WordVec scale) { write(scales + at, scale << 16); });
      if constexpr (B == Bits::int4_zeros)
        turn_all(w.zeros, first, width, [&](int64_t at, WordVec zero) { write(zeros + at, zero | (zero << 16)); });
      found = {scales, zeros};
    }
    return found;
  }
  // put(place in [scales, width], 16 numbers as words) for those of `width` outputs.
  template <class Number, class Put>
  void turn_all(const Number* numbers, int64_t first, int64_t width, const Put& put) const {
    constexpr int SIZE = sizeof(Number), EACH = 4 / SIZE;  // numbers in a word
    for (int64_t n = 0; n < width; n += LANES)
      for (int64_t at = 0; at < blocks * PLANES / of_scale; at += LANES * EACH) {
        Vec columns[LANES];
        ByteRows::of(numbers, first + n, s.columns, s.groups).turn(at * SIZE, columns);
        for (int64_t i = 0; i < std::min<int64_t>(LANES * EACH, blocks * PLANES / of_scale - at); ++i) {
          WordVec word = (WordVec)columns[i / EACH] >> int(i % EACH * SIZE * 8);
          put((at + i) * width + n, word & (SIZE == 1 ? 0xffu : 0xffffu));
        }
      }
  }

  // The scale of whole outputs and the bias, for up to 16 outputs of a row.
  void finish(int64_t row, int64_t first, Vec value) const {
    int64_t count = std::min<int64_t>(LANES, s.columns - first);
    if (!SCALED) value = value * load(w.scales + first, count);
    if (bias) value += load(bias + first, count);
    store(result + row * s.columns + first, value, count);
  }
};

template <class E, class T>
void by_bits(const QuantisedWeights& w, const T* x, const T* bias, T* result, const QuantisedShape& s) {
  auto run = [&](auto bits, auto scaled) { Plan<E, T, bits, scaled>(w, x, bias, result, s).run(); };
  using Scaled = std::true_type;
  switch (w.bits) {
    case Bits::int8: return s.group ? run(Kind<Bits::int8>{}, Scaled{}) : run(Kind<Bits::int8>{}, std::false_type{});
    case Bits::fp8: return run(Kind<Bits::fp8>{}, std::false_type{});
    case Bits::int4: return run(Kind<Bits::int4>{}, Scaled{});
    case Bits::int4_zeros: return run(Kind<Bits::int4_zeros>{}, Scaled{});
  }
}

}  // namespace

template <>
void quantised_linear(const QuantisedWeights& w, const float* x, const float* bias, float* result,
                      const QuantisedShape& s) {
  by_bits<LaneProducts<float>>(w, x, bias, result, s);
}

template <>
void quantised_linear(const QuantisedWeights& w, const BFloat16* x, const BFloat16* bias, BFloat16* result,
                      const QuantisedShape& s) {
#if defined(HAS_AMX) && defined(__AVX512BF16__)  // each AMX unit stands beside it; an emulated one may not
  if (amx_permitted()) return by_bits<TileProducts>(w, x, bias, result, s);
#endif
#ifdef __AVX512BF16__
  by_bits<PairProducts>(w, x, bias, result, s);
#else
  by_bits<LaneProducts<BFloat16>>(w, x, bias, result, s);
#endif
}

}  // namespace liaoyuan
