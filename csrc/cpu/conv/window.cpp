#include "window.h"

#include <algorithm>

namespace otk {
namespace {

// Images up to this size are read from L2, without asking ahead.
constexpr int64_t kNearFloats = 128 * 1024;

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Vectors that rows x columns take in pieces of `piece` pixels.
int64_t cost(int rows, int columns, int piece, const Isa& isa) {
  const int pieces = isa.lanes / piece, tallest = isa.max_vectors * pieces;
  const int tiles = std::max(1, ceil_div(rows, tallest));
  return int64_t{ceil_div(columns, piece)} * tiles * ceil_div(ceil_div(rows, tiles), pieces);
}

}  // namespace

Window::Window(const SparseWeight& weight, int h, int w_, int first, int last, const Isa& isa)
    : cin(weight.cin),
      kernel(weight.kernel),
      stride(weight.stride),
      padding(weight.padding),
      dilation(weight.dilation),
      lanes(isa.lanes),
      w(w_),
      row0(first),
      row1(last),
      y0(0),
      y1(h),
      row_stride(w_),
      col_stride(1),
      readable(nullptr),
      readable_end(nullptr),
      out_row(0) {
  const int last_tap = (kernel - 1) * dilation;
  out_w = (w + 2 * padding - last_tap - 1) / stride + 1;
  reach = last_tap / stride;
  phases = std::min(last_tap + 1, stride);
  out_row = out_w;
  // Shorter pieces waste fewer lanes on narrow images, but take more moves: they must save a tenth.
  const int rows = row1 - row0;
  piece = lanes;
  for (int p = lanes / 2; p >= 4; p /= 2)
    if (10 * cost(rows, out_w, p, isa) < 9 * cost(rows, out_w, piece, isa)) piece = p;
  pieces = lanes / piece;
  strips = ceil_div(out_w, piece);
  row_tiles = std::max(1, ceil_div(rows, isa.max_vectors * pieces));
  pitch = ceil_div(ceil_div(rows, row_tiles), pieces);
}

Window::Tile Window::tile(int64_t i) const {
  const int strip = static_cast<int>(i % strips), r = static_cast<int>(i / strips);
  const int64_t rows = row1 - row0;
  Tile t;
  t.row = row0 + static_cast<int>(rows * r / row_tiles);
  t.rows = row0 + static_cast<int>(rows * (r + 1) / row_tiles) - t.row;
  t.col = strip * piece;
  t.cols = std::min(piece, out_w - t.col);
  t.vectors = ceil_div(t.rows, pieces);
  return t;
}

CodeMap Window::code_map(int chunk, uint32_t* table) const {
  CodeMap map{};
  const int run = pitch + reach;  // vectors
  const int reciprocal = 65536 / kernel + 1;
  // A quotient is too large by code * (reciprocal * kernel - 65536) / 65536 parts of the kernel.
  const int64_t codes = int64_t{chunk} * kernel * kernel;
  const bool exact = codes * (reciprocal * kernel - 65536) <= 65536;
  if (kernel > 1 && stride == 1 && exact && int64_t{chunk} * kernel * run <= 65536) {
    map.reciprocal = static_cast<uint16_t>(reciprocal);
    map.column = static_cast<uint16_t>(run);
    map.row = static_cast<uint16_t>(dilation - kernel * run);
    map.channel = static_cast<uint16_t>(kernel * (run - dilation));
    for (int bytes = 4 * lanes; bytes > 1; bytes /= 2) ++map.shift;
    return map;
  }
  map.table = table;
  for (int c = 0; c < chunk; ++c)
    for (int ky = 0; ky < kernel; ++ky)
      for (int kx = 0; kx < kernel; ++kx) {
        const int y = ky * dilation;
        const int64_t at = int64_t{c} * kernel * phases + kx * phases + y % stride;
        *table++ = static_cast<uint32_t>(4 * lanes * (at * run + y / stride));
      }
  return map;
}

void Window::stage(const Isa& isa, const Tile* tiles, int count, const float* x, int64_t x_channel,
                   int channels, float* const* dst) const {
  StageArgs staged[kMaxStaged];
  for (int i = 0; i < count; ++i) {
    const Tile& t = tiles[i];
    StageArgs& a = staged[i] = {};
    a.x = x;
    a.x_channel = x_channel;
    a.channels = channels;
    a.row_stride = row_stride;
    a.col_stride = col_stride;
    a.readable = readable;
    a.readable_end = readable_end;
    a.y0 = y0;
    a.y1 = y1;
    a.w = w;
    a.iy = t.row * stride - padding;
    a.ix = t.col * stride - padding;
    a.kernel = kernel;
    a.stride = stride;
    a.dilation = dilation;
    a.phases = phases;
    a.vectors = t.vectors + reach;
    a.pitch = pitch + reach;
    a.piece = piece;
    a.piece_rows = t.vectors * stride;
    a.far = cin * x_channel > kNearFloats;
    a.dst = dst[i];
  }
  isa.stage(staged, count);
}

}  // namespace otk
