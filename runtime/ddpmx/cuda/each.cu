/* The kernels of a batch in which each image makes a step of its own: ddpmx_begin_each for those that have just joined,
 * then the network, then ddpmx_step_each. Every bit is that of ddpmx_step for a chain of the image alone.
 *
 * The host counts the steps, and writes a new ddpmx_call for each call of the network; so a captured one (network,
 * ddpmx_step_each) serves for all of them. t is written by the host as well.
 */
#include "each.h"

#include "fours.h"

DDPMX_FN ddpmx_u32 ddpmx_elements_of(const ddpmx_call *call) {
  return (ddpmx_u32)call->channels * (ddpmx_u32)call->pixels;
}

DDPMX_FN ddpmx_u64 ddpmx_seed(const ddpmx_each *each) { return (ddpmx_u64)each->seed_high << 32 | each->seed_low; }

/* Where a four begins in the arrays of rows. */
DDPMX_FN ddpmx_u64 ddpmx_within(ddpmx_i32 row, ddpmx_u32 elements, ddpmx_u32 block) {
  return (ddpmx_u64)row * elements + 4 * block;
}

/* x_T ~ N(0, I) and x0 = 0 for the images that begin; nothing for the others. */
extern "C" __global__ void __launch_bounds__(DDPMX_THREADS, DDPMX_BLOCKS) ddpmx_begin_each(const ddpmx_call *call) {
  const ddpmx_u32 elements = ddpmx_elements_of(call);
  const ddpmx_u64 fours = (ddpmx_u64)call->count * ddpmx_fours(elements);
  float *x = (float *)call->x, *x0 = (float *)call->x0;
  const int wide = ddpmx_is_wide(elements, call->x | call->x0);
  for (ddpmx_u64 index = ddpmx_thread(); index < fours; index += ddpmx_threads()) {
    const ddpmx_four four = ddpmx_locate((ddpmx_u32)index, elements);
    const ddpmx_each *each = (const ddpmx_each *)call->each + four.image;
    const ddpmx_u32 flags = each->flags;
    if (!(flags & DDPMX_BEGINS)) continue;
    const ddpmx_i32 without = each->without;
    const ddpmx_u64 at = ddpmx_within(each->at, elements, four.block);
    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ddpmx_store(zero, four.count, wide, x0 + at);
    if (without >= 0) ddpmx_store(zero, four.count, wide, x0 + ddpmx_within(without, elements, four.block));
    if (flags & DDPMX_OWN_X) continue;
    float z[4];
    ddpmx_normal4(ddpmx_seed(each), four.block, each->image, 0, DDPMX_PURPOSE_INITIAL, 0, z);
    ddpmx_store(z, four.count, wide, x + at);
    if (without >= 0) ddpmx_store(z, four.count, wide, x + ddpmx_within(without, elements, four.block));
  }
}

/* Turns x_t of each image and the network's output into x_{t-1}, in place, as ddpmx_step does for a batch at one step.
 *
 * Where an image's output is not finite x keeps its value; the image's other numbers cannot be used then, and other images
 * do not notice. What a thread needs to know of its image it reads when it needs it: kept, it would spill registers. */
extern "C" __global__ void __launch_bounds__(DDPMX_THREADS, DDPMX_BLOCKS) ddpmx_step_each(const ddpmx_call *call) {
  const ddpmx_u32 elements = ddpmx_elements_of(call), channels = (ddpmx_u32)call->channels;
  const ddpmx_u32 pixels = (ddpmx_u32)call->pixels;
  const ddpmx_u64 fours = (ddpmx_u64)call->count * ddpmx_fours(elements);
  const float *out = (const float *)call->out, *var = (const float *)call->var;
  float *x = (float *)call->x, *x0 = (float *)call->x0;
  const int wide = ddpmx_is_wide(elements, call->x | call->out | call->var | call->x0 | call->one_ago | call->two_ago);
  for (ddpmx_u64 index = ddpmx_thread(); index < fours; index += ddpmx_threads()) {
    const ddpmx_four four = ddpmx_locate((ddpmx_u32)index, elements);
    const ddpmx_each *each = (const ddpmx_each *)call->each + four.image;
    const ddpmx_u32 flags = each->flags;
    const ddpmx_i32 without = each->without;
    const ddpmx_u64 at = ddpmx_within(each->at, elements, four.block);
    ddpmx_row row;
    row.p = each->p, row.q = each->q, row.a = each->a, row.b = each->b, row.sigma = each->sigma;
    float here[4], output[4], lead[4], v[4] = {0.0f, 0.0f, 0.0f, 0.0f}, z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ddpmx_load(x + at, four.count, wide, here);
    ddpmx_load(out + at, four.count, wide, output);
    if (without >= 0) {
      float other[4];
      ddpmx_load(out + ddpmx_within(without, elements, four.block), four.count, wide, other);
      for (int k = 0; k < 4; ++k) output[k] = ddpmx_guide(each->guidance, output[k], other[k]);
    }
    ddpmx_learned learned = {0.0f, 0.0f};
    if (flags & DDPMX_LEARNS) {
      ddpmx_load(var + at, four.count, wide, v);
      learned.c = each->c, learned.d = each->d;
    }
    if (row.sigma != 0.0f)
      ddpmx_normal4(ddpmx_seed(each), four.block, each->image, (ddpmx_u32)each->t, DDPMX_PURPOSE_STEP, 0, z);
    int bad = 0;
    for (int k = 0; k < 4; ++k) {
      const int finite = ddpmx_is_finite(output[k]) && ddpmx_is_finite(v[k]);
      const ddpmx_row mine = flags & DDPMX_LEARNS ? ddpmx_learn(row, learned, v[k]) : row;
      const float there = ddpmx_update(mine, call->limit, here[k], output[k], z[k], &lead[k]);
      here[k] = finite ? there : here[k];
      bad |= !finite;
    }
    if (flags & DDPMX_REMEMBERS) {
      ddpmx_memory memory;
      float *one_ago = (float *)call->one_ago, *two_ago = (float *)call->two_ago, one[4], two[4];
      memory.c = each->c, memory.d = each->d;
      ddpmx_load(one_ago + at, four.count, wide, one);
      ddpmx_load(two_ago + at, four.count, wide, two);
      if (!bad)
        for (int k = 0; k < 4; ++k) here[k] = ddpmx_recall(memory, here[k], one[k], two[k]);
      ddpmx_store(one, four.count, wide, two_ago + at);
      ddpmx_store(lead, four.count, wide, one_ago + at);
    }
    ddpmx_store(here, four.count, wide, x + at);
    if (flags & DDPMX_KEEPS_X0) ddpmx_store(lead, four.count, wide, x0 + at);
    if (without >= 0) {
      const ddpmx_u64 other = ddpmx_within(without, elements, four.block);
      ddpmx_store(here, four.count, wide, x + other);
      if (flags & DDPMX_KEEPS_X0) ddpmx_store(lead, four.count, wide, x0 + other);
    }
    if (flags & DDPMX_LAST) {
      unsigned char *image_bytes = (unsigned char *)call->image_bytes + (ddpmx_u64)each->at * elements;
      for (int k = 0; k < 4; ++k) {
        if (k >= four.count) continue;
        const ddpmx_u32 element = 4 * four.block + (ddpmx_u32)k, channel = element / pixels;
        const ddpmx_u64 pixel = element - channel * pixels;
        image_bytes[pixel * channels + channel] = ddpmx_uint8(lead[k]);
      }
    }
    /* the same number from all, and on no page of the device's: the host reads it when the call is done */
    if (bad) ((volatile ddpmx_i32 *)call->bad)[four.image] = 1;
  }
}
