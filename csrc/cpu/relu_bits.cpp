// ReLU that leaves one bit per element for backward, in one pass over the activation: memory bound.
#include <algorithm>
#include <cstring>

#include "../otk.h"
#include "isa.h"
#include "run.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace otk {
namespace {

// Elements of one unit of work: a multiple of 8, so that no two units share a byte.
constexpr int64_t kPiece = 1 << 15;

// Groups of eight elements and a last, shorter one. Bit j of a byte: not (y[j] <= 0), true for NaN.
void forward_plain(float* z, const float* residual, uint8_t* bits, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    unsigned byte = 0;
    for (int64_t j = 0; j < std::min<int64_t>(8, n - i); ++j) {
      const float v = residual ? z[i + j] + residual[i + j] : z[i + j];
      const bool live = !(v <= 0.f);
      z[i + j] = live ? v : 0.f;
      byte |= unsigned{live} << j;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
  }
}

void backward_plain(const float* grad, const uint8_t* bits, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bits[i / 8] >> (i % 8) & 1 ? grad[i] : 0.f;
}

#if defined(__x86_64__)
// Intrinsics, because the vector extensions of the other kernels have no movemask.
__attribute__((target("avx2"))) void forward_avx2(float* z, const float* residual, uint8_t* bits,
                                                  int64_t n) {
  const int64_t whole = n / 8 * 8;
  const __m256 zero = _mm256_setzero_ps();
  for (int64_t i = 0; i < whole; i += 8) {
    __m256 v = _mm256_loadu_ps(z + i);
    if (residual) v = _mm256_add_ps(v, _mm256_loadu_ps(residual + i));
    const __m256 live = _mm256_cmp_ps(v, zero, _CMP_NLE_UQ);
    _mm256_storeu_ps(z + i, _mm256_and_ps(v, live));
    bits[i / 8] = static_cast<uint8_t>(_mm256_movemask_ps(live));
  }
  forward_plain(z + whole, residual ? residual + whole : nullptr, bits + whole / 8, n - whole);
}

__attribute__((target("avx2"))) void backward_avx2(const float* grad, const uint8_t* bits,
                                                   float* out, int64_t n) {
  const int64_t whole = n / 8 * 8;
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256i byte = _mm256_set1_epi32(bits[i / 8]);
    const __m256i live = _mm256_cmpeq_epi32(_mm256_and_si256(byte, lane), lane);
    _mm256_storeu_ps(out + i, _mm256_and_ps(_mm256_loadu_ps(grad + i), _mm256_castsi256_ps(live)));
  }
  backward_plain(grad + whole, bits + whole / 8, out + whole, n - whole);
}
#endif

bool has_avx2() {
  const Isa* isa = active_isa();
  return isa && std::strncmp(isa->name, "avx", 3) == 0;
}

// body(outer, inner, first element, elements) for every piece of every row.
template <class Body>
void for_pieces(const Rows& rows, const Parallel& par, const Body& body) {
  const int64_t pieces = (rows.length + kPiece - 1) / kPiece;
  parallel_for(par, rows.outer * rows.inner * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / pieces, first = unit % pieces * kPiece;
      body(row / rows.inner, row % rows.inner, first, std::min(kPiece, rows.length - first));
    }
  });
}

float* at(const Rows& r, int64_t outer, int64_t inner) {
  return r.data + outer * r.outer_stride + inner * r.inner_stride;
}

}  // namespace

void relu_bits(const Rows& z, const Rows* residual, uint8_t* bits, const Parallel& par) {
  auto* forward = forward_plain;
#if defined(__x86_64__)
  if (has_avx2()) forward = forward_avx2;
#endif
  const int64_t bytes = (z.length + 7) / 8;
  for_pieces(z, par, [&](int64_t outer, int64_t inner, int64_t first, int64_t n) {
    const float* extra = residual ? at(*residual, outer, inner) + first : nullptr;
    forward(at(z, outer, inner) + first, extra,
            bits + (outer * z.inner + inner) * bytes + first / 8, n);
  });
}

void relu_bits_backward(const Rows& grad, const uint8_t* bits, const Rows& out,
                        const Parallel& par) {
  auto* backward = backward_plain;
#if defined(__x86_64__)
  if (has_avx2()) backward = backward_avx2;
#endif
  const int64_t bytes = (grad.length + 7) / 8;
  for_pieces(grad, par, [&](int64_t outer, int64_t inner, int64_t first, int64_t n) {
    float* to = at(out, outer, inner) + first;
    backward(at(grad, outer, inner) + first,
             bits + (outer * grad.inner + inner) * bytes + first / 8, to, n);
    // As in every result of the kernels: left-over bits there may be denormal numbers.
    if (first + n == out.length) std::fill(to + n, to + n + out.padding, 0.f);
  });
}

}  // namespace otk
