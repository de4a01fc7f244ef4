// Sparse convolution on CUDA cores: the phases of one block, for the device and for the host.
//
// y = relu(conv(x, W) + bias + residual), NHWC, stride 1, 1x1 or 3x3 with zero padding, W
// unstructured. A block owns 8 x 32 pixels and 64 output channels. Input channels come in chunks
// into shared memory, planar, with the halo of the taps; a warp walks over the nonzeros of its 8
// rows and every lane multiplies 8 pixels of its column by the same weight. Sums are float in
// registers, in the order of the pack; no atomics, so results are bit-equal from run to run.
//
// Bound by shared memory: every product reads one word, so at most a quarter of the multiply-adds
// of the CUDA cores. Dense arithmetic does not have that limit and needs 1 / density as many.
//
// Every phase is a function of the thread's number. Between two phases lies a barrier. The host
// build (tests) runs a phase for every thread in turn.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define OTK_BOTH __host__ __device__ __forceinline__
#else
#define OTK_BOTH inline
#endif

namespace otk::sparse {

constexpr int kLanes = 32;  // pixels of a tile's row, one per lane
constexpr int kLines = 8;   // rows of pixels, all of them in every lane
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kRowsPerWarp = 8;
constexpr int kRows = kWarps * kRowsPerWarp;  // output channels of a block
constexpr int kStagePitch = kRows + 1;        // odd: lanes write to different banks

// One nonzero: where its activation lies in the shared tile, relative to the lane, and its value.
struct Entry {
  int32_t offset;
  float value;
};

// Everything a block needs to know. Sizes in elements unless said.
struct Problem {
  const void* x;         // [n, height, width, cin]
  const Entry* entries;  // by group of 64 channels, chunk, slot of the group
  const int32_t* begin;  // [groups, chunks, kRows + 1] positions in entries
  const int32_t* slots;  // [groups, kRows] output channel of each slot, -1: none
  const float* bias;     // [cout]
  const void* residual;  // [n, height, width, cout] or null
  void* y;               // [n, height, width, cout]
  int n, height, width, cin, cout;
  int taps;   // 1 or 9
  int chunk;  // input channels in shared memory at a time
  int relu;   // 0 or 1
};

OTK_BOTH int halo(int taps) { return taps == 9 ? 1 : 0; }
OTK_BOTH int tile_width(int taps) { return kLanes + 2 * halo(taps); }
OTK_BOTH int tile_height(int taps) { return kLines + 2 * halo(taps); }
// Floats between two channels of the tile; odd, so that a pixel's channels go to different banks.
OTK_BOTH int plane(int taps) { return (tile_width(taps) * tile_height(taps)) | 1; }
OTK_BOTH int chunks(const Problem& p) { return (p.cin + p.chunk - 1) / p.chunk; }
OTK_BOTH int groups(const Problem& p) { return (p.cout + kRows - 1) / kRows; }
OTK_BOTH int tiles_across(const Problem& p) { return (p.width + kLanes - 1) / kLanes; }
OTK_BOTH int tiles_down(const Problem& p) { return (p.height + kLines - 1) / kLines; }
OTK_BOTH int64_t blocks(const Problem& p) {
  return int64_t(p.n) * tiles_down(p) * tiles_across(p) * groups(p);
}
// Floats of shared memory: the tile, or the staged output that takes its place.
OTK_BOTH int shared_floats(const Problem& p) {
  int tile = p.chunk * plane(p.taps), stage = kLanes * kStagePitch;
  return tile > stage ? tile : stage;
}

// Where a block works. Groups are innermost: blocks that run together share their activations.
struct Where {
  int group, image, top, left;
};

OTK_BOTH Where where(const Problem& p, int64_t block) {
  Where at;
  at.group = int(block % groups(p));
  block /= groups(p);
  at.left = int(block % tiles_across(p)) * kLanes;
  block /= tiles_across(p);
  at.top = int(block % tiles_down(p)) * kLines;
  at.image = int(block / tiles_down(p));
  return at;
}

// Phase 1: copy channels [first, first + chunk) of the tile and its halo, zero outside the image.
template <typename T>
OTK_BOTH void load_tile(const Problem& p, const Where& at, int first, int thread, float* shared) {
  const int edge = halo(p.taps), across = tile_width(p.taps), step = plane(p.taps);
  const int pixels = across * tile_height(p.taps);
  const int count = first + p.chunk <= p.cin ? p.chunk : p.cin - first;
  const T* x = static_cast<const T*>(p.x);
  // Channels are innermost, so neighbouring threads read neighbouring words.
  for (int i = thread; i < pixels * count; i += kThreads) {
    const int pixel = i / count, channel = i - pixel * count;
    const int h = at.top + pixel / across - edge, w = at.left + pixel % across - edge;
    float value = 0.0f;
    if (h >= 0 && h < p.height && w >= 0 && w < p.width) {
      const int64_t row = (int64_t(at.image) * p.height + h) * p.width + w;
      value = float(x[row * p.cin + first + channel]);
    }
    shared[channel * step + pixel] = value;
  }
}

// Phase 2: the nonzeros of this warp's rows in this chunk. sums: [kRowsPerWarp][kLines].
OTK_BOTH void accumulate(const Problem& p, const Where& at, int chunk, int thread,
                         const float* shared, float (&sums)[kRowsPerWarp][kLines]) {
  const int warp = thread / kLanes, lane = thread % kLanes;
  const int across = tile_width(p.taps);
  const int32_t* begin =
      p.begin + (int64_t(at.group) * chunks(p) + chunk) * (kRows + 1) + warp * kRowsPerWarp;
  const float* column = shared + lane;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int row = 0; row < kRowsPerWarp; ++row) {
    const int last = begin[row + 1];
    for (int i = begin[row]; i < last; ++i) {
#ifdef __CUDA_ARCH__
      // The same address in every lane: one broadcast through the read-only cache.
      const int2 raw = __ldg(reinterpret_cast<const int2*>(p.entries + i));
      const float value = __int_as_float(raw.y);
      const float* from = column + raw.x;
#else
      const float value = p.entries[i].value;
      const float* from = column + p.entries[i].offset;
#endif
#ifdef __CUDACC__
#pragma unroll
#endif
      for (int line = 0; line < kLines; ++line) sums[row][line] += value * from[line * across];
    }
  }
}

// Phase 3: one row of pixels into shared memory, by slot of the group.
OTK_BOTH void stage(int line, int thread, const float (&sums)[kRowsPerWarp][kLines],
                    float* shared) {
  const int warp = thread / kLanes, lane = thread % kLanes;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int row = 0; row < kRowsPerWarp; ++row)
    shared[lane * kStagePitch + warp * kRowsPerWarp + row] = sums[row][line];
}

// Phase 4: bias, residual, ReLU and store of that row of pixels. `place` is the slot of a channel
// of the group, so that neighbouring threads write neighbouring channels.
template <typename T>
OTK_BOTH void store(const Problem& p, const Where& at, int line, int thread, const float* shared,
                    const int* place) {
  const int h = at.top + line;
  if (h >= p.height) return;
  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  for (int i = thread; i < kLanes * kRows; i += kThreads) {
    const int pixel = i / kRows, channel = at.group * kRows + i % kRows;
    const int w = at.left + pixel;
    if (w >= p.width || channel >= p.cout) continue;
    const int64_t row = (int64_t(at.image) * p.height + h) * p.width + w;
    float value = shared[pixel * kStagePitch + place[i % kRows]] + p.bias[channel];
    if (residual != nullptr) value += float(residual[row * p.cout + channel]);
    if (p.relu && value < 0.0f) value = 0.0f;  // NaN stays NaN
    y[row * p.cout + channel] = T(value);
  }
}

// place[channel of the group] = slot: the inverse of p.slots.
OTK_BOTH void find_places(const Problem& p, const Where& at, int thread, int* place) {
  if (thread >= kRows) return;
  const int channel = p.slots[at.group * kRows + thread];
  if (channel >= 0) place[channel - at.group * kRows] = thread;
}

}  // namespace otk::sparse
