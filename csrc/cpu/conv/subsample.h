// Every other pixel of a plane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace otk {

// dst[r * cols + c] = the pixel at (step r, step c) of src, whose rows have `src_cols` pixels.
inline void subsample_plane(const float* src, int src_cols, int64_t src_row, int64_t src_col,
                            float* dst, int rows, int cols, int step, const Isa& isa) {
  for (int r = 0; r < rows; ++r, src += step * src_row, dst += cols) {
    if (step == 2 && src_col == 1) {
      isa.split(src, std::min<int64_t>(src_cols, int64_t{2} * cols), dst, nullptr);
      continue;
    }
    if (step == 1 && src_col == 1) {
      std::memcpy(dst, src, sizeof(float) * cols);
      continue;
    }
    for (int c = 0; c < cols; ++c) dst[c] = src[c * step * src_col];
  }
}

}  // namespace otk
