// What operators over a paged cache check of it; for the files that know torch (binding_attention.cpp).
#pragma once
#include "operators.h"

namespace liaoyuan {

int64_t window_of(std::optional<int64_t> window);
// fp32, so that the kernels need not know the dtype.
OptionalTensor sinks_of(const OptionalTensor& sinks, int64_t heads);
Tensor int_list(const Tensor& values);
// int64, contiguous, inside the cache.
Tensor slot_list(const Tensor& slots, const Tensor& cache);
void check_caches(const Tensor& key_cache, const Tensor& value_cache);
void check_pages(const Tensor& tables, const Tensor& starts, const Tensor& lengths, const Tensor& cache,
                 int64_t queries);

}  // namespace liaoyuan
