/* Ends a CUDA graph's WHILE node (CUDA 12.4 and later) with its chain: the last kernel of the node's body.
 *
 * It has a PTX of its own, because a driver that does not know cudaGraphSetConditional cannot load it and need not.
 */
#include "chain.h"

/* Of CUDA's device runtime, as cuda_device_runtime_api.h declares it, which NVRTC 11.8 does not know yet. The assemblers
 * that know it want no library for it. */
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

/* One thread is enough: racing calls are undefined. handle: a cudaGraphConditionalHandle. */
extern "C" __global__ void ddpmx_condition(const ddpmx_chain *chain, unsigned long long handle) {
  if (blockIdx.x == 0 && threadIdx.x == 0) cudaGraphSetConditional(handle, chain->halted ? 0u : 1u);
}
