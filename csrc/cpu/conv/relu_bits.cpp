// The pass behind a convolution and its mirror in backward: y = relu(scale * z + shift + residual),
// with one bit per element for the gradient. Memory bound, so each is one pass.
#include <algorithm>
#include <cstring>

#include "../../otk.h"
#include "../support/capability.h"
#include "../support/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace otk {
namespace {

// Elements of one unit of work: a multiple of 8, so that no two units share a byte.
constexpr int64_t kPiece = 1 << 15;

// Element i has the channel i % period; period 1: all of them have one channel.
struct Span {
  const float* scale;  // null: 1
  const float* shift;  // null: 0
  int64_t period;
};

// Groups of eight elements and a last, shorter one. Bit j of a byte: not (y[j] <= 0), true for NaN.
void forward_plain(float* z, const Span& span, const float* residual, uint8_t* bits, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    unsigned byte = 0;
    for (int64_t j = i; j < std::min(i + 8, n); ++j) {
      const int64_t c = j % span.period;
      float v = z[j];
      if (span.scale) v *= span.scale[c];
      if (span.shift) v += span.shift[c];
      if (residual) v += residual[j];
      const bool live = !(v <= 0.f);
      z[j] = live ? v : 0.f;
      byte |= unsigned{live} << (j - i);
    }
    if (bits) bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

// live: bits, or the output y of the ReLU.
void backward_plain(const float* grad, const uint8_t* bits, const float* y, const Span& span,
                    float* out, float* scaled, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const bool live = bits ? bits[i / 8] >> (i % 8) & 1 : !(y[i] <= 0.f);
    if (out) out[i] = live ? grad[i] : 0.f;
    if (scaled) scaled[i] = live ? grad[i] * span.scale[i % span.period] : 0.f;
  }
}

#if defined(__x86_64__)
// Intrinsics, because the vector extensions of the other kernels have no movemask. Without FMA, so
// that both versions round alike.
template <bool kPeriodic>
__attribute__((target("avx2"))) void forward_avx2(float* z, const Span& span, const float* residual,
                                                  uint8_t* bits, int64_t n) {
  const int64_t whole = n / 8 * 8;
  const __m256 zero = _mm256_setzero_ps();
  const bool scaled = span.scale, shifted = span.shift;
  const __m256 scale = _mm256_set1_ps(scaled ? span.scale[0] : 1.f);
  const __m256 shift = _mm256_set1_ps(shifted ? span.shift[0] : 0.f);
  for (int64_t i = 0, c = 0; i < whole; i += 8) {
    __m256 v = _mm256_loadu_ps(z + i);
    if (scaled) v = _mm256_mul_ps(v, kPeriodic ? _mm256_loadu_ps(span.scale + c) : scale);
    if (shifted) v = _mm256_add_ps(v, kPeriodic ? _mm256_loadu_ps(span.shift + c) : shift);
    if (residual) v = _mm256_add_ps(v, _mm256_loadu_ps(residual + i));
    const __m256 live = _mm256_cmp_ps(v, zero, _CMP_NLE_UQ);
    _mm256_storeu_ps(z + i, _mm256_and_ps(v, live));
    if (bits) bits[i / 8] = static_cast<uint8_t>(_mm256_movemask_ps(live));
    if (kPeriodic) c = c + 8 == span.period ? 0 : c + 8;
  }
  // A period is a multiple of 8 here, so a shorter group only ends rows of one channel.
  forward_plain(z + whole, span, residual ? residual + whole : nullptr,
                bits ? bits + whole / 8 : nullptr, n - whole);
}

template <bool kPeriodic>
__attribute__((target("avx2"))) void backward_avx2(const float* grad, const uint8_t* bits,
                                                   const float* y, const Span& span, float* out,
                                                   float* scaled, int64_t n) {
  const int64_t whole = n / 8 * 8;
  const __m256 zero = _mm256_setzero_ps();
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256 scale = _mm256_set1_ps(span.scale ? span.scale[0] : 1.f);
  for (int64_t i = 0, c = 0; i < whole; i += 8) {
    __m256 live;
    if (bits) {
      const __m256i byte = _mm256_set1_epi32(bits[i / 8]);
      live = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(byte, lane), lane));
    } else {
      live = _mm256_cmp_ps(_mm256_loadu_ps(y + i), zero, _CMP_NLE_UQ);
    }
    const __m256 g = _mm256_loadu_ps(grad + i);
    if (out) _mm256_storeu_ps(out + i, _mm256_and_ps(g, live));
    if (scaled) {
      const __m256 s = kPeriodic ? _mm256_loadu_ps(span.scale + c) : scale;
      _mm256_storeu_ps(scaled + i, _mm256_and_ps(_mm256_mul_ps(g, s), live));
    }
    if (kPeriodic) c = c + 8 == span.period ? 0 : c + 8;
  }
  backward_plain(grad + whole, bits ? bits + whole / 8 : nullptr, y ? y + whole : nullptr, span,
                 out ? out + whole : nullptr, scaled ? scaled + whole : nullptr, n - whole);
}
#endif

// Rows that hold all channels of a pixel one after the other (channels_last).
bool interleaved(const Rows& rows, int64_t channels) { return rows.inner != channels; }

#if defined(__x86_64__)
// Whether the vector kernels know the channel of every lane, and which of them it takes.
enum class Kernel { kPlain, kOneChannel, kPeriodic };
Kernel kernel_for(const Rows& rows, const ChannelMap& map) {
  if (!has_avx2()) return Kernel::kPlain;
  const bool mapped = map.scale || map.shift;
  if (!mapped || !interleaved(rows, map.channels)) return Kernel::kOneChannel;
  return map.channels % 8 == 0 ? Kernel::kPeriodic : Kernel::kPlain;
}
#endif

// body(outer, inner, first element, elements, channels of them) for every piece of every row.
template <class Body>
void for_pieces(const Rows& rows, const ChannelMap& map, const Parallel& par, const Body& body) {
  const bool periodic = (map.scale || map.shift) && interleaved(rows, map.channels);
  // Pieces begin at the first channel, and at a whole byte.
  const int64_t step = periodic ? 8 * map.channels : 1;
  const int64_t piece = periodic ? std::max<int64_t>(1, kPiece / step) * step : kPiece;
  const int64_t pieces = (rows.length + piece - 1) / piece;
  parallel_for(par, rows.outer * rows.inner * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / pieces, first = unit % pieces * piece;
      const int64_t outer = row / rows.inner, inner = row % rows.inner;
      const int64_t channel = periodic ? 0 : inner;
      const Span span{map.scale ? map.scale + channel : nullptr,
                      map.shift ? map.shift + channel : nullptr, periodic ? map.channels : 1};
      body(outer, inner, first, std::min(piece, rows.length - first), span);
    }
  });
}

float* at(const Rows& r, int64_t outer, int64_t inner) {
  return r.data + outer * r.outer_stride + inner * r.inner_stride;
}

}  // namespace

void relu_bits(const Rows& z, const ChannelMap& map, const Rows* residual, uint8_t* bits,
               const Parallel& par) {
  auto* forward = forward_plain;
#if defined(__x86_64__)
  const Kernel kernel = kernel_for(z, map);
  if (kernel == Kernel::kOneChannel) forward = forward_avx2<false>;
  if (kernel == Kernel::kPeriodic) forward = forward_avx2<true>;
#endif
  const int64_t bytes = (z.length + 7) / 8;
  for_pieces(z, map, par,
             [&](int64_t outer, int64_t inner, int64_t first, int64_t n, const Span& span) {
               const float* extra = residual ? at(*residual, outer, inner) + first : nullptr;
               uint8_t* to = bits ? bits + (outer * z.inner + inner) * bytes + first / 8 : nullptr;
               forward(at(z, outer, inner) + first, span, extra, to, n);
             });
}

void relu_bits_backward(const Rows& grad, const uint8_t* bits, const Rows* y, const ChannelMap& map,
                        const Rows* out, const Rows* scaled, const Parallel& par) {
  auto* backward = backward_plain;
#if defined(__x86_64__)
  const Kernel kernel = kernel_for(grad, map);
  if (kernel == Kernel::kOneChannel) backward = backward_avx2<false>;
  if (kernel == Kernel::kPeriodic) backward = backward_avx2<true>;
#endif
  const int64_t bytes = (grad.length + 7) / 8;
  for_pieces(grad, map, par,
             [&](int64_t outer, int64_t inner, int64_t first, int64_t n, const Span& span) {
               const auto of = [&](const Rows* r) {
                 return r ? at(*r, outer, inner) + first : nullptr;
               };
               const uint8_t* from =
                   bits ? bits + (outer * grad.inner + inner) * bytes + first / 8 : nullptr;
               backward(at(grad, outer, inner) + first, from, of(y), span, of(out), of(scaled), n);
               // As in every result of the kernels: left-over bits there may be denormal numbers.
               for (const Rows* r : {out, scaled})
                 if (r && first + n == r->length) std::fill(of(r) + n, of(r) + n + r->padding, 0.f);
             });
}

}  // namespace otk
