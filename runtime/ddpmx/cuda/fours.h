/* How the kernels share out images among threads, and move their numbers: four neighbouring elements at a time. */
#ifndef DDPMX_FOURS_H
#define DDPMX_FOURS_H

#include "chain.h"

/* How many such blocks a multiprocessor should hold at once: 64 registers per thread. */
#define DDPMX_BLOCKS 4

/* Four neighbouring elements of one image, as one call of ddpmx_normal4 yields them. */
typedef struct {
  ddpmx_u32 image, block; /* elements 4*block .. 4*block+3 of image */
  ddpmx_u64 at;           /* where they begin in float32 [B, N] */
  int count;              /* 4, or less at an image's end */
} ddpmx_four;

/* The first four of this thread, and the stride to its next one, for a grid of any size. */
DDPMX_FN ddpmx_u64 ddpmx_thread(void) { return (ddpmx_u64)blockIdx.x * blockDim.x + threadIdx.x; }
DDPMX_FN ddpmx_u64 ddpmx_threads(void) { return (ddpmx_u64)gridDim.x * blockDim.x; }

DDPMX_FN ddpmx_u32 ddpmx_fours(ddpmx_u32 elements) { return (elements + 3) / 4; }

DDPMX_FN ddpmx_four ddpmx_locate(ddpmx_u32 index, ddpmx_u32 elements) {
  const ddpmx_u32 fours = ddpmx_fours(elements);
  ddpmx_four four;
  four.image = index / fours;
  four.block = index - four.image * fours;
  four.at = (ddpmx_u64)four.image * elements + 4 * four.block;
  four.count = elements - 4 * four.block < 4 ? (int)(elements - 4 * four.block) : 4;
  return four;
}

/* Whether fours can be moved as one: complete, and 16-byte aligned. An absent array's address, 0, counts as aligned. */
DDPMX_FN int ddpmx_is_wide(ddpmx_u32 elements, ddpmx_u64 addresses) {
  return elements % 4 == 0 && (addresses & 15) == 0;
}

DDPMX_FN void ddpmx_load(const float *from, int count, int wide, float to[4]) {
  if (wide) {
    const float4 four = *(const float4 *)from;
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    for (int k = 0; k < 4; ++k) to[k] = k < count ? from[k] : 0.0f;
  }
}

DDPMX_FN void ddpmx_store(const float from[4], int count, int wide, float *to) {
  if (wide) {
    float4 four;
    four.x = from[0], four.y = from[1], four.z = from[2], four.w = from[3];
    *(float4 *)to = four;
  } else {
    for (int k = 0; k < 4; ++k)
      if (k < count) to[k] = from[k];
  }
}

DDPMX_FN int ddpmx_is_finite(float x) { return (ddpmx_bits(x) & 0x7F800000) != 0x7F800000; }

#endif
