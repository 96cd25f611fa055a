/* The structs of a batch in which each image makes a step of its own: images at different steps, of different samplers
 * and seeds, in one call of the network. layout.py mirrors them, and a test compares the two.
 */
#ifndef DDPMX_EACH_H
#define DDPMX_EACH_H

#include "chain.h"

#ifdef __CUDACC__
#define DDPMX_ALIGNED __align__(16)
#else
#define DDPMX_ALIGNED __attribute__((aligned(16)))
#endif

/* ddpmx_each.flags */
enum {
  DDPMX_BEGINS = 1,    /* ddpmx_begin_each sets x0 to 0, and x to x_T unless DDPMX_OWN_X is set */
  DDPMX_OWN_X = 2,     /* x is there already */
  DDPMX_LEARNS = 4,    /* sigma = exp(c + d v) */
  DDPMX_REMEMBERS = 8, /* c and d are the coefficients of x0 one step ago and two steps ago; sigma is 0 */
  DDPMX_LAST = 16,     /* the image is wanted as bytes after this step */
  DDPMX_KEEPS_X0 = 32  /* x0 is wanted after this step */
};

/* One image's step: four times 16 bytes, each of which is read as one, and only where it is needed. */
typedef struct DDPMX_ALIGNED {
  float p, q, a, b;    /* of ddpmx_row */
  float sigma;
  ddpmx_u32 flags;
  ddpmx_i32 at;        /* its row in the network's batch */
  ddpmx_i32 without;   /* of a guided chain its row without a class, else -1 */
  ddpmx_u32 image;     /* its index; with the seed it fixes the noise */
  ddpmx_i32 t;         /* the network's t at this step */
  ddpmx_u32 seed_low, seed_high;
  float c, d;          /* ddpmx_learned or ddpmx_memory, by the flags: no sampler has both */
  float guidance;      /* w of a guided chain */
  ddpmx_u32 unused;
} ddpmx_each;

/* One call of the network, and the steps after it. Images have their rows in arrays of R, as the network's batch; those of
 * no image in the call are left alone. N = C H W. */
typedef struct {
  ddpmx_u64 x;           /* float32 [R, N], x_t: the network's input, updated in place */
  ddpmx_u64 out;         /* float32 [R, N]: its output */
  ddpmx_u64 var;         /* float32 [R, N]: its output var, or 0 */
  ddpmx_u64 x0;          /* float32 [R, N], where steps with DDPMX_KEEPS_X0 write x0 */
  ddpmx_u64 one_ago;     /* float32 [R, N], where samplers with memory keep x0 for the next step */
  ddpmx_u64 two_ago;     /* float32 [R, N], and for the step after that */
  ddpmx_u64 image_bytes; /* uint8 [R, H, W, C], where a last step writes the image */
  ddpmx_u64 bad;         /* int32 [count]: 1 is written where the output was not finite, else nothing */
  ddpmx_u64 each;        /* ddpmx_each [count] */
  ddpmx_i32 count;       /* images in this call; 0 for none */
  ddpmx_i32 channels;    /* C */
  ddpmx_i32 pixels;      /* H W */
  float limit;           /* the largest |x0|, or infinity for no clipping */
} ddpmx_call;

DDPMX_AT(ddpmx_each, p, 0);
DDPMX_AT(ddpmx_each, sigma, 16);
DDPMX_AT(ddpmx_each, flags, 20);
DDPMX_AT(ddpmx_each, at, 24);
DDPMX_AT(ddpmx_each, without, 28);
DDPMX_AT(ddpmx_each, image, 32);
DDPMX_AT(ddpmx_each, t, 36);
DDPMX_AT(ddpmx_each, seed_low, 40);
DDPMX_AT(ddpmx_each, c, 48);
DDPMX_AT(ddpmx_each, guidance, 56);
DDPMX_ASSERT(sizeof(ddpmx_each) == 64);
DDPMX_AT(ddpmx_call, each, 64);
DDPMX_AT(ddpmx_call, count, 72);
DDPMX_AT(ddpmx_call, limit, 84);
DDPMX_ASSERT(sizeof(ddpmx_call) == 88);

#endif
