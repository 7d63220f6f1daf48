// Products of matrices for any of the four storage orders, by the micro-kernel that suits the machine (engines.h).
//
// The lanes' operand is the right one, as a rule a weight, packed once; with few rows for its depth it is the left one
// where the weight is stored along the depth: so the weight can be read where it lies, and the product comes out turned.
// Up to a few rows the weight lies along the lanes again, packed by each task as it goes. Each element is summed along
// the depth in one order whatever the other sizes are, and in whichever panel it falls: a row's bits depend on it alone.
#include <vector>

#include "engines.h"
#include "far.h"
#include "packing.h"

namespace liaoyuan {

namespace {

// Panels that a task packs for itself, cut by cut, stay in the first cache: along the depth one of them, across it
// several, since rows are then read side by side.
constexpr int64_t CUT_ALONG = 64, CUT_ACROSS = 16, PANELS_ACROSS = 8;
// Where there is but one panel the other operand is read once: in long pieces, as memory likes it.
constexpr int64_t ONE_PANEL = 1 << 14;  // words of a cut: 64 KiB
constexpr int64_t TASK_ITEMS = 128;     // at least
// Few rows: vectors of lanes that a task takes. A weight then goes by once, at the speed of memory.
constexpr int64_t STREAM_VECTORS = 6;
constexpr int64_t SOON = 192;  // bytes of each row of such a weight that come into the first cache meanwhile

void put(float* to, Vec value) { store(to, value); }
void put(BFloat16* to, Vec value) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  store(to, value);
#endif
}
// Up to 16 of a row's elements, rounded once.
template <class T>
void put(T* to, Vec value, int64_t count) {
  if (count >= LANES) return put(to, value);
  T full[LANES];
  put(full, value);
  std::memcpy(to, full, size_t(count) * sizeof(T));
}

// One product, cut into tasks: first those that pack, then those that multiply.
template <class E, class T>
class Plan {
  using Word = typename E::Word;
  Product<T> p;
  Source<T> lanes, items;
  bool turned;      // the lanes are the result's rows
  bool as_it_goes;  // panels are packed by the tasks that multiply, for few items
  bool added;       // a bias or a residual
  bool near;        // strips are copied by the tasks that multiply, cut by cut
  bool streams;     // few rows: see run_stream
  bool far = false;   // the weight of very few rows comes from memory
  bool first = false;  // such a weight is read first and used then
  int64_t steps, cut, vectors, panels, strips, stride, task_panels, task_strips;
  Word *packed_panels = nullptr, *packed_items = nullptr;

 public:
  explicit Plan(const Product<T>& product) : p(product) {
    const MatrixShape& s = p.shape;
    Source<T> left{p.a, s.a_stride, s.rows, s.depth, !s.a_transposed};
    Source<T> right{p.b, s.b_stride, s.columns, s.depth, s.b_transposed};
    as_it_goes = s.rows <= (right.along ? E::FEW : E::STRIP);
    streams = E::STREAMS && as_it_goes && right.along;
    turned = right.along && !as_it_goes && s.rows < s.depth / 2;  // else turning the result costs more than packing
    lanes = turned ? left : right;
    items = turned ? right : left;
    steps = parts(s.depth, E::VALUES * E::STEP) * E::STEP;
    vectors = parts(lanes.count, LANES);
    panels = parts(vectors * LANES, E::PANEL);
    strips = parts(items.count, E::STRIP);
    cut = !as_it_goes ? E::CUT : streams ? steps : lanes.along ? CUT_ALONG : CUT_ACROSS;
    if (panels == 1 && turned) cut = std::max(cut, ONE_PANEL / (vectors * LANES * E::STEP) * E::STEP);
    task_panels = !as_it_goes ? E::TASK_PANELS : lanes.along ? 1 : PANELS_ACROSS;
    task_strips = std::max(TASK_ITEMS / E::STRIP, E::TASK_STRIPS * std::min(panels, task_panels) / task_panels);
    stride = padded(items.along ? cut : steps);
    near = items.along && must_be_copied();
    added = p.bias || p.residual;
  }

  int64_t lane_count() const { return lanes.count; }
  bool lanes_are_rows() const { return turned; }
  bool is_stream() const { return streams; }
  int64_t words() const {  // of memory that all tasks share
    return (as_it_goes ? 0 : vectors * LANES * steps) + (items.along ? 0 : strips * E::STRIP * stride);
  }
  void use(Word* memory) {
    packed_panels = memory;
    packed_items = memory + (as_it_goes ? 0 : vectors * LANES * steps);
    // Narrower registers take so much longer to turn words that reading first brings nothing.
    if (REGISTERS == 1 && streams && p.shape.rows <= 2 && lanes.stride == lanes.depth)
      far = is_far(lanes.matrix, weight_bytes());
  }
  // Let a weight that comes from memory be read in the way that is faster here.
  template <class Work>
  void try_ways(const Work& work) {
    thread_local Trial trial;
    if (!far) return work();
    trial.time(first = trial.choose(), weight_bytes(), work);
  }

  int64_t pack_tasks() const { return panel_tasks() + (items.along ? 0 : strips); }
  void pack(int64_t task) const {
    if (int64_t j = task - panel_tasks(); j >= 0)
      return pack_items<E>(items, j * E::STRIP, E::STRIP, 0, parts(steps, LANES) * LANES,
                           packed_items + j * E::STRIP * stride, stride);
    pack_panels(task * task_panels, std::min(panels, (task + 1) * task_panels), 0, steps,
                packed_panels + begin(task * task_panels) * steps);
  }

  int64_t tasks() const {
    return streams ? parts(vectors, STREAM_VECTORS) : parts(panels, task_panels) * parts(strips, task_strips);
  }
  void run(int64_t task) const {
    if constexpr (E::STREAMS)
      if (streams) return run_stream(task);
    int64_t groups = parts(strips, task_strips);
    int64_t i_first = task / groups * task_panels, i_end = std::min(panels, i_first + task_panels);
    int64_t j_first = task % groups * task_strips, j_end = std::min(strips, j_first + task_strips);
    constexpr int64_t BLOCK = E::STRIP * E::PANEL, BLOCKS = std::max(E::TASK_PANELS * E::TASK_STRIPS, PANELS_ACROSS);
    float* sums = static_cast<float*>(scratch(1, size_t(BLOCK * BLOCKS) * 4));
    auto* copy = static_cast<Word*>(near ? scratch(0, size_t(E::STRIP * stride) * 4) : nullptr);
    alignas(64) Word fresh[std::max(CUT_ALONG, CUT_ACROSS * PANELS_ACROSS) * E::PANEL];
    E::begin();
    int64_t step = 0;
    do {  // once where there is no depth: the sums are zero
      int64_t count = std::min(cut, steps - step);
      if (as_it_goes) pack_panels(i_first, i_end, step, count, fresh);
      for (int64_t j = j_first; j < j_end; ++j) {
        Items<Word> strip = near ? copied(j, step, count, copy) : shared(j, step);
        for (int64_t i = i_first; i < i_end; ++i) {
          int64_t lane = begin(i), wide = begin(i + 1) - lane;
          Block block{lane, std::min(wide, lanes.count - lane), j * E::STRIP,
                      std::min<int64_t>(E::STRIP, items.count - j * E::STRIP)};
          const Word* panel = as_it_goes ? fresh + (lane - begin(i_first)) * count
                                         : packed_panels + lane * steps + step * wide;
          float* own = sums + (steps > cut ? (j - j_first) * task_panels + i - i_first : 0) * BLOCK;
          if (step + cut >= steps && !turned) expect(block);
          E::strip(strip, block.items, panel, wide, count, step > 0, own);
          if (step + cut >= steps) turned ? store_turned(block, own) : store_rows(block, own);
        }
      }
    } while ((step += cut) < steps);
    E::end();
  }

 private:
  int64_t weight_bytes() const { return lanes.count * lanes.stride * int64_t(sizeof(T)); }

  // Few rows times a weight that lies along the depth: squares of its words are turned in registers, and used there.
  // What this thread needs next comes while it works, if it is asked for in the order of memory, a line after each
  // column: a core has few places for lines that are on their way, and what finds none is not fetched. That is best
  // where a cache gives it. From memory it is so on some machines; others give their full rate to nothing but a thread
  // that only reads, in that order: there a weight is read first and used then, some vectors together, whose sums need
  // not wait for each other.
  void run_stream(int64_t task) const {
    auto* copy = static_cast<Word*>(near ? scratch(0, size_t(E::STRIP * stride) * 4) : nullptr);
    Items<Word> x = items.count == 0 ? Items<Word>{} : near ? copied(0, 0, steps, copy) : shared(0, 0);
    int64_t v = task * STREAM_VECTORS, end = std::min(vectors, v + STREAM_VECTORS);
    with_rows<E::FEW>([&](auto rows) {
      constexpr int MANY = rows <= 2 ? 3 : 1;
      for (; first && (v + MANY) * LANES <= std::min(end * LANES, lanes.count); v += MANY) {
        read_lines(lanes.matrix + v * LANES * lanes.stride, MANY * LANES * lanes.stride * int64_t(sizeof(T)));
        stream_vectors<rows, MANY>(v * LANES, x, nullptr);
      }
      for (; v < end; ++v)
        stream_vectors<rows, 1>(v * LANES, x,
                                v + 1 < vectors ? lanes.matrix + (v + 1) * LANES * lanes.stride : nullptr);
    });
  }

  // body(number of rows as a constant), of 1 ... MOST.
  template <int64_t MOST, class Body>
  void with_rows(const Body& body) const {
    if (items.count == MOST) return body(std::integral_constant<int, int(MOST)>{});
    if constexpr (MOST > 1) with_rows<MOST - 1>(body);
  }

  template <int ROWS, int VECTORS>
  void stream_vectors(int64_t lane, Items<Word> x, const T* ahead) const {
    constexpr int PARTS = VECTORS * REGISTERS;
    constexpr int64_t SPAN = WIDTH * E::SPLIT;  // steps that are turned at once
    Register sums[PARTS][ROWS] = {};
    bool whole = lane + VECTORS * LANES <= lanes.count;
    int64_t step = 0;
    for (; whole && (step + SPAN) * E::VALUES <= lanes.depth; step += SPAN) {
#pragma GCC unroll 6
      for (int n = 0; n < PARTS; ++n) {
        Register columns[WIDTH];
        const T* square = lanes.matrix + (lane + n * WIDTH) * lanes.stride + step * E::VALUES;
        transpose_words(square, lanes.stride * int64_t(sizeof(T)), columns);
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; ++i) {
          if (n == 0 && ahead) __builtin_prefetch(reinterpret_cast<const char*>(ahead) + 64 * i, 0, 2);
          if (REGISTERS == 1) __builtin_prefetch(reinterpret_cast<const char*>(square + i * lanes.stride) + SOON);
          Register parted[E::SPLIT];
          E::split(columns[i], parted);
#pragma GCC unroll 2
          for (int k = 0; k < E::SPLIT; ++k) add_column(parted[k], x, step + i * E::SPLIT + k, sums[n]);
        }
      }
      if (ahead) ahead += LANES * SPAN * E::VALUES;
    }
    for (; step < steps; step += LANES)
      for (int n = 0; n < VECTORS; ++n) {
        alignas(64) Word block[LANES * LANES];
        turned_words<E>(lanes, lane + n * LANES, step, LANES, block, LANES);
        for (int64_t i = 0; i < std::min<int64_t>(LANES, steps - step); ++i)
          for (int k = 0; k < REGISTERS; ++k) {
            Register column;
            std::memcpy(&column, block + i * LANES + k * WIDTH, sizeof column);
            add_column(column, x, step + i, sums[n * REGISTERS + k]);
          }
      }
    for (int n = 0; n < VECTORS; ++n)
      for (int r = 0; r < ROWS; ++r) {
        int64_t at = lane + n * LANES;
        Register own[REGISTERS];
        for (int k = 0; k < REGISTERS; ++k) own[k] = sums[n * REGISTERS + k][r];
        Vec sum;
        read(own, sum);
        finish(r, at, sum, std::min<int64_t>(LANES, lanes.count - at));
      }
  }

  template <int ROWS>
  [[gnu::always_inline]] static void add_column(Register column, Items<Word> x, int64_t step, Register (&sums)[ROWS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      Word word;
      std::memcpy(&word, x.words + r * x.stride + step, sizeof word);
      E::add_product(sums[r], word, column);
    }
  }

  // An odd number of lines from item to item, so that they fall into all sets of a cache.
  static int64_t padded(int64_t words) { return (parts(words, LANES) | 1) * LANES; }

  bool must_be_copied() const {
    if (!E::IN_PLACE || p.shape.depth % (E::VALUES * E::STEP) || items.stride % E::VALUES) return true;
    if (E::WHOLE_STRIPS) return panels > 2 || items.count % E::STRIP;
    return false;
  }

  // Panels of equal width, as far as lanes allow: two of 32 rather than one of 48 and one of 16.
  int64_t begin(int64_t panel) const { return (vectors * panel + panels - 1) / panels * LANES; }

  int64_t panel_tasks() const { return as_it_goes ? 0 : parts(panels, task_panels); }
  // Panels one after the other, each [count, width], of the words from `step`.
  void pack_panels(int64_t from, int64_t end, int64_t step, int64_t count, Word* to) const {
    constexpr int64_t ROWS = 4;  // are read side by side
    for (int64_t k = 0; k < count; k += lanes.along ? count : ROWS)
      for (int64_t i = from; i < end; ++i) {
        Word* panel = to + (begin(i) - begin(from)) * count;
        int64_t wide = begin(i + 1) - begin(i);
        if (lanes.along)
          words_along<E>(lanes, begin(i), wide, step, count, panel);
        else
          words_across<E>(lanes, begin(i), wide, step + k, std::min(count - k, ROWS), panel + k * wide, wide);
      }
  }

  Items<Word> shared(int64_t j, int64_t step) const {
    if (!items.along) return {packed_items + j * E::STRIP * stride + step, stride};
    return {reinterpret_cast<const Word*>(items.matrix + j * E::STRIP * items.stride) + step, items.stride / E::VALUES};
  }
  Items<Word> copied(int64_t j, int64_t step, int64_t count, Word* to) const {
    int64_t rows = E::WHOLE_STRIPS ? E::STRIP : std::min<int64_t>(E::STRIP, items.count - j * E::STRIP);
    pack_items<E>(items, j * E::STRIP, rows, step, parts(count, LANES) * LANES, to, stride);
    return {to, stride};
  }

  // `count` elements of the result's row `row` from `column`.
  void finish(int64_t row, int64_t column, Vec sums, int64_t count) const {
    int64_t at = row * p.shape.c_stride + column;
    if (!added && count >= LANES) return put(p.c + at, sums);
    if (p.bias) sums += load(p.bias + column, count);
    if (p.residual) sums += load(p.residual + at, count);
    put(p.c + at, sums, count);
  }

  struct Block {
    int64_t lane, lanes, item, items;  // where it begins, and how much of it there is
  };
  void expect(const Block& b) const {
    for (int64_t r = 0; r < b.items; ++r)
      for (int64_t n = 0; n < b.lanes; n += 64 / sizeof(T))
        __builtin_prefetch(p.c + (b.item + r) * p.shape.c_stride + b.lane + n, 1);
  }
  void store_rows(const Block& b, const float* sums) const {
    bool whole = b.lanes == E::PANEL && !added;
    for (int64_t r = 0; r < b.items && whole; ++r) {  // the usual case, short enough for products of little depth
      T* to = p.c + (b.item + r) * p.shape.c_stride + b.lane;
#pragma GCC unroll 4
      for (int64_t n = 0; n < E::PANEL; n += LANES) put(to + n, load(sums + r * E::PANEL + n));
    }
    for (int64_t r = 0; r < b.items && !whole; ++r)
      for (int64_t n = 0; n < b.lanes; n += LANES)
        finish(b.item + r, b.lane + n, load(sums + r * E::PANEL + n), b.lanes - n);
  }

  // Whole lines of memory are written at a time.
  void store_turned(const Block& b, const float* sums) const {
    alignas(64) float tiles[E::STRIP / LANES][LANES * LANES];
    for (int64_t r = 0; r < b.lanes; r += LANES) {
      for (int64_t n = 0; n < b.items; n += LANES) transpose(sums + n * E::PANEL + r, E::PANEL * 4, tiles[n / LANES]);
      for (int64_t k = 0; k < std::min<int64_t>(LANES, b.lanes - r); ++k)
        for (int64_t n = 0; n < b.items; n += LANES)
          finish(b.lane + r + k, b.item + n, load(tiles[n / LANES] + k * LANES), b.items - n);
    }
  }
};

// Call body(plan, task) for the tasks of all plans, each of which has count(plan) of them.
template <class Plans, class Count, class Body>
void over_tasks(const Plans& plans, bool in_ranges, const Count& count, const Body& body) {
  std::vector<int64_t> ends;
  int64_t total = 0;
  for (const auto& plan : plans) ends.push_back(total += count(plan));
  auto one = [&](int64_t task) {
    size_t which = size_t(std::upper_bound(ends.begin(), ends.end(), task) - ends.begin());
    body(plans[which], task - (which ? ends[which - 1] : 0));
  };
  in_ranges ? parallel_ranges(total, one) : parallel(total, one);
}

template <class E, class T>
void run_plans(std::vector<Plan<E, T>>& plans) {
  int64_t words = 0;
  for (const auto& plan : plans) words += plan.words();
  auto* memory = static_cast<typename E::Word*>(scratch(3, size_t(words) * 4));
  for (auto& plan : plans) plan.use(memory), memory += plan.words();
  bool streams = std::all_of(plans.begin(), plans.end(), [](const auto& plan) { return plan.is_stream(); });
  auto multiply = [&] {
    over_tasks(plans, streams, [](const auto& p) { return p.tasks(); }, [](const auto& p, int64_t i) { p.run(i); });
  };
  over_tasks(plans, false, [](const auto& p) { return p.pack_tasks(); }, [](const auto& p, int64_t i) { p.pack(i); });
  plans.size() == 1 ? plans[0].try_ways(multiply) : multiply();
  plans.clear();
}

// The part of a product that has `count` rows (or columns) from `first`.
template <class T>
Product<T> part_of(Product<T> p, bool of_rows, int64_t first, int64_t count) {
  MatrixShape& s = p.shape;
  int64_t at = of_rows ? first * s.c_stride : first;
  p.c += at;
  if (p.residual) p.residual += at;
  if (p.bias && !of_rows) p.bias += first;
  if (of_rows)
    p.a += s.a_transposed ? first : first * s.a_stride, s.rows = count;
  else
    p.b += s.b_transposed ? first * s.b_stride : first, s.columns = count;
  return p;
}

template <class E, class T>
void multiply_with(const Product<T>* products, int64_t count) {
  constexpr int64_t MOST = 1 << 24;  // packed words at a time: 64 MiB
  std::vector<Plan<E, T>> plans;
  int64_t words = 0;
  for (const Product<T>* p = products; p < products + count; ++p) {
    Plan<E, T> whole(*p);
    int64_t all = whole.lane_count(), pieces = std::max<int64_t>(1, parts(whole.words(), MOST));
    int64_t step = parts(parts(all, pieces), E::PANEL) * E::PANEL;
    for (int64_t first = 0; first < all; first += step) {
      plans.emplace_back(part_of(*p, whole.lanes_are_rows(), first, std::min(step, all - first)));
      if ((words += plans.back().words()) >= MOST) run_plans(plans), words = 0;
    }
  }
  run_plans(plans);
}

}  // namespace

template <>
void multiply(const Product<float>* products, int64_t count) {
  multiply_with<LaneProducts<float>>(products, count);
}

template <>
void multiply(const Product<BFloat16>* products, int64_t count) {
#ifdef HAS_AMX
  if (amx_permitted()) return multiply_with<TileProducts>(products, count);
#endif
#ifdef __AVX512BF16__
  multiply_with<PairProducts>(products, count);
#else
  multiply_with<LaneProducts<BFloat16>>(products, count);
#endif
}

}  // namespace liaoyuan
