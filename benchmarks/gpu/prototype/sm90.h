// Instructions of compute capability 9.0 that CUDA C++ has no word for, one function each. Shared
// memory is addressed in bytes of its own window. tests/sm90_host.h has the same functions for a
// host that runs a kernel's own code; what one promises, the other checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define OTK_DEVICE __device__ __forceinline__
#define OTK_UNROLL _Pragma("unroll")

namespace otk::sm90 {

OTK_DEVICE int thread_index() { return int(threadIdx.x); }
OTK_DEVICE int block_index() { return int(blockIdx.x); }
OTK_DEVICE int block_count() { return int(gridDim.x); }
// The same value in every lane of a warp, told to the compiler.
OTK_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

OTK_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return uint32_t(__cvta_generic_to_shared(shared_memory));
}

OTK_DEVICE void sync_block() { __syncthreads(); }
OTK_DEVICE void sync_warp() { __syncwarp(); }

// --- mbarriers -----------------------------------------------------------------------------------
OTK_DEVICE void barrier_init(uint32_t at, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}

// Makes initialised barriers visible to copies of the async proxy.
OTK_DEVICE void barrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

OTK_DEVICE void barrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// Arrives and announces bytes that copies will complete.
OTK_DEVICE void barrier_arrive_expect(uint32_t at, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
}

// Until the phase of this parity is over. A new barrier is in phase 0: parity 1 returns at once.
OTK_DEVICE void barrier_wait(uint32_t at, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(at),
      "r"(parity)
      : "memory");
}

// --- copies into shared memory -------------------------------------------------------------------
// 16 bytes, asynchronous; zeros where `inside` is false. `from` must be readable memory anyway.
OTK_DEVICE void copy16(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

OTK_DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Orders this thread's writes of shared memory before reads by tensor cores.
OTK_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A run of bytes, a multiple of 16; `barrier` is told when they have come.
OTK_DEVICE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// --- shared and global memory --------------------------------------------------------------------
OTK_DEVICE uint32_t load32(uint32_t at) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
  return value;
}

OTK_DEVICE uint4 load128(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

OTK_DEVICE void store128(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// Four 8x8 matrices of 16 bits, transposed: lane 8 i + k gives the address of row k of matrix i.
OTK_DEVICE void store_transposed(uint32_t at, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

OTK_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// --- warpgroup matrix multiplication -------------------------------------------------------------
// Operands without swizzle, K innermost: 8 rows of 16 bytes lie together. `along` bytes from one
// such block to the next along K, `down` bytes to the next 8 rows.
OTK_DEVICE uint64_t matrix(uint32_t at, uint32_t along, uint32_t down) {
  return uint64_t((at >> 4) & 0x3fff) | uint64_t((along >> 4) & 0x3fff) << 16 |
         uint64_t((down >> 4) & 0x3fff) << 32;
}

OTK_DEVICE void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
OTK_DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `Left` groups are under way.
template <int Left>
OTK_DEVICE void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

#define OTK_F(i) "+f"(s[i])
#define OTK_F4(i) OTK_F(i), OTK_F(i + 1), OTK_F(i + 2), OTK_F(i + 3)
#define OTK_F20(i) OTK_F4(i), OTK_F4(i + 4), OTK_F4(i + 8), OTK_F4(i + 12), OTK_F4(i + 16)
#define OTK_F60(i) OTK_F20(i), OTK_F20(i + 20), OTK_F20(i + 40)
#define OTK_N4(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3"
#define OTK_N8(t) OTK_N4(t) ", %" #t "4, %" #t "5, %" #t "6, %" #t "7"
#define OTK_N10(t) OTK_N8(t) ", %" #t "8, %" #t "9, "
#define OTK_N60 OTK_N10() OTK_N10(1) OTK_N10(2) OTK_N10(3) OTK_N10(4) OTK_N10(5)
#define OTK_MULTIPLY(n, sums, a, b, meta, ...)                                                  \
  template <>                                                                                   \
  OTK_DEVICE void multiply<n>(float (&s)[n / 2], uint64_t left, uint64_t right, uint32_t m) {   \
    asm volatile(                                                                               \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                          \
        "wgmma.mma_async.sp.sync.aligned.m64n" #n "k32.f32.bf16.bf16 {" sums "}, %" #a ", %" #b \
        ", %" #meta ", 0, add, 1, 1, 0, 0;\n}\n"                                                \
        : __VA_ARGS__                                                                           \
        : "l"(left), "l"(right), "r"(m));                                                       \
  }

// s += A B: A is 64 x 32 of bfloat16, 2:4 along K, stored as 64 x 16 values and indices `m`; B is
// 32 x N. Lane l of warp w has rows 16 w + l / 4 and 8 more, columns 8 j + 2 (l % 4) and 1 more:
// s[4 j + 2 r + c]. Lanes with l % 4 < 2 give the indices of 16 columns of K: bits 4 g to 4 g + 3
// the two places of group g in the first row, 16 bits further in the second.
template <int N>
OTK_DEVICE void multiply(float (&s)[N / 2], uint64_t left, uint64_t right, uint32_t m);
OTK_MULTIPLY(128, OTK_N60 OTK_N4(6), 64, 65, 66, OTK_F60(0), OTK_F4(60))
OTK_MULTIPLY(200, OTK_N60 OTK_N10(6) OTK_N10(7) OTK_N10(8) OTK_N8(9) ", %98, %99", 100, 101, 102,
             OTK_F60(0), OTK_F20(60), OTK_F20(80))
OTK_MULTIPLY(256,
             OTK_N60 OTK_N10(6) OTK_N10(7) OTK_N10(8) OTK_N10(9) OTK_N10(10) OTK_N10(11) OTK_N8(12),
             128, 129, 130, OTK_F60(0), OTK_F60(60), OTK_F4(120), OTK_F4(124))

template <int Count>
OTK_DEVICE void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
OTK_DEVICE void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

}  // namespace otk::sm90
