// Sparse convolution on CUDA cores: the phases of one block, for the device and for the host.
//
// y = relu(conv(x, W) + bias + residual), NHWC, stride 1, 1x1 or 3x3 with zero padding, W
// unstructured. A block owns 16 x 32 pixels and 32 output channels. Input channels come in chunks
// into shared memory, planar, with the halo of the taps. A warp has 8 output channels, a lane a
// column of 16 pixels. Sums are float in registers, in the order of the pack; no atomics, so
// results are bit-equal from run to run.
//
// Shared memory gives 32 words a cycle, the multiply-adds of a multiprocessor take 128. So a word
// has to serve several products: the nonzeros of a warp are sorted by their column (input channel
// and tap's dx), whose 18 words every lane loads once, for all 8 channels and three dy. Sums lie in
// registers, which cannot be indexed, so a nonzero jumps to the code of its (channel, dy): a table
// of branches, where a compiler would compare and branch six times.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define OTK_BOTH __host__ __device__ __forceinline__
#define OTK_UNROLL _Pragma("unroll")
#else
#define OTK_BOTH inline
#define OTK_UNROLL
#endif

namespace otk::sparse {

constexpr int kLanes = 32;  // pixels of a tile's row, one per lane
constexpr int kLines = 16;  // rows of pixels, all of them in every lane
constexpr int kWarps = 4;
constexpr int kSpan = 16;  // lanes that read channels of one pixel
constexpr int kThreads = kWarps * kLanes;
constexpr int kRowsPerWarp = 8;
constexpr int kRows = kWarps * kRowsPerWarp;  // output channels of a block
constexpr int kStagePitch = kRows + 1;        // odd: lanes write to different banks

// One nonzero. key: bits 0 to 4 its code, the row of the warp (3x3: times 3, plus dy), bit 7 first
// of its column, bits 8 to 31 where the column's first word lies in the shared tile, relative to
// the lane.
struct Entry {
  uint32_t key;
  float value;
};

// Everything a block needs to know. Sizes in elements unless said.
struct Problem {
  const void* x;         // [n, height, width, cin]
  const Entry* entries;  // by group of 32 channels, chunk, warp, column; one more at the end
  const int32_t* begin;  // [groups, chunks, kWarps + 1] positions in entries
  const int32_t* slots;  // [groups, kRows] output channel of each slot, -1: none
  const float* bias;     // [cout]
  const void* residual;  // [n, height, width, cout] or null
  void* y;               // [n, height, width, cout]
  int n, height, width, cin, cout;
  int taps;   // 1 or 9
  int chunk;  // input channels in shared memory at a time
  int relu;   // 0 or 1
};

OTK_BOTH constexpr int halo(int taps) { return taps == 9 ? 1 : 0; }
OTK_BOTH constexpr int tile_width(int taps) { return kLanes + 2 * halo(taps); }
OTK_BOTH constexpr int tile_height(int taps) { return kLines + 2 * halo(taps); }
// Floats between two channels of the tile; odd, so that a pixel's channels go to different banks.
OTK_BOTH constexpr int plane(int taps) { return (tile_width(taps) * tile_height(taps)) | 1; }
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
template <typename T, int Taps>
OTK_BOTH void load_tile(const Problem& p, const Where& at, int first, int thread, float* shared) {
  constexpr int edge = halo(Taps), across = tile_width(Taps), step = plane(Taps);
  constexpr int pixels = across * tile_height(Taps);
  const int count = first + p.chunk <= p.cin ? p.chunk : p.cin - first;
  const T* x = static_cast<const T*>(p.x);
  // Channels are innermost, so neighbouring lanes read neighbouring words.
  for (int pixel = thread / kSpan; pixel < pixels; pixel += kThreads / kSpan) {
    const int h = at.top + pixel / across - edge, w = at.left + pixel % across - edge;
    const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
    const int64_t row = (int64_t(at.image) * p.height + h) * p.width + w;
    const T* from = x + (inside ? row * p.cin + first : 0);
    for (int channel = thread % kSpan; channel < count; channel += kSpan)
      shared[channel * step + pixel] = inside ? float(from[channel]) : 0.0f;
  }
}

OTK_BOTH Entry entry_at(const Entry* entries) {
#ifdef __CUDA_ARCH__
  // The same address in every lane: one broadcast through the read-only cache.
  const int2 raw = __ldg(reinterpret_cast<const int2*>(entries));
  return {uint32_t(raw.x), __int_as_float(raw.y)};
#else
  return *entries;
#endif
}

#ifdef __CUDA_ARCH__
// sums[row] += value * words[dy ...], by a table of branches. In the text, s<row>_<line> and
// w<line> name registers; the copies from and to operands cost nothing once they are allocated.
// clang-format off
#define OTK_F(r, l, k) "fma.rn.f32 s" #r "_" #l ", w" #k ", v, s" #r "_" #l ";\n"
#define OTK_0(r)                                                                            \
  OTK_F(r, 0, 0) OTK_F(r, 1, 1) OTK_F(r, 2, 2) OTK_F(r, 3, 3) OTK_F(r, 4, 4)                \
  OTK_F(r, 5, 5) OTK_F(r, 6, 6) OTK_F(r, 7, 7) OTK_F(r, 8, 8) OTK_F(r, 9, 9)                \
  OTK_F(r, 10, 10) OTK_F(r, 11, 11) OTK_F(r, 12, 12) OTK_F(r, 13, 13) OTK_F(r, 14, 14)      \
  OTK_F(r, 15, 15)
#define OTK_1(r)                                                                            \
  OTK_F(r, 0, 1) OTK_F(r, 1, 2) OTK_F(r, 2, 3) OTK_F(r, 3, 4) OTK_F(r, 4, 5)                \
  OTK_F(r, 5, 6) OTK_F(r, 6, 7) OTK_F(r, 7, 8) OTK_F(r, 8, 9) OTK_F(r, 9, 10)               \
  OTK_F(r, 10, 11) OTK_F(r, 11, 12) OTK_F(r, 12, 13) OTK_F(r, 13, 14) OTK_F(r, 14, 15)      \
  OTK_F(r, 15, 16)
#define OTK_2(r)                                                                            \
  OTK_F(r, 0, 2) OTK_F(r, 1, 3) OTK_F(r, 2, 4) OTK_F(r, 3, 5) OTK_F(r, 4, 6)                \
  OTK_F(r, 5, 7) OTK_F(r, 6, 8) OTK_F(r, 7, 9) OTK_F(r, 8, 10) OTK_F(r, 9, 11)              \
  OTK_F(r, 10, 12) OTK_F(r, 11, 13) OTK_F(r, 12, 14) OTK_F(r, 13, 15) OTK_F(r, 14, 16)      \
  OTK_F(r, 15, 17)
#define OTK_END "bra.uni done;\n"
#define OTK_ROW1(r) "c" #r "_0:\n" OTK_0(r) OTK_END
#define OTK_ROW3(r) OTK_ROW1(r) "c" #r "_1:\n" OTK_1(r) OTK_END "c" #r "_2:\n" OTK_2(r) OTK_END
#define OTK_ALL(each) each(0) each(1) each(2) each(3) each(4) each(5) each(6) each(7)
#define OTK_NAME(r, l, n) ".reg .f32 s" #r "_" #l ";\n"
#define OTK_IN(r, l, n) "mov.f32 s" #r "_" #l ", %" #n ";\n"
#define OTK_OUT(r, l, n) "mov.f32 %" #n ", s" #r "_" #l ";\n"
#define OTK_ROW(to, r, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)                      \
  to(r, 0, a) to(r, 1, b) to(r, 2, c) to(r, 3, d) to(r, 4, e) to(r, 5, f) to(r, 6, g)       \
  to(r, 7, h) to(r, 8, i) to(r, 9, j) to(r, 10, k) to(r, 11, l) to(r, 12, m) to(r, 13, n)   \
  to(r, 14, o) to(r, 15, p)
#define OTK_ROWS(to)                                                                        \
  OTK_ROW(to, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)                      \
  OTK_ROW(to, 1, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31)            \
  OTK_ROW(to, 2, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47)            \
  OTK_ROW(to, 3, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63)            \
  OTK_ROW(to, 4, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79)            \
  OTK_ROW(to, 5, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, 92, 93, 94, 95)            \
  OTK_ROW(to, 6, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111) \
  OTK_ROW(to, 7, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 124, 125, 126, 127)
#define OTK_WORD(k, n) "mov.f32 w" #k ", %" #n ";\n"
#define OTK_WORDS                                                                           \
  OTK_WORD(0, 128) OTK_WORD(1, 129) OTK_WORD(2, 130) OTK_WORD(3, 131) OTK_WORD(4, 132)      \
  OTK_WORD(5, 133) OTK_WORD(6, 134) OTK_WORD(7, 135) OTK_WORD(8, 136) OTK_WORD(9, 137)      \
  OTK_WORD(10, 138) OTK_WORD(11, 139) OTK_WORD(12, 140) OTK_WORD(13, 141)                   \
  OTK_WORD(14, 142) OTK_WORD(15, 143) OTK_WORD(16, 144) OTK_WORD(17, 145)
#define OTK_S4(r, l) "+f"(s[r][l]), "+f"(s[r][l + 1]), "+f"(s[r][l + 2]), "+f"(s[r][l + 3])
#define OTK_S16(r) OTK_S4(r, 0), OTK_S4(r, 4), OTK_S4(r, 8), OTK_S4(r, 12)
#define OTK_W3(k) "f"(w[k]), "f"(w[k + 1]), "f"(w[k + 2])
#define OTK_JUMP(table, code_of_rows)                                                       \
  asm volatile("{\n.reg .f32 v, w<18>;\n" OTK_ROWS(OTK_NAME) OTK_ROWS(OTK_IN) OTK_WORDS      \
               "mov.f32 v, %146;\n" table "brx.idx.uni %147, go;\n" code_of_rows "done:\n"   \
               OTK_ROWS(OTK_OUT) "}\n"                                                       \
               : OTK_S16(0), OTK_S16(1), OTK_S16(2), OTK_S16(3), OTK_S16(4), OTK_S16(5),     \
                 OTK_S16(6), OTK_S16(7)                                                      \
               : OTK_W3(0), OTK_W3(3), OTK_W3(6), OTK_W3(9), OTK_W3(12), OTK_W3(15),         \
                 "f"(value), "r"(code))
// clang-format on

template <int Taps>
OTK_BOTH void multiply(int code, float value, const float (&w)[kLines + 2],
                       float (&s)[kRowsPerWarp][kLines]) {
  if constexpr (Taps == 1) {
    OTK_JUMP("go: .branchtargets c0_0, c1_0, c2_0, c3_0, c4_0, c5_0, c6_0, c7_0;\n",
             OTK_ALL(OTK_ROW1));
  } else {
    OTK_JUMP(
        "go: .branchtargets c0_0, c0_1, c0_2, c1_0, c1_1, c1_2, c2_0, c2_1, c2_2, c3_0, c3_1, "
        "c3_2, c4_0, c4_1, c4_2, c5_0, c5_1, c5_2, c6_0, c6_1, c6_2, c7_0, c7_1, c7_2;\n",
        OTK_ALL(OTK_ROW3));
  }
}
#else
template <int Taps>
OTK_BOTH void multiply(int code, float value, const float (&w)[kLines + 2],
                       float (&s)[kRowsPerWarp][kLines]) {
  const int row = Taps == 9 ? code / 3 : code, dy = Taps == 9 ? code % 3 : 0;
  for (int line = 0; line < kLines; ++line) s[row][line] += value * w[line + dy];
}
#endif

// Phase 2: the nonzeros of this warp's rows in this chunk. sums: [kRowsPerWarp][kLines].
template <int Taps>
OTK_BOTH void accumulate(const Problem& p, const Where& at, int chunk, int thread,
                         const float* shared, float (&sums)[kRowsPerWarp][kLines]) {
  const int warp = thread / kLanes, lane = thread % kLanes;
  constexpr int across = tile_width(Taps), lines = tile_height(Taps);
  const int32_t* begin = p.begin + (int64_t(at.group) * chunks(p) + chunk) * (kWarps + 1) + warp;
  const float* column = shared + lane;
  float words[kLines + 2] = {};
  uint32_t i = uint32_t(begin[0]);
  const uint32_t last = uint32_t(begin[1]);
  Entry next = entry_at(p.entries + i);
  while (i < last) {
    const Entry entry = next;
    next = entry_at(p.entries + ++i);  // early: the jump waits for it
    if (entry.key & 128) {
      const float* first = column + (entry.key >> 8);
      OTK_UNROLL
      for (int line = 0; line < lines; ++line) words[line] = first[line * across];
    }
    multiply<Taps>(int(entry.key & 31), entry.value, words, sums);
  }
}

// Phase 3: one row of pixels into shared memory, by slot of the group.
OTK_BOTH void stage(int line, int thread, const float (&sums)[kRowsPerWarp][kLines],
                    float* shared) {
  const int warp = thread / kLanes, lane = thread % kLanes;
  OTK_UNROLL
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
