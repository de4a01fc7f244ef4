// Kernels and C interface of the sparse convolution on CUDA cores; see sparse_conv.h.
// Built alone by nvcc into a shared library: no torch, no other source.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "sparse_conv.h"

namespace otk::sparse {

template <typename T, int Taps>
__global__ void __launch_bounds__(kThreads, 3) sparse_conv_kernel(const Problem p) {
  extern __shared__ float shared[];
  __shared__ int place[kRows];
  const Where at = where(p, blockIdx.x);
  const int thread = threadIdx.x;
  float sums[kRowsPerWarp][kLines] = {};
  find_places(p, at, thread, place);
  for (int chunk = 0, first = 0; first < p.cin; ++chunk, first += p.chunk) {
    __syncthreads();
    load_tile<T, Taps>(p, at, first, thread, shared);
    __syncthreads();
    accumulate<Taps>(p, at, chunk, thread, shared, sums);
  }
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    __syncthreads();
    stage(line, thread, sums, shared);
    __syncthreads();
    store<T>(p, at, line, thread, shared, place);
  }
}

template <typename T, int Taps>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
  const int bytes = shared_floats(p) * int(sizeof(float));
  cudaError_t status = cudaFuncSetAttribute(sparse_conv_kernel<T, Taps>,
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  sparse_conv_kernel<T, Taps><<<dim3(unsigned(blocks(p))), kThreads, size_t(bytes), stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
  return p.taps == 1 ? launch<T, 1>(p, stream) : launch<T, 9>(p, stream);
}

}  // namespace otk::sparse

// dtype: 0 float32, 1 float16, 2 bfloat16. Returns 0 or a CUDA error code; *text names it.
extern "C" int otk_sparse_conv(const otk::sparse::Problem* problem, int dtype, void* stream,
                               const char** text) {
  cudaError_t status = cudaErrorInvalidValue;
  auto queue = static_cast<cudaStream_t>(stream);
  if (dtype == 0) status = otk::sparse::launch<float>(*problem, queue);
  if (dtype == 1) status = otk::sparse::launch<__half>(*problem, queue);
  if (dtype == 2) status = otk::sparse::launch<__nv_bfloat16>(*problem, queue);
  *text = cudaGetErrorString(status);
  return int(status);
}

// Checked by the caller against its own idea of the layout.
extern "C" int otk_sparse_conv_problem_size() { return int(sizeof(otk::sparse::Problem)); }
