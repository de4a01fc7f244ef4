// 3x3 convolution whose weights are sums of 2:4 matrices, for tensor cores of compute capability
// 9.0: y = relu(conv(x, W) + bias), NHWC, bfloat16, stride 1, zero padding 1, float32 sums.
//
// Exact for any W: a 64 x 32 slice (64 output channels, 32 input channels of one tap) is written as
// A1 + A2, both 2:4; a slice without nonzeros is left out, so A2 costs only where it has some.
// Every slice is one wgmma.sp over all pixels of a tile.
//
// A tile is `Rows` x 8 pixels. Its 64 input channels, with a halo, lie in shared memory as 8 planes
// of 8 channels, 16 bytes a pixel: the layout that wgmma reads without swizzle. There a tap is a
// shift of the start address, so one copy of the image serves all nine taps. Blocks stay on their
// multiprocessor and walk over tiles. Warpgroup 0 copies: two warps the images, two lanes the
// weights; warpgroups 1 and 2 multiply, 64 output channels each.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include "sm90.h"
#else
#include "sm90_host.h"
#endif

namespace otk::two_four {

constexpr int kAcross = 8;  // pixels of a tile's row: one block of wgmma's operand
constexpr int kHaloAcross = kAcross + 2;
constexpr int kChunk = 64;  // input channels in shared memory at a time
constexpr int kPlanes = kChunk / 8;
constexpr int kBlock = 64;     // output channels of a warpgroup
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kCopiers = 64;  // threads that copy images
constexpr int kImages = 2;    // stages
constexpr int kStages = 3;    // of the weights, per warpgroup
// A group of slices as it lies in global and in shared memory: half their count, their places,
// their indices, their values. The count is even.
constexpr int kSlices = 6;
constexpr int kHeader = 128;
constexpr int kIndices = 256;  // bytes a slice: 64 words
constexpr int kValues = 2048;  // bytes a slice: 64 x 16 bfloat16
constexpr int kGroup = kHeader + kSlices * (kIndices + kValues);
constexpr int kPitch = 48;            // bytes a pixel of 16 staged channels: no bank conflicts
constexpr int kStaged = 64 * kPitch;  // a warp's 64 pixels

struct Problem {
  const void* x;                    // [n, height, width, cin] bfloat16
  const void* groups;               // [groups][kGroup] bytes
  const int32_t* begin;             // [cout / 64 * cin / 64 + 1] first group of a block's chunk
  const int32_t* bytes;             // [groups] bytes of a group that are used
  const float* bias;                // [cout]
  void* y;                          // [n, height, width, cout] bfloat16
  int n, height, width, cin, cout;  // cin a multiple of 64, cout of 128
  int relu;
};

template <int Rows>
struct Tile {
  static constexpr int pixels = kAcross * Rows;
  static constexpr int halo = kHaloAcross * (Rows + 2);
  // An odd number of pixels from plane to plane: the eight planes of a pixel lie in different
  // banks.
  static constexpr int plane = 16 * (halo | 1);
  static constexpr int image = kPlanes * plane;
  static constexpr int weights_at = (kImages * image + 127) / 128 * 128;
  static constexpr int staged_at = weights_at + kConsumers * kStages * kGroup;
  static constexpr int barriers_at = staged_at + 4 * kConsumers * kStaged;
  static constexpr int shared = barriers_at + 8 * 2 * (kImages + kConsumers * kStages);
};

// Positions of a ring: stage and parity of the n-th use.
struct Ring {
  int stages, stage = 0, parity = 0;
  OTK_DEVICE explicit Ring(int count) : stages(count) {}
  OTK_DEVICE void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Barriers in shared memory.
struct Barriers {
  uint32_t at;
  OTK_DEVICE uint32_t image_full(int stage) const { return at + 8 * stage; }
  OTK_DEVICE uint32_t image_empty(int stage) const { return at + 8 * (kImages + stage); }
  OTK_DEVICE uint32_t full(int consumer, int stage) const {
    return at + 8 * (2 * kImages + consumer * kStages + stage);
  }
  OTK_DEVICE uint32_t empty(int consumer, int stage) const {
    return full(consumer, stage) + 8 * kConsumers * kStages;
  }
};

// Output channels are innermost: blocks that run together share their images.
struct Where {
  int pair, image, top, left;
};

template <int Rows>
OTK_DEVICE int tiles(const Problem& p) {
  return p.n * ((p.height + Rows - 1) / Rows) * ((p.width + kAcross - 1) / kAcross) *
         (p.cout / (kBlock * kConsumers));
}

template <int Rows>
OTK_DEVICE Where where(const Problem& p, int tile) {
  Where at;
  const int pairs = p.cout / (kBlock * kConsumers), across = (p.width + kAcross - 1) / kAcross;
  const int down = (p.height + Rows - 1) / Rows;
  at.pair = tile % pairs;
  tile /= pairs;
  at.left = tile % across * kAcross;
  tile /= across;
  at.top = tile % down * Rows;
  at.image = tile / down;
  return at;
}

// Two warps: 64 channels of the tile and its halo, zero outside the image.
template <int Rows>
OTK_DEVICE void copy_images(const Problem& p, uint32_t shared, const Barriers& barriers,
                            int thread) {
  using namespace sm90;
  const int plane = thread % kPlanes;
  const auto* x = static_cast<const char*>(p.x);
  Ring ring(kImages);
  for (int tile = block_index(); tile < tiles<Rows>(p); tile += block_count()) {
    const Where at = where<Rows>(p, tile);
    for (int chunk = 0; chunk < p.cin / kChunk; ++chunk, ring.next()) {
      barrier_wait(barriers.image_empty(ring.stage), ring.parity ^ 1);
      const uint32_t to = shared + ring.stage * Tile<Rows>::image + plane * Tile<Rows>::plane;
      // Neighbouring threads copy neighbouring channels of a pixel.
      for (int pixel = thread / kPlanes; pixel < Tile<Rows>::halo; pixel += kCopiers / kPlanes) {
        const int h = at.top + pixel / kHaloAcross - 1, w = at.left + pixel % kHaloAcross - 1;
        const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
        const int64_t row = (int64_t(at.image) * p.height + h) * p.width + w;
        const int64_t from = 2 * (row * p.cin + chunk * kChunk + plane * 8);
        copy16(to + 16 * pixel, x + (inside ? from : 0), inside);
      }
      copies_wait();
      fence_async();
      barrier_arrive(barriers.image_full(ring.stage));
    }
  }
}

// One lane: the groups of slices of one warpgroup, in the order of their use.
template <int Rows>
OTK_DEVICE void copy_weights(const Problem& p, uint32_t shared, const Barriers& barriers,
                             int consumer) {
  using namespace sm90;
  const int chunks = p.cin / kChunk;
  const auto* groups = static_cast<const char*>(p.groups);
  Ring ring(kStages);
  for (int tile = block_index(); tile < tiles<Rows>(p); tile += block_count()) {
    const int block = where<Rows>(p, tile).pair * kConsumers + consumer;
    const int last = p.begin[(block + 1) * chunks];
    for (int group = p.begin[block * chunks]; group < last; ++group, ring.next()) {
      const int bytes = p.bytes[group];
      barrier_wait(barriers.empty(consumer, ring.stage), ring.parity ^ 1);
      const uint32_t full = barriers.full(consumer, ring.stage);
      barrier_arrive_expect(full, bytes);
      bulk_copy(shared + Tile<Rows>::weights_at + (consumer * kStages + ring.stage) * kGroup,
                groups + int64_t(group) * kGroup, bytes, full);
    }
  }
}

// Bias, ReLU, rounding, and a transposition through shared memory, 16 channels x 64 pixels a time.
template <int Rows>
OTK_DEVICE void store_tile(const Problem& p, const Where& at, int block, int warp, int lane,
                           uint32_t staged, const float (&sums)[4 * Rows]) {
  using namespace sm90;
  const int channel = block * kBlock + warp * 16;
  const float bias[2] = {p.bias[channel + lane / 4], p.bias[channel + lane / 4 + 8]};
  auto* y = static_cast<char*>(p.y);
  OTK_UNROLL
  for (int first = 0; first < Rows; first += 8) {
    OTK_UNROLL
    for (int row = 0; row < 8; row += 2) {
      if (first + row >= Rows) continue;
      uint32_t v[4];
      OTK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int j = first + row + i / 2, half = i % 2;
        float pair[2] = {0.0f, 0.0f};
        OTK_UNROLL
        for (int c = 0; c < 2; ++c) {
          if (j < Rows) pair[c] = sums[4 * (j < Rows ? j : 0) + 2 * half + c] + bias[half];
          if (p.relu && pair[c] < 0.0f) pair[c] = 0.0f;  // NaN stays NaN
        }
        v[i] = pack_bf16(pair[0], pair[1]);
      }
      const int matrix = lane / 8;
      const int pixel = kAcross * (row + matrix / 2) + lane % 8;
      store_transposed(staged + pixel * kPitch + matrix % 2 * 16, v);
    }
    sync_warp();
    for (int item = lane; item < 128; item += 32) {
      const int pixel = item / 2, half = item % 2, row = first + pixel / kAcross;
      const int h = at.top + row, w = at.left + pixel % kAcross;
      if (row >= Rows || h >= p.height || w >= p.width) continue;
      const int64_t place = (int64_t(at.image) * p.height + h) * p.width + w;
      store128(y + 2 * (place * p.cout + channel + 8 * half),
               load128(staged + pixel * kPitch + 16 * half));
    }
    sync_warp();
  }
}

// One warpgroup: every slice of its 64 output channels, over all pixels of the tile.
template <int Rows>
OTK_DEVICE void multiply_tiles(const Problem& p, uint32_t shared, const Barriers& barriers,
                               int consumer, int thread) {
  using namespace sm90;
  const int warp = thread / 32, lane = thread % 32, chunks = p.cin / kChunk;
  const uint32_t word = kHeader + 4 * (2 * (8 * warp + lane / 4) + lane % 2);
  const uint32_t weights = shared + Tile<Rows>::weights_at + consumer * kStages * kGroup;
  const uint32_t staged = shared + Tile<Rows>::staged_at + (4 * consumer + warp) * kStaged;
  Ring images(kImages), ring(kStages);
  float sums[4 * Rows];
  for (int tile = block_index(); tile < tiles<Rows>(p); tile += block_count()) {
    const Where at = where<Rows>(p, tile);
    const int block = at.pair * kConsumers + consumer;
    OTK_UNROLL
    for (int i = 0; i < 4 * Rows; ++i) sums[i] = 0.0f;
    for (int chunk = 0; chunk < chunks; ++chunk, images.next()) {
      const int first = p.begin[block * chunks + chunk], last = p.begin[block * chunks + chunk + 1];
      const uint32_t image = shared + images.stage * Tile<Rows>::image;
      barrier_wait(barriers.image_full(images.stage), images.parity);
      int before = -1;  // the stage of the group before
      for (int group = first; group < last; ++group, ring.next()) {
        const uint32_t from = weights + ring.stage * kGroup;
        barrier_wait(barriers.full(consumer, ring.stage), ring.parity);
        const int pairs = uniform(int(load32(from)));
        for (int pair = 0; pair < pairs; ++pair) {
          // Two at a time, with all they need in registers: nothing lies between them.
          const uint32_t left = from + kHeader + kSlices * kIndices + 2 * pair * kValues;
          uint32_t start[2], indices[2];
          OTK_UNROLL
          for (int i = 0; i < 2; ++i) {
            // Half of the chunk, and the tap's shift in pixels.
            const int place = uniform(int(load32(from + 4 + 4 * (2 * pair + i))));
            start[i] = image + (place >> 8) * (4 * Tile<Rows>::plane) + (place & 255) * 16;
            indices[i] = load32(from + word + (2 * pair + i) * kIndices);
          }
          multiply_fence();
          OTK_UNROLL
          for (int i = 0; i < 2; ++i)
            multiply<Tile<Rows>::pixels>(sums, matrix(left + i * kValues, 128, 256),
                                         matrix(start[i], Tile<Rows>::plane, 16 * kHaloAcross),
                                         indices[i]);
          multiply_commit();
          multiply_wait<1>();
          if (pair == 0 && before >= 0 && lane == 0)
            barrier_arrive(barriers.empty(consumer, before));
        }
        before = ring.stage;
      }
      multiply_wait<0>();
      if (lane == 0) {
        if (before >= 0) barrier_arrive(barriers.empty(consumer, before));
        barrier_arrive(barriers.image_empty(images.stage));
      }
    }
    store_tile<Rows>(p, at, block, warp, lane, staged, sums);
  }
}

template <int Rows>
OTK_DEVICE void run_block(const Problem& p) {
  using namespace sm90;
  const int thread = thread_index(), group = uniform(thread / 128), warp = uniform(thread / 32);
  const uint32_t shared = shared_base();
  const Barriers barriers{shared + Tile<Rows>::barriers_at};
  if (thread == 0) {
    for (int stage = 0; stage < kImages; ++stage) {
      barrier_init(barriers.image_full(stage), kCopiers);
      barrier_init(barriers.image_empty(stage), 4 * kConsumers);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer)
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(barriers.full(consumer, stage), 1);
        barrier_init(barriers.empty(consumer, stage), 4);
      }
    barrier_fence_init();
  }
  sync_block();
  if (group == 0) {
    registers_down<40>();
    if (warp < kConsumers) {
      if (thread % 32 == 0) copy_weights<Rows>(p, shared, barriers, warp);
    } else {
      copy_images<Rows>(p, shared, barriers, thread - 32 * kConsumers);
    }
  } else {
    registers_up<232>();
    multiply_tiles<Rows>(p, shared, barriers, group - 1, thread % 128);
  }
}

}  // namespace otk::two_four
