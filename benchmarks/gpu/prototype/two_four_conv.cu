// Kernels and C interface of the 2:4 convolution; see two_four_conv.h. Built alone by nvcc for
// sm_90a into a shared library: no torch, no other source.

#include "two_four_conv.h"

namespace otk::two_four {

template <int Rows>
__global__ void __launch_bounds__(kThreads, 1) two_four_kernel(const __grid_constant__ Problem p) {
  run_block<Rows>(p);
}

template <int Rows>
cudaError_t launch(const Problem& p, int blocks, cudaStream_t stream) {
  cudaError_t status = cudaFuncSetAttribute(
      two_four_kernel<Rows>, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile<Rows>::shared);
  if (status != cudaSuccess) return status;
  two_four_kernel<Rows><<<dim3(unsigned(blocks)), kThreads, Tile<Rows>::shared, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace otk::two_four

// rows: 16, 25 or 32 rows of 8 pixels a tile. blocks: at most the GPU's multiprocessors. Returns 0
// or a CUDA error code; *text names it.
extern "C" int otk_two_four_conv(const otk::two_four::Problem* problem, int rows, int blocks,
                                 void* stream, const char** text) {
  cudaError_t status = cudaErrorInvalidValue;
  auto queue = static_cast<cudaStream_t>(stream);
  if (rows == 16) status = otk::two_four::launch<16>(*problem, blocks, queue);
  if (rows == 25) status = otk::two_four::launch<25>(*problem, blocks, queue);
  if (rows == 32) status = otk::two_four::launch<32>(*problem, blocks, queue);
  *text = cudaGetErrorString(status);
  return int(status);
}

// Checked by the caller against its own idea of the layout.
extern "C" int otk_two_four_problem_size() { return int(sizeof(otk::two_four::Problem)); }
