/* The kernels of the reverse chain: ddpmx_begin once, then for each step the engine and ddpmx_step.
 *
 * The kernels count the steps themselves, so one captured step (engine, ddpmx_step) serves for all of them: it can be
 * replayed S times, or be the body of a WHILE node (while.cu). All arithmetic is in step.h: every bit equals NumPy's.
 *
 * make_ptx.py makes step.ptx from this file; using it needs no other compiler.
 */
#include "chain.h"
#include "fours.h"

DDPMX_FN ddpmx_u32 ddpmx_elements(const ddpmx_chain *chain) {
  return (ddpmx_u32)chain->channels * (ddpmx_u32)chain->pixels;
}

/* From the row of an image to its row without a class, in elements. */
DDPMX_FN ddpmx_u64 ddpmx_half(const ddpmx_chain *chain, ddpmx_u32 elements) {
  return (ddpmx_u64)chain->B * elements;
}

/* Elements are counted in 32 bits. */
DDPMX_FN int ddpmx_is_refused(const ddpmx_chain *chain) {
  if (chain->B < 1 || chain->channels < 1 || chain->pixels < 1 || chain->S < 1) return 1;
  if ((chain->var != 0) != (chain->learned != 0)) return 1;
  if (chain->memory ? !chain->x0 || !chain->one_ago || chain->var : chain->one_ago || chain->two_ago) return 1;
  const ddpmx_u64 elements = (ddpmx_u64)chain->channels * (ddpmx_u64)chain->pixels, most = 0x7FFFFFFF;
  return elements > most || (ddpmx_u64)chain->B * (chain->guided ? 2 : 1) * ((elements + 3) / 4) > most;
}

/* A sampler with memory: adds to x what it remembers, and keeps x0 for the steps to come. Each thread has the elements that
 * it has just had in ddpmx_step, whose own loop has no registers left for this. */
DDPMX_FN void ddpmx_remember(ddpmx_chain *chain) {
  const ddpmx_memory memory = ((const ddpmx_memory *)chain->memory)[chain->step];
  const ddpmx_u32 elements = ddpmx_elements(chain);
  const ddpmx_u64 fours = (ddpmx_u64)chain->B * ddpmx_fours(elements), half = ddpmx_half(chain, elements);
  float *x = (float *)chain->x, *one_ago = (float *)chain->one_ago, *two_ago = (float *)chain->two_ago;
  const float *x0 = (const float *)chain->x0;
  const int wide = ddpmx_is_wide(elements, chain->x | chain->x0 | chain->one_ago | chain->two_ago);
  for (ddpmx_u64 index = ddpmx_thread(); index < fours; index += ddpmx_threads()) {
    const ddpmx_four four = ddpmx_locate((ddpmx_u32)index, elements);
    float here[4], one[4], two[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ddpmx_load(x + four.at, four.count, wide, here);
    ddpmx_load(one_ago + four.at, four.count, wide, one);
    if (two_ago) {
      ddpmx_load(two_ago + four.at, four.count, wide, two);
      ddpmx_store(one, four.count, wide, two_ago + four.at);
    }
    for (int k = 0; k < 4; ++k) here[k] = ddpmx_recall(memory, here[k], one[k], two[k]);
    ddpmx_store(here, four.count, wide, x + four.at);
    if (chain->guided) ddpmx_store(here, four.count, wide, x + half + four.at);
    ddpmx_load(x0 + four.at, four.count, wide, one);
    ddpmx_store(one, four.count, wide, one_ago + four.at);
  }
}

/* Called by one thread, when every block has finished its part of the step. */
DDPMX_FN void ddpmx_close(ddpmx_chain *chain, ddpmx_i32 step) {
  volatile ddpmx_control *control = (volatile ddpmx_control *)chain->control;
  const int bad = atomicOr(&chain->bad, 0); /* not from a cache */
  const ddpmx_i32 finished = bad ? step : step + 1;
  const ddpmx_i32 done = bad                      ? DDPMX_NOT_FINITE
                         : finished == chain->S   ? DDPMX_FINISHED
                         : control->stop != 0     ? DDPMX_STOPPED
                                                  : DDPMX_RUNNING;
  chain->arrived = 0;
  chain->step = finished;
  chain->halted = done != DDPMX_RUNNING;
  control->step = finished;
  if (bad) control->bad_step = step;
  __threadfence_system();
  control->done = done;
}

/* x_T ~ N(0, I), unless DDPMX_KEEP_X is set; the first t; the counters. A chain that is refused or stopped halts. */
extern "C" __global__ void __launch_bounds__(DDPMX_THREADS, DDPMX_BLOCKS) ddpmx_begin(ddpmx_chain *chain) {
  const int refused = ddpmx_is_refused(chain);
  if (ddpmx_thread() == 0) {
    volatile ddpmx_control *control = (volatile ddpmx_control *)chain->control;
    const ddpmx_i32 done = refused ? DDPMX_REFUSED : control->stop != 0 ? DDPMX_STOPPED : DDPMX_RUNNING;
    chain->step = 0;
    chain->arrived = 0;
    chain->bad = 0;
    chain->halted = done != DDPMX_RUNNING;
    control->step = 0;
    control->bad_step = -1;
    __threadfence_system();
    control->done = done;
  }
  if (refused) return;
  const ddpmx_u32 elements = ddpmx_elements(chain);
  const ddpmx_u64 fours = (ddpmx_u64)chain->B * ddpmx_fours(elements);
  const ddpmx_u32 *images = (const ddpmx_u32 *)chain->images;
  const ddpmx_i32 first = ((const ddpmx_i32 *)chain->timesteps)[0];
  const int keep_x = (chain->flags & DDPMX_KEEP_X) != 0, wide = ddpmx_is_wide(elements, chain->x);
  const ddpmx_u64 seed = chain->seed;
  const ddpmx_u64 half = ddpmx_half(chain, elements);
  const int guided = chain->guided;
  float *x = (float *)chain->x;
  ddpmx_i32 *t = (ddpmx_i32 *)chain->t;
  for (ddpmx_u64 index = ddpmx_thread(); index < fours; index += ddpmx_threads()) {
    const ddpmx_four four = ddpmx_locate((ddpmx_u32)index, elements);
    if (four.block == 0) t[four.image] = first;
    if (four.block == 0 && guided) t[chain->B + four.image] = first;
    if (keep_x) continue;
    float z[4];
    ddpmx_normal4(seed, four.block, images[four.image], 0, DDPMX_PURPOSE_INITIAL, 0, z);
    ddpmx_store(z, four.count, wide, x + four.at);
    if (guided) ddpmx_store(z, four.count, wide, x + half + four.at);
  }
}

/* Turns x_t and the network's output, with var if there is one, into x_{t-1}, in place, and t into the next timestep.
 * Guided, the output is that of both rows of an image, var that of the row with a class, and both rows get x, t and x0.
 *
 * Where the output is not finite x keeps its value. No block knows what the others have seen, so the rest of x moves
 * on, with or without what a sampler remembers: after a bad step x holds elements of two steps, and x0, image_bytes and
 * t cannot be used either. After a stop x and t are those of the step that would have been next.
 */
extern "C" __global__ void __launch_bounds__(DDPMX_THREADS, DDPMX_BLOCKS) ddpmx_step(ddpmx_chain *chain) {
  /* Both are written when all blocks have arrived, and none arrives before its threads have read them. */
  if (chain->halted) return;
  const ddpmx_i32 step = chain->step;
  const ddpmx_row row = ((const ddpmx_row *)chain->rows)[step];
  const ddpmx_i32 *timesteps = (const ddpmx_i32 *)chain->timesteps;
  const int last = step + 1 == chain->S;
  const ddpmx_i32 now = timesteps[step], next = last ? now : timesteps[step + 1];
  const ddpmx_u32 elements = ddpmx_elements(chain), channels = (ddpmx_u32)chain->channels;
  const ddpmx_u32 pixels = (ddpmx_u32)chain->pixels;
  const ddpmx_u64 fours = (ddpmx_u64)chain->B * ddpmx_fours(elements);
  const float *out = (const float *)chain->out, *var = (const float *)chain->var;
  float *x = (float *)chain->x, *x0 = (float *)chain->x0;
  unsigned char *image_bytes = last ? (unsigned char *)chain->image_bytes : (unsigned char *)0;
  ddpmx_i32 *t = (ddpmx_i32 *)chain->t;
  const int wide = ddpmx_is_wide(elements, chain->x | chain->out | chain->var | chain->x0);
  const float limit = chain->limit;
  ddpmx_learned learned = {0.0f, 0.0f};
  if (var) learned = ((const ddpmx_learned *)chain->learned)[step];
  int bad = 0;
  for (ddpmx_u64 index = ddpmx_thread(); index < fours; index += ddpmx_threads()) {
    const ddpmx_four four = ddpmx_locate((ddpmx_u32)index, elements);
    float here[4], output[4], lead[4], v[4] = {0.0f, 0.0f, 0.0f, 0.0f}, z[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    ddpmx_load(x + four.at, four.count, wide, here);
    ddpmx_load(out + four.at, four.count, wide, output);
    if (chain->guided) { /* read here, and half computed again: kept, they would spill registers */
      float without[4];
      const ddpmx_u64 half = ddpmx_half(chain, elements);
      ddpmx_load(out + half + four.at, four.count, wide, without);
      for (int k = 0; k < 4; ++k) output[k] = ddpmx_guide(chain->guidance, output[k], without[k]);
    }
    if (var) ddpmx_load(var + four.at, four.count, wide, v);
    if (row.sigma != 0.0f) { /* read here as well */
      const ddpmx_u32 *images = (const ddpmx_u32 *)chain->images;
      ddpmx_normal4(chain->seed, four.block, images[four.image], (ddpmx_u32)now, DDPMX_PURPOSE_STEP, 0, z);
    }
    for (int k = 0; k < 4; ++k) {
      /* checked here: after the clip, or the exponential, an infinity looks like any number */
      const int finite = ddpmx_is_finite(output[k]) && ddpmx_is_finite(v[k]);
      const ddpmx_row mine = var ? ddpmx_learn(row, learned, v[k]) : row;
      const float there = ddpmx_update(mine, limit, here[k], output[k], z[k], &lead[k]);
      here[k] = finite ? there : here[k];
      bad |= !finite;
    }
    ddpmx_store(here, four.count, wide, x + four.at);
    if (x0) ddpmx_store(lead, four.count, wide, x0 + four.at);
    if (chain->guided) {
      const ddpmx_u64 half = ddpmx_half(chain, elements);
      ddpmx_store(here, four.count, wide, x + half + four.at);
      if (x0) ddpmx_store(lead, four.count, wide, x0 + half + four.at);
    }
    if (image_bytes) {
      for (int k = 0; k < 4; ++k) {
        if (k >= four.count) continue;
        const ddpmx_u32 element = 4 * four.block + (ddpmx_u32)k, channel = element / pixels;
        const ddpmx_u64 pixel = element - channel * pixels;
        image_bytes[(ddpmx_u64)four.image * elements + pixel * channels + channel] = ddpmx_uint8(lead[k]);
      }
    }
    if (four.block == 0) t[four.image] = next; /* the network is done with it */
    if (four.block == 0 && chain->guided) t[chain->B + four.image] = next;
  }
  if (chain->memory && !bad) ddpmx_remember(chain);
  /* The last block to arrive closes the step. */
  if (bad) atomicOr(&chain->bad, 1);
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(&chain->arrived, 1u) + 1 != gridDim.x) return;
  __threadfence();
  ddpmx_close(chain, step);
}
