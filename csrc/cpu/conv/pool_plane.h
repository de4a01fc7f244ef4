// Average pooling of one plane.
#pragma once

#include <cstdint>

#include "isa.h"

namespace otk {

// dst[r * cols + c] = mean of the k x k window at (k r, k c) of src, whose rows are src_row apart.
inline void pool_plane(const float* src, int64_t src_row, float* dst, int rows, int cols, int k,
                       const Isa& isa) {
  if (k == 2) {
    for (int r = 0; r < rows; ++r)
      isa.pool2(src + 2 * r * src_row, src + (2 * r + 1) * src_row, dst + int64_t{r} * cols, cols);
    return;
  }
  const float scale = 1.f / (static_cast<float>(k) * static_cast<float>(k));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) {
      float sum = 0.f;
      for (int i = 0; i < k; ++i)
        for (int j = 0; j < k; ++j) sum += src[(int64_t{r} * k + i) * src_row + c * k + j];
      dst[int64_t{r} * cols + c] = sum * scale;
    }
}

}  // namespace otk
