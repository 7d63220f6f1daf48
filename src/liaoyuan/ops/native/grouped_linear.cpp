// The gradients of experts' biases: the sum of each group of rows. The products themselves are in matrix.cpp.
#include "kernels.h"

namespace liaoyuan {

template <class T>
void grouped_sum(const T* rows, T* sums, const Groups& groups, int64_t columns) {
  parallel(groups.experts, [&](int64_t expert) {
    for (int64_t at = 0; at < columns; at += LANES) {
      Vec total{};
      for (int64_t row = groups.starts[expert]; row < groups.starts[expert + 1]; ++row)
        total += load(rows + row * columns + at, columns - at);
      store(sums + expert * columns + at, total, columns - at);
    }
  });
}

template void grouped_sum<float>(const float*, float*, const Groups&, int64_t);
template void grouped_sum<BFloat16>(const BFloat16*, BFloat16*, const Groups&, int64_t);

}  // namespace liaoyuan
