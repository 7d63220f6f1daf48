// Attention forward over packed documents, and over pages of a cache (attend.h, decode.h).
#include "attend.h"
#include "decode.h"
#include "far.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace liaoyuan {

#ifdef __AMX_BF16__
bool amx_permitted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // Linux: arch/x86/include/uapi/asm/prctl.h
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return permitted;
}
#endif

namespace {

template <class T>
Rows<T, T> rows_of(const T* query, T* out, const float* sinks, const AttentionShape& s, int64_t start, int64_t head) {
  Rows<T, T> rows{};
  rows.groups = s.query_heads / s.key_heads;
  rows.query_stride = s.query_heads * s.dim;
  rows.out_stride = s.query_heads * s.value_dim;
  rows.query = query + start * rows.query_stride + head * rows.groups * s.dim;
  rows.out = out + start * rows.out_stride + head * rows.groups * s.value_dim;
  rows.sinks = sinks ? sinks + head * rows.groups : nullptr;
  rows.ranges.window = s.window;
  return rows;
}

template <class E, class T>
void packed(const T* query, const T* key, const T* value, const int32_t* boundaries, const float* sinks, T* out,
            float* log_sum_exp, const PackedShape& s) {
  int64_t groups = s.query_heads / s.key_heads, longest = 0;
  for (int64_t m = 0; m < s.documents; ++m) longest = std::max<int64_t>(longest, boundaries[m + 1] - boundaries[m]);
  int64_t per_task = rows_per_task(s.documents * s.key_heads, s.tokens / s.documents, groups);
  auto cuts_of = [&](int64_t queries) { return (queries * groups + per_task - 1) / per_task; };
  int64_t cuts = cuts_of(longest);
  parallel(s.documents * cuts * s.key_heads, [&](int64_t task) {
    int64_t head = task % s.key_heads, cut = task / s.key_heads % cuts, document = task / s.key_heads / cuts;
    int64_t start = boundaries[document], length = boundaries[document + 1] - start, parts = cuts_of(length);
    if (cut >= parts) return;
    Rows<T, T> rows = rows_of(query, out, sinks, s, start, head);
    rows.log_sum_exp = log_sum_exp + head * groups * s.tokens + start;
    rows.log_sum_exp_stride = 1;
    rows.log_sum_exp_head_stride = s.tokens;
    rows.first = length * cut / parts;
    rows.last = length * (cut + 1) / parts;
    auto row_of = [&](const T* base, int64_t dim) {
      return [=](int64_t j) { return base + ((start + j) * s.key_heads + head) * dim; };
    };
    attend<E>(rows, row_of(key, s.dim), row_of(value, s.value_dim), s.dim, s.value_dim, s.scale);
  });
}

// Elements of all keys and values that are seen.
int64_t seen_elements(const int32_t* lengths, const PagedShape& s) {
  int64_t keys = 0;
  for (int64_t m = 0; m < s.sequences; ++m) keys += std::min<int64_t>(lengths[m], s.window);
  return keys * s.key_heads * (s.dim + s.value_dim);
}

template <class E, class T>
void paged(const T* query, const T* key_cache, const T* value_cache, const int32_t* block_tables,
           const int32_t* query_starts, const int32_t* lengths, const float* sinks, T* out, const PagedShape& s) {
  int64_t groups = s.query_heads / s.key_heads, longest = 0;
  for (int64_t m = 0; m < s.sequences; ++m) longest = std::max<int64_t>(longest, query_starts[m + 1] - query_starts[m]);
  int64_t per_task = rows_per_task(s.sequences * s.key_heads, longest, groups);
  auto cuts_of = [&](int64_t queries) { return (queries * groups + per_task - 1) / per_task; };
  int64_t cuts = std::max<int64_t>(1, cuts_of(longest));
  bool can = can_decode<E>(s.dim, s.value_dim, s.block_size);
  // Heads that decode together; fewer where threads would have nothing to do.
  int64_t together = threads() == 1 ? s.key_heads : s.sequences * s.key_heads / threads();
  together = std::clamp<int64_t>(together, 1, s.key_heads);
  auto compute = [&](bool read_first) {
    parallel(s.sequences * cuts * s.key_heads, [&](int64_t task) {
      int64_t head = task % s.key_heads, cut = task / s.key_heads % cuts, sequence = task / s.key_heads / cuts;
      int64_t start = query_starts[sequence], queries = query_starts[sequence + 1] - start;
      int64_t parts = cuts_of(queries);
      if (cut >= parts || lengths[sequence] < queries) return;
      Rows<T, T> rows = rows_of(query, out, sinks, s, start, head);
      rows.ranges.position = lengths[sequence] - queries;
      rows.first = queries * cut / parts;
      rows.last = queries * (cut + 1) / parts;
      Cached<T> cached{key_cache + head * s.dim, value_cache + head * s.value_dim,
                       block_tables + sequence * s.max_blocks, s.block_size, s.key_heads * s.dim,
                       s.key_heads * s.value_dim, s.dim, s.value_dim};
      if (queries == 1 && can) {
        if (head % together == 0)
          decode<E>(rows.query, rows.out, rows.sinks, std::min(together, s.key_heads - head), groups, cached,
                    rows.ranges.of(0), s.scale, read_first);
      } else {
        attend<E>(rows, [&](int64_t j) { return cached.key(j); }, [&](int64_t j) { return cached.value(j); }, s.dim,
                  s.value_dim, s.scale);
      }
    });
  };
  int64_t bytes = can && longest == 1 ? seen_elements(lengths, s) * int64_t(sizeof(T)) : 0;
  thread_local Trial trial;
  bool read_first = bytes && is_far(key_cache, bytes);
  if (!read_first) return compute(false);
  read_first = trial.choose();
  trial.time(read_first, bytes, [&] { compute(read_first); });
}

}  // namespace

template <>
void attention<float>(const float* query, const float* key, const float* value, const int32_t* boundaries,
                      const float* sinks, float* out, float* log_sum_exp, PackedShape shape) {
  packed<Wide>(query, key, value, boundaries, sinks, out, log_sum_exp, shape);
}

template <>
void attention<BFloat16>(const BFloat16* query, const BFloat16* key, const BFloat16* value, const int32_t* boundaries,
                         const float* sinks, BFloat16* out, float* log_sum_exp, PackedShape shape) {
  with_bf16_engine([&](auto engine) {
    packed<decltype(engine)>(query, key, value, boundaries, sinks, out, log_sum_exp, shape);
  });
}

template <>
void paged_attention<float>(const float* query, const float* key_cache, const float* value_cache,
                            const int32_t* block_tables, const int32_t* query_starts, const int32_t* lengths,
                            const float* sinks, float* out, PagedShape shape) {
  paged<Wide>(query, key_cache, value_cache, block_tables, query_starts, lengths, sinks, out, shape);
}

template <>
void paged_attention<BFloat16>(const BFloat16* query, const BFloat16* key_cache, const BFloat16* value_cache,
                               const int32_t* block_tables, const int32_t* query_starts, const int32_t* lengths,
                               const float* sinks, BFloat16* out, PagedShape shape) {
  with_bf16_engine([&](auto engine) {
    paged<decltype(engine)>(query, key_cache, value_cache, block_tables, query_starts, lengths, sinks, out, shape);
  });
}

}  // namespace liaoyuan
