/* The two structs through which the host and the kernels share one chain, for C, C++, NVRTC and Python's ctypes.
 *
 * Addresses are 64-bit numbers, so that the layout is the same everywhere. There is no padding, which the assertions
 * below check; layout.py mirrors the structs, and a test compares the two.
 */
#ifndef DDPMX_CHAIN_H
#define DDPMX_CHAIN_H

#include "step.h"

#ifdef __CUDACC_RTC__
#define DDPMX_OFFSET(type, field) ((ddpmx_u64) & ((type *)0)->field) /* NVRTC has no offsetof */
#else
#include <stddef.h>
#define DDPMX_OFFSET(type, field) offsetof(type, field)
#endif
#ifdef __cplusplus
#define DDPMX_ASSERT(condition) static_assert(condition, #condition)
#else
#define DDPMX_ASSERT(condition) _Static_assert(condition, #condition)
#endif
#define DDPMX_AT(type, field, offset) DDPMX_ASSERT(DDPMX_OFFSET(type, field) == (offset))

/* The largest block that the kernels may be launched with. Grid and block are one-dimensional, the grid of any size. */
#define DDPMX_THREADS 256

/* ddpmx_control.done: why a chain has ended. */
enum {
  DDPMX_RUNNING = 0,
  DDPMX_FINISHED = 1,   /* all S steps */
  DDPMX_STOPPED = 2,    /* the host stopped it */
  DDPMX_NOT_FINITE = 3, /* the network's output at bad_step */
  DDPMX_REFUSED = 4     /* ddpmx_begin refused the chain's numbers */
};

/* ddpmx_chain.flags */
enum {
  DDPMX_KEEP_X = 1 /* ddpmx_begin leaves x as it is: the chain starts from the caller's own state */
};

/* In pinned, mapped host memory, so that the host can follow and stop a chain while the device runs. Each word has one
 * writer. Before ddpmx_begin is launched the host sets stop and done to 0; later values belong to this chain. done is
 * written last: whoever sees it sees the other words too. */
typedef struct {
  ddpmx_i32 stop;     /* host: not 0 to end the chain after the running step */
  ddpmx_i32 step;     /* device: steps finished */
  ddpmx_i32 bad_step; /* device: the step, from 0, at which the network's output was not finite; -1 for none */
  ddpmx_i32 done;     /* device: why the chain has ended; DDPMX_RUNNING until then */
} ddpmx_control;

DDPMX_AT(ddpmx_control, stop, 0);
DDPMX_AT(ddpmx_control, step, 4);
DDPMX_AT(ddpmx_control, bad_step, 8);
DDPMX_AT(ddpmx_control, done, 12);
DDPMX_ASSERT(sizeof(ddpmx_control) == 16);

/* In device memory. The host fills in everything up to the counters, which belong to the kernels. N = C H W.
 *
 * R, the rows of the network's batch, is B, and 2 B where guided: image i is row i with its class and row B + i without. */
typedef struct {
  ddpmx_u64 x;           /* float32 [R, N], x_t: the engine's input, updated in place */
  ddpmx_u64 out;         /* float32 [R, N]: the engine's output */
  ddpmx_u64 var;         /* float32 [R, N]: its output var, where sigma is learned, or 0 */
  ddpmx_u64 t;           /* int32 [R]: the engine's timestep input */
  ddpmx_u64 x0;          /* float32 [R, N], where each step writes x0, or 0 */
  ddpmx_u64 image_bytes; /* uint8 [B, H, W, C], where the last step writes the images, or 0 */
  ddpmx_u64 rows;        /* ddpmx_row [S] */
  ddpmx_u64 learned;     /* ddpmx_learned [S], or 0; var and learned are both set or both 0 */
  ddpmx_u64 memory;      /* ddpmx_memory [S], or 0. With it x0 and one_ago are set, var is not, and sigma is 0 */
  ddpmx_u64 one_ago;     /* float32 [B, N], where a sampler with memory keeps x0 for the next step, or 0 */
  ddpmx_u64 two_ago;     /* float32 [B, N], where it keeps x0 for the step after that, or 0 if no step uses it */
  ddpmx_u64 timesteps;   /* int32 [S], the network's t at each step */
  ddpmx_u64 images;      /* uint32 [B], the images' indices; with the seed they fix each image's noise */
  ddpmx_u64 control;     /* ddpmx_control, its device address */
  ddpmx_u64 seed;
  ddpmx_i32 B;
  ddpmx_i32 channels; /* C */
  ddpmx_i32 pixels;   /* H W */
  ddpmx_i32 S;        /* steps */
  float limit;        /* the largest |x0|, or infinity for no clipping */
  ddpmx_u32 flags;
  ddpmx_i32 guided;   /* whether the chain is guided: 1 or 0 */
  float guidance;     /* w of a guided chain */
  /* the counters */
  ddpmx_i32 step;    /* the next step, or the running one */
  ddpmx_u32 arrived; /* blocks that have finished their part of it */
  ddpmx_i32 bad;     /* whether any thread has seen a number that is not finite */
  ddpmx_i32 halted;  /* whether the chain has ended: from then on ddpmx_step does nothing */
} ddpmx_chain;

DDPMX_AT(ddpmx_chain, x, 0);
DDPMX_AT(ddpmx_chain, out, 8);
DDPMX_AT(ddpmx_chain, var, 16);
DDPMX_AT(ddpmx_chain, t, 24);
DDPMX_AT(ddpmx_chain, x0, 32);
DDPMX_AT(ddpmx_chain, image_bytes, 40);
DDPMX_AT(ddpmx_chain, rows, 48);
DDPMX_AT(ddpmx_chain, learned, 56);
DDPMX_AT(ddpmx_chain, memory, 64);
DDPMX_AT(ddpmx_chain, one_ago, 72);
DDPMX_AT(ddpmx_chain, two_ago, 80);
DDPMX_AT(ddpmx_chain, timesteps, 88);
DDPMX_AT(ddpmx_chain, images, 96);
DDPMX_AT(ddpmx_chain, control, 104);
DDPMX_AT(ddpmx_chain, seed, 112);
DDPMX_AT(ddpmx_chain, B, 120);
DDPMX_AT(ddpmx_chain, channels, 124);
DDPMX_AT(ddpmx_chain, pixels, 128);
DDPMX_AT(ddpmx_chain, S, 132);
DDPMX_AT(ddpmx_chain, limit, 136);
DDPMX_AT(ddpmx_chain, flags, 140);
DDPMX_AT(ddpmx_chain, guided, 144);
DDPMX_AT(ddpmx_chain, guidance, 148);
DDPMX_AT(ddpmx_chain, step, 152);
DDPMX_AT(ddpmx_chain, arrived, 156);
DDPMX_AT(ddpmx_chain, bad, 160);
DDPMX_AT(ddpmx_chain, halted, 164);
DDPMX_ASSERT(sizeof(ddpmx_chain) == 168);
DDPMX_ASSERT(sizeof(ddpmx_row) == 20);
DDPMX_ASSERT(sizeof(ddpmx_learned) == 8);
DDPMX_ASSERT(sizeof(ddpmx_memory) == 8);

#endif
