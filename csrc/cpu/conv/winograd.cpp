// A dense 3x3 convolution by Winograd's F(2x2, 3x3): 16 products for four outputs instead of 36.
//
// Y = A^T [(G g G^T) * (B^T d B)] A for a tile of 2x2 outputs, its 4x4 inputs d and a window g; the
// 16 numbers of a tile are 16 matrix products over the input channels. A vector holds as many tiles
// of one row of tiles as it has lanes, a panel kWinogradVectors of them.
//
// A panel's transformed inputs stay in L2 and one of its 16 matrices in L1 while the rows of a
// group pass; the group's sums stay in L2 until they are transformed back, so nothing of the
// transformed domain is ever in memory as a whole.
#include <algorithm>

#include "../support/parallel.h"
#include "../support/scratch.h"
#include "isa.h"

namespace otk {
namespace {

constexpr int kGroupBlocks = 8;  // blocks of rows whose sums are held together
constexpr int kChannels = 256;   // input channels summed in one go: their panel fits in L1
constexpr int64_t kUnitsPerThread = 2;

}  // namespace

void winograd_conv2d(const Winograd& conv, const Planes& x, const Planes& out,
                     const Planes* residual, const Parallel& par) {
  const Isa& isa = active_isa();
  if (x.n == 0 || out.h <= 0 || out.w <= 0 || conv.cout == 0) return;
  const int wide = 2 * isa.lanes;  // outputs of a vector in each of its two rows
  const int64_t across = (int64_t{out.w} + wide - 1) / wide, down = (int64_t{out.h} + 1) / 2;
  const int64_t vectors = across * down;
  const int64_t panels = (vectors + kWinogradVectors - 1) / kWinogradVectors;
  const int blocks = (conv.cout + kWinogradRows - 1) / kWinogradRows;
  const int groups = (blocks + kGroupBlocks - 1) / kGroupBlocks;
  // Panels first: every share of the groups transforms a panel again.
  const int64_t want = par.threads <= 1 ? 1 : kUnitsPerThread * par.threads;
  const int64_t all = x.n * panels;
  const int64_t shares = std::clamp<int64_t>((want + all - 1) / all, 1, groups);

  const int row = kWinogradVectors * isa.lanes;
  // An odd number of lines between the 16 matrices: a power of two would map them to a few sets.
  const int64_t in_pitch = int64_t{conv.cin} * row + 16;
  const int64_t sum_pitch = int64_t{kGroupBlocks} * kWinogradRows * row + 16;
  const int64_t block_floats = int64_t{conv.cin} * kWinogradRows;
  deal(par, all * shares, [&](int64_t begin, int64_t end) {
    Arena& local = thread_scratch().local;
    local.reset(Arena::rounded(16 * in_pitch) + Arena::rounded(16 * sum_pitch));
    float* inputs = local.take(16 * in_pitch);
    float* sums = local.take(16 * sum_pitch);
    int64_t held = -1;  // unit whose inputs are transformed
    for (int64_t i = begin; i < end; ++i) {
      const int64_t unit = i / shares, share = i % shares;
      const int64_t n = unit / panels, first = unit % panels * kWinogradVectors;
      WinogradVector at[kWinogradVectors];
      const int count = static_cast<int>(std::min<int64_t>(kWinogradVectors, vectors - first));
      for (int v = 0; v < count; ++v)
        at[v] = {static_cast<int32_t>((first + v) / across * 2),
                 static_cast<int32_t>((first + v) % across * wide)};
      if (unit != held) {
        WinogradInputArgs a{};
        a.x = x.data + n * x.batch_stride;
        a.x_channel = x.plane_stride;
        a.row_stride = x.row_stride;
        a.col_stride = x.col_stride;
        a.h = x.h;
        a.w = x.w;
        a.padding = conv.padding;
        a.channels = conv.cin;
        a.vectors = at;
        a.count = count;
        a.to = inputs;
        a.pitch = in_pitch;
        isa.winograd_input(a);
        held = unit;
      }
      for (int64_t g = groups * share / shares; g < groups * (share + 1) / shares; ++g) {
        const int b0 = static_cast<int>(g) * kGroupBlocks;
        const int b1 = std::min(blocks, b0 + kGroupBlocks);
        for (int p = 0; p < 16; ++p)
          for (int c = 0; c == 0 || c < conv.cin; c += kChannels)  // without any: zeros
            for (int b = b0; b < b1; ++b) {
              // The 16 products have time for the lines that a block's eight rows are written to.
              const int64_t next = int64_t{b} * kWinogradRows + p / 2;
              for (int v = 0; c == 0 && next < conv.cout && v < count; ++v)
                __builtin_prefetch(out.data + n * out.batch_stride + next * out.plane_stride +
                                       int64_t{at[v].y + p % 2} * out.w + at[v].x,
                                   1, 2);
              WinogradProductArgs a{};
              a.weight = conv.weight + (int64_t{p} * blocks + b) * block_floats +
                         int64_t{c} * kWinogradRows;
              a.x = inputs + p * in_pitch + int64_t{c} * row;
              a.channels = std::min(kChannels, conv.cin - c);
              a.vectors = count;
              a.sums = sums + p * sum_pitch + int64_t{b - b0} * kWinogradRows * row;
              a.add = c > 0;
              isa.winograd_product(a);
            }
        const int64_t row0 = int64_t{b0} * kWinogradRows;
        WinogradOutputArgs a{};
        a.sums = sums;
        a.pitch = sum_pitch;
        a.rows =
            static_cast<int32_t>(std::min<int64_t>(conv.cout, int64_t{b1} * kWinogradRows) - row0);
        a.bias = conv.bias ? conv.bias + row0 : nullptr;
        a.out = out.data + n * out.batch_stride + row0 * out.plane_stride;
        a.out_stride = out.plane_stride;
        if (residual) {
          a.residual = residual->data + n * residual->batch_stride + row0 * residual->plane_stride;
          a.residual_stride = residual->plane_stride;
        }
        a.h = out.h;
        a.w = out.w;
        a.vectors = at;
        a.count = count;
        a.act = conv.act;
        isa.winograd_output(a);
      }
    }
  });
}

}  // namespace otk
