// Zero-padded copies of a band of image rows, on which a k x k convolution of any stride is a flat
// run of positions: output (r, c) of the band is position r * row + c, and the input of tap (ky,
// kx) lies a fixed distance from it. Strides above 1 split the image into stride^2 phases, so that
// the distance stays fixed.
#pragma once

#include <cstdint>

#include "../otk.h"

namespace otk {

struct Grid {
  int kernel, stride, padding;
  int h, w;          // input pixels
  int out_h, out_w;  // output pixels
  int reach;         // (kernel - 1) / stride: extra rows and columns a window needs
  int row;           // floats per grid row
  int phases;        // phases per axis that some tap reads

  Grid(const SparseWeight& weight, int h, int w);
  // Floats per phase plane and per channel for a band of `rows` output rows; `lanes` of slack are
  // included, since the last vector of a run may pass its end.
  int64_t phase_floats(int rows, int lanes) const;
  int64_t channel_floats(int rows, int lanes) const;
  // Byte offset by code for one chunk.
  void tap_bytes(int chunk, int rows, int lanes, uint32_t* table) const;
  // Copies channel c of image n for output rows [r0, r1) into `dst` (one channel).
  void pack(const Planes& x, int n, int c, int r0, int r1, int lanes, float* dst) const;
  // Positions of a flat run over `rows` output rows.
  int64_t positions(int rows) const { return int64_t{rows} * row - (row - out_w); }
};

}  // namespace otk
