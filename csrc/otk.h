// The whole raw-pointer interface of the kernels. No torch here: kernels take pointers, sizes (in
// elements unless a name says bytes) and a way to run a loop in parallel, so they build and test
// with a C++ compiler alone.
#pragma once

#include <cstdint>

namespace otk {

// `run` calls body(ctx, begin, end) over [0, n), possibly on several threads at once. `deal` does
// so unit by unit, in order, on whichever thread is free; null: a counter on top of `run`.
using RangeBody = void (*)(void* ctx, int64_t begin, int64_t end);
struct Parallel {
  void (*run)(int64_t n, void* ctx, RangeBody body);
  int threads;
  void (*deal)(int64_t n, void* ctx, RangeBody body) = nullptr;
};

// A packed convolution. Independent of the image size: offsets are made from codes when it runs.
//
// The nonzeros are ordered row block > input-channel chunk > output row (shortest first) > code.
// entries: one per (output row, chunk) that has nonzeros, and one for an empty row:
//   bits 0..15 row inside its block, 16..29 number of nonzeros, 30 first entry of that row,
//   31 last entry of that row.
// blocks[2 * b], blocks[2 * b + 1]: first entry and first nonzero of block b = row_block * n_chunks
//   + chunk; one more pair closes the list.
// codes: (input channel - first channel of the chunk) * kernel^2 + tap, tap = ky * kernel + kx.
struct SparseWeight {
  const int32_t* blocks;
  const uint32_t* entries;
  const uint16_t* codes;
  const float* values;
  const float* bias;  // [cout] or null
  int64_t nnz;
  int cin, cout, kernel, stride, padding;
  int dilation;   // pixels between neighbouring taps
  int chunk;      // input channels per chunk
  int row_block;  // output rows per block
  int n_chunks, n_row_blocks;
};

// Pixels from the first tap of a window to its last, both included.
inline int64_t span(const SparseWeight& w) { return int64_t{w.kernel - 1} * w.dilation + 1; }

// Reads a structure tensor (opentrans_kernels/pack/layout.py writes it; `words` int32) into `out`,
// whose values and bias are left to the caller. Checks its header and its list of blocks. Returns
// null, or what is wrong with it. `out` points into it.
const char* read_pack(const int32_t* structure, int64_t words, SparseWeight* out);

// Largest stride, padding and dilation, so that no coordinate overflows.
constexpr int32_t kMaxStep = 1 << 15;

// What the kernels throw where an entry or a code points out of its block. They look at each of
// them when they decode it, so no pack that read_pack took makes them touch foreign memory.
struct PackError {};

constexpr uint32_t kEntryFirst = 1u << 30;
constexpr uint32_t kEntryLast = 1u << 31;
constexpr int kEntryCountShift = 16;
constexpr uint32_t kEntryCountMask = 0x3fff;
constexpr uint32_t kEntryRowMask = 0xffff;

// A batch of planar float32 images; element (n, c, h, w) at
// data[n * batch_stride + c * plane_stride + h * row_stride + w * col_stride].
struct Planes {
  float* data;
  int64_t batch_stride, plane_stride, row_stride, col_stride;
  int n, c, h, w;
  // Floats that may be read at and after data (the rest of the storage).
  int64_t readable;
};

// Floats between planes of a tensor the kernels allocate: whole cache lines, an odd number of them
// so that the channels of one tile spread over all L1 sets (a power-of-two stride maps them to a
// few sets only).
inline int64_t plane_stride(int64_t pixels) {
  const int64_t lines = (pixels + 15) / 16;
  return (lines + 1 - lines % 2) * 16;
}

// What a convolution applies to its sums last; the numbers are those of activations.py.
enum ActivationKind : int32_t {
  kNone,
  kRelu,
  kRelu6,
  kLeakyRelu,
  kSilu,
  kHardSwish,
  kGelu,       // with the error function
  kGeluTanh,   // with its approximation by tanh
  kQuickGelu,  // x / (1 + e^(-1.702 x))
};
struct Activation {
  int32_t kind;
  float slope;  // of kLeakyRelu, below zero
};

// The kernels on packs throw PackError, and std::bad_alloc where scratch memory is not to be had.

// out = act(conv(x) + bias [+ residual]). out and residual have the convolution's output shape;
// out.plane_stride must be plane_stride(h * w) with dense rows. residual may be out itself.
void sparse_conv2d(const SparseWeight& w, const Planes& x, const Planes& out,
                   const Planes* residual, const Activation& act, const Parallel& par);

// Tokens of `width` channels: channel c of token t at data[t * stride + c * channel]. One of the
// two strides is 1; outputs and residuals have dense channels.
struct Tokens {
  float* data;
  int64_t count, width, stride, channel;
};

// out = act(x W^T + bias [+ residual]) of tokens, W a packed 1x1 with stride 1 and no padding.
void sparse_linear(const SparseWeight& w, const Tokens& x, const Tokens& out,
                   const Tokens* residual, const Activation& act, const Parallel& par);
// out = act(x W1^T + bias1) W2^T + bias2 [+ residual]; what lies between is never in memory as a
// whole.
void sparse_mlp(const SparseWeight& w1, const SparseWeight& w2, const Tokens& x, const Tokens& out,
                const Tokens* residual, const Activation& act, const Parallel& par);

// grad_values[i] = sum over batch and pixels of grad_out * x at nonzero i, in packed order.
void sparse_conv2d_wgrad(const SparseWeight& w, const Planes& x, const Planes& grad_out,
                         float* grad_values, const Parallel& par);

// A residual bottleneck in one pass over bands of rows, intermediates in per-thread scratch:
// out = relu(c3(pool(relu(c2(relu(c1(x)))))) + shortcut), shortcut = x or down(pool(x)).
// c1, c3 and down are 1x1, c2 is 3x3 with padding 1. Strides are 1, or those of c2 and down 2 where
// nothing is pooled.
struct Bottleneck {
  SparseWeight c1, c2, c3, down;
  bool has_down;
  int pool;       // average pooling after c2, 1 = none
  int down_pool;  // average pooling before down, 1 = none

  // Rows, or columns, of the output for `size` of the input; one every step() of them.
  int step() const { return pool * c2.stride; }
  int64_t size(int64_t in) const { return c2.stride > 1 ? (in - 1) / c2.stride + 1 : in / pool; }
};
void sparse_bottleneck(const Bottleneck& block, const Planes& x, const Planes& out,
                       const Parallel& par);

// Blocks [0, count) one after the other, without writing the outputs between them to memory.
void sparse_stage(const Bottleneck* blocks, int count, const Planes& x, const Planes& out,
                  const Parallel& par);
// Whether sparse_stage suits these sizes and threads. If not, blocks are better run one by one:
// every thread would compute too many rows that its neighbour computes as well.
bool stage_pays(const Bottleneck* blocks, int count, const Planes& x, const Planes& out,
                const Parallel& par);

// out[h, w] = mean of the k x k window at (k h, k w); rows and columns that do not fill a window
// are dropped, as AvgPool2d(k) does.
void avg_pool2d(const Planes& x, const Planes& out, int k, const Parallel& par);

// A convolution of each channel with a window of its own: weight [c][kernel][kernel], bias [c] or
// null.
struct Depthwise {
  const float *weight, *bias;
  int kernel, stride, padding;
  Activation act;
};
// out = act(conv(x) + bias), its rows dense; x.col_stride must be 1. Throws std::bad_alloc.
void depthwise_conv2d(const Depthwise& conv, const Planes& x, const Planes& out,
                      const Parallel& par);

// A dense 3x3 convolution of stride 1 with transformed weights: weight
// [16][rows of kWinogradRows][cin][kWinogradRows], zeros in the rows past cout, matrix 4 i + j
// being (G g G^T)[i][j] with G = [[1, 0, 0], [1/2, 1/2, 1/2], [1/2, -1/2, 1/2], [0, 0, 1]].
constexpr int kWinogradRows = 8;
struct Winograd {
  const float *weight, *bias;  // bias [cout] or null
  int cin, cout, padding;
  Activation act;
};
// out = act(conv(x) + bias [+ residual]), its rows dense; so are those of residual, which may be
// out itself. Sums of pixels are formed: what is not finite reaches all outputs of the 2x2 tiles
// whose 4x4 inputs hold it. Throws std::bad_alloc.
void winograd_conv2d(const Winograd& conv, const Planes& x, const Planes& out,
                     const Planes* residual, const Parallel& par);

// Windows of kernel[0] x kernel[1] pixels, one every stride[0] rows and stride[1] columns, the
// first one padding[0] rows above and padding[1] columns left of the image. Every window holds a
// pixel of the image, so padding is at most half of kernel.
struct PoolWindow {
  int kernel[2], stride[2], padding[2];
};

// out[h, w] = the largest number of window (h, w); bits as torch's: of equals the first, of NaNs
// the last. x.col_stride is 1. Both throw std::bad_alloc.
void max_pool2d(const Planes& x, const Planes& out, const PoolWindow& window, const Parallel& par);

// Sums of the windows over `divisor`; 0: over their sizes, with_padding: pixels of the padding
// counted, as nn.AvgPool2d counts them.
void window_avg_pool2d(const Planes& x, const Planes& out, const PoolWindow& window,
                       bool with_padding, int64_t divisor, const Parallel& par);

// Rows of `length` dense floats: row (i, j) starts at data[i * outer_stride + j * inner_stride].
// Behind each of them lie `padding` floats that belong to nobody.
struct Rows {
  float* data;
  int64_t outer, inner, outer_stride, inner_stride, length, padding;
};

// Factors and summands of the channels; either may be null.
struct ChannelMap {
  const float* scale;
  const float* shift;
  int64_t channels;
};

// z = relu(scale * z + shift + residual) in place; residual may be null. NaN stays NaN. A row is a
// plane (inner = channels), or an image with its channels last (inner = 1). Bit e % 8 of byte e / 8
// of a row of bits is set where element e passes its gradient on: not (z <= 0). Every row of bits
// starts at a whole byte, rows in the order (i, j). bits may be null.
void relu_bits(const Rows& z, const ChannelMap& map, const Rows* residual, uint8_t* bits,
               const Parallel& par);

// out = grad where the bit is set, or where bits is null and not (y <= 0); 0 elsewhere (selected,
// not multiplied). scaled = scale * out. Either may be null, or grad. Their padding is set to 0.
void relu_bits_backward(const Rows& grad, const uint8_t* bits, const Rows* y, const ChannelMap& map,
                        const Rows* out, const Rows* scaled, const Parallel& par);

// The gradient of avg_pool2d: out[k h + i, k w + j] = grad[h, w] / k^2, 0 outside all windows.
void avg_pool2d_backward(const Rows& grad, const Rows& out, int width, int k, const Parallel& par);

// Power-law fits of `layers` ascending positive spectra x[offsets[i] .. offsets[i + 1]). Of the
// starts first[i] <= start < last[i] the one with the smallest KS distance is taken, the first of
// equals: out[3 * i ..] = start inside the spectrum, alpha, distance; -1, NaN, 1 for an empty
// window. samples: offsets in the lower bound of a candidate, 0 scans every pair; block: offsets
// that share an upper bound. Both change the time only.
void powerlaw_fit(const double* x, const int64_t* offsets, const int64_t* first,
                  const int64_t* last, int64_t layers, int samples, int block, double* out,
                  const Parallel& par);

// Squared singular values of `count` matrices [rows][columns], float or double: element (m, i, j)
// at data[m * stride + i * row_stride + j * column_stride].
struct StridedMatrices {
  const void* data;
  bool is_double;
  int64_t count, rows, columns, stride, row_stride, column_stride;
};

// values [count][rows]: eigenvalues of scale * A A^T, ascending, at least 0; NaN where the trace is
// not finite. Those from `threshold` on are to have relative errors of at most `relative`.
// redone [count]: how many of the smallest were computed again for that; -1 if that was not enough.
// A matrix takes 4 * rows^2 bytes and little more, twice that if something is computed again.
// Throws std::bad_alloc.
void gram_eigenvalues(const StridedMatrices& a, double scale, double threshold, double relative,
                      double* values, int64_t* redone, const Parallel& par);

// Attention by sampling. The pixels of `levels` maps (level l is shapes[2 l] high and shapes[2 l +
// 1] wide) lie one after the other in value [n][s][m][d], d dense. Query (n, q) reads for head m
// the points k = level * points + point at the location (x, y) in [0, 1] of its level, between
// pixels bilinearly, outside as zeros, and adds them up with weights [n][q][m][levels * points].
// locations are [n][q][m][levels * points][2], the last two dimensions dense, as is the last one of
// weights. NaN and infinite locations are outside; what is outside adds nothing, whatever its
// weight.
//
// With `reference` ([n][q][levels][reference_size], the last dense) weights are logits that go
// through a softmax, and locations are offsets: location = reference + offset / (width, height) for
// a reference (x, y), and (x, y) + offset / points * (w, h) / 2 for a reference (x, y, w, h).
struct DeformAttn {
  const int64_t* shapes;
  int64_t n, s, m, d, q, levels, points;
  const float* value;
  int64_t value_n, value_s, value_m;  // strides, and so on
  const float* locations;
  int64_t locations_n, locations_q, locations_m;
  const float* weights;
  int64_t weights_n, weights_q, weights_m;
  const float* reference;
  int64_t reference_n, reference_q, reference_l, reference_size;
};
// out [n][q][m][d], dense. Both throw std::bad_alloc.
void ms_deform_attn(const DeformAttn& a, float* out, const Parallel& par);
// Without a reference. grad like out; the results dense and all written, in the order of their
// inputs. A location's gradient is that of the cell between the pixels at floor(x) and floor(x)
// + 1.
void ms_deform_attn_backward(const DeformAttn& a, const float* grad, float* grad_value,
                             float* grad_locations, float* grad_weights, const Parallel& par);

// Scores of k classes per pixel: out[n][k][y][x] is the sum over q of classes[n][q][k] times the
// sigmoid of masks[n][q] resized. Masks are resized to `size` where `first` is set, cut to `crop`
// from the top left, and resized to `out` where `second` is: bilinear, corners not aligned, each
// step as torch computes it. Without `first`, size is (h, w); without `second`, out is crop.
struct MaskScores {
  int64_t n, q, k, h, w;
  const float* masks;
  int64_t masks_n, masks_q, masks_h, masks_w;  // strides
  const float* classes;
  int64_t classes_n, classes_q, classes_k;
  bool first, second;
  int64_t size[2], crop[2], out[2];
};
// out dense. No map of all queries is ever held. Throws std::bad_alloc.
void mask_scores(const MaskScores& a, float* out, const Parallel& par);

// Checksums of memory, block by block of kBlockBytes, the last one shorter. A block is read as
// 64-bit words w, the last one filled up with zeros; its checksum is the sum of (w ^ (w >> 29)) *
// key of the position, keys being odd, modulo 2^64. One changed word always changes it.
constexpr int64_t kBlockBytes = 512;
struct Memory {
  const void* data;
  int64_t bytes;
};
void block_sums(const Memory& memory, int64_t* sums, const Parallel& par);
// Whether a block differs from its checksum. Read are the blocks of the part `turn` of `turns`, one
// at least; turns = 1: all of them.
bool blocks_differ(const Memory& memory, const int64_t* sums, int64_t turn, int64_t turns,
                   const Parallel& par);
// Asks for the first of these blocks, so that those of many tensors arrive together.
void prefetch_blocks(const Memory& memory, const int64_t* sums, int64_t turn, int64_t turns);

// The instruction set in use ("avx512", "avx2", "neon", "generic"). Chosen once, from the CPU and
// OPENTRANS_CPU_CAPABILITY. Returns null if the forced one is unknown or not supported here, with
// the reason in *why.
const char* cpu_capability(const char** why);

// Memory of large outputs, 2 MB-aligned, reused from call to call. pool_take throws std::bad_alloc.
// pool_trim returns what is idle to the system; pool_bytes counts idle and used.
void* pool_take(int64_t bytes);
void pool_give(void* block);
void pool_trim();
int64_t pool_bytes();

// Bytes of scratch memory held by all threads at the moment.
int64_t scratch_bytes();

}  // namespace otk
