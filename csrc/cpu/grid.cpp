#include "grid.h"

#include <algorithm>
#include <cstring>

namespace otk {

Grid::Grid(const SparseWeight& weight, int h_, int w_)
    : kernel(weight.kernel), stride(weight.stride), padding(weight.padding), h(h_), w(w_) {
  out_h = (h + 2 * padding - kernel) / stride + 1;
  out_w = (w + 2 * padding - kernel) / stride + 1;
  reach = (kernel - 1) / stride;
  phases = std::min(kernel, stride);
  // With stride 1 the zeros right of a row are also those left of the next one.
  row = out_w + reach - (stride == 1 ? std::min(padding, reach) : 0);
}

int64_t Grid::phase_floats(int rows, int lanes) const {
  const int64_t floats = int64_t{rows + reach} * row + reach + lanes;
  return (floats + 15) / 16 * 16;
}

int64_t Grid::channel_floats(int rows, int lanes) const {
  return plane_stride(phase_floats(rows, lanes) * phases * phases);
}

void Grid::tap_bytes(int chunk, int rows, int lanes, uint32_t* table) const {
  const int64_t phase = phase_floats(rows, lanes), channel = channel_floats(rows, lanes);
  for (int c = 0; c < chunk; ++c)
    for (int ky = 0; ky < kernel; ++ky)
      for (int kx = 0; kx < kernel; ++kx)
        *table++ = static_cast<uint32_t>(4 * (c * channel +
                                              ((ky % stride) * phases + kx % stride) * phase +
                                              int64_t{ky / stride} * row + kx / stride));
}

void Grid::pack(const Planes& x, int n, int c, int r0, int r1, int lanes, float* dst) const {
  const float* plane = x.data + n * x.batch_stride + c * x.plane_stride;
  const int rows = r1 - r0;
  for (int py = 0; py < phases; ++py)
    for (int px = 0; px < phases; ++px) {
      float* grid = dst + (py * phases + px) * phase_floats(rows, lanes);
      // Grid column g holds input column g * stride + px - padding; [g0, g1) are inside the image.
      const int g0 = std::max(0, (padding - px + stride - 1) / stride);
      const int g1 = std::clamp((w - 1 + padding - px) / stride + 1, g0, std::max(g0, row));
      for (int g = 0; g < rows + reach; ++g) {
        float* line = grid + int64_t{g} * row;
        const int iy = (r0 + g) * stride + py - padding;
        if (iy < 0 || iy >= h || w - 1 + padding - px < 0) {
          std::memset(line, 0, sizeof(float) * row);
          continue;
        }
        const float* src = plane + iy * x.row_stride;
        for (int i = 0; i < std::min(g0, row); ++i) line[i] = 0.f;
        const int64_t first = int64_t{g0} * stride + px - padding;
        if (stride == 1 && x.col_stride == 1) {
          if (g1 > g0) std::memcpy(line + g0, src + first, sizeof(float) * (g1 - g0));
        } else {
          for (int i = g0; i < g1; ++i)
            line[i] = src[(first + int64_t{i - g0} * stride) * x.col_stride];
        }
        for (int i = g1; i < row; ++i) line[i] = 0.f;
      }
      // What lies behind the last row: read by the right border of the last row.
      float* tail = grid + int64_t{rows + reach} * row;
      std::memset(tail, 0, sizeof(float) * (grid + phase_floats(rows, lanes) - tail));
    }
}

}  // namespace otk
