/* Ends a CUDA graph's WHILE node (CUDA 12.4 and later) when its chain ends: the last kernel of the node's body.
 *
 * It has a PTX file of its own, since a driver that lacks cudaGraphSetConditional cannot load it, and does not have to.
 */
#include "chain.h"

/* Part of CUDA's device runtime, as cuda_device_runtime_api.h declares it; NVRTC 11.8 does not have it yet. Assemblers
 * that have it need no library for it. */
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned int value);

/* One thread is enough: racing calls are undefined. handle: a cudaGraphConditionalHandle. */
extern "C" __global__ void ddpmx_condition(const ddpmx_chain *chain, unsigned long long handle) {
  if (blockIdx.x == 0 && threadIdx.x == 0) cudaGraphSetConditional(handle, chain->halted ? 0u : 1u);
}
