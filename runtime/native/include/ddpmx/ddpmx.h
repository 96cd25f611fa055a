/* libddpmx: the whole reverse chain of a diffusion model behind a C ABI.
 *
 * Open a model file written by `ddpmx export` or `ddpmx build`, and generate images as bytes. No Python, no torch; ONNX
 * Runtime or TensorRT are loaded when a file needs them, and never linked.
 *
 *     ddpmx_pipeline *pipeline = NULL;
 *     ddpmx_request request;
 *     ddpmx_request_init(&request, sizeof request);
 *     request.n = 4;
 *     if (ddpmx_open("model.onnx", NULL, &pipeline) || ddpmx_generate(pipeline, &request, images, sizeof images, NULL, 0))
 *       fprintf(stderr, "%s\n", ddpmx_last_error());
 *     ddpmx_close(pipeline);
 *
 * The same file, seed and request give the same bytes as Python's ddpmx.load(...).generate(...) with the same ONNX Runtime
 * on the same CPU.
 *
 * Rules that hold everywhere:
 * - Every function that can fail returns a ddpmx_status; 0 is success. ddpmx_last_error() has the error text.
 * - Nothing is thrown, printed or aborted across this API, and the library never ends the process.
 * - The caller allocates the memory for results. ddpmx_close frees everything that the library allocates.
 * - A struct begins with its size, so that later versions can append fields. Set up each struct that you pass with its
 *   _init function, which sets every field to its default.
 * - Text is UTF-8 and ends with a zero byte; paths are in the encoding of the file system. Text is copied before a call
 *   returns.
 * - Any thread may call any function. A pipeline may be opened, used and closed in different threads.
 */
#ifndef DDPMX_DDPMX_H
#define DDPMX_DDPMX_H

#include <stddef.h>
#include <stdint.h>

#if defined(DDPMX_BUILDING)
#define DDPMX_API __attribute__((visibility("default")))
#else
#define DDPMX_API
#endif

#ifdef __cplusplus
#define DDPMX_NOEXCEPT noexcept
extern "C" {
#else
#define DDPMX_NOEXCEPT
#endif

/* ddpmx_abi_version() must return this for a program that was compiled with this header. */
#define DDPMX_ABI_VERSION 1u

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/* The kinds of errors of Python's ddpmx.errors, and three more. Numbers never change; new ones may be added. */
typedef int32_t ddpmx_status;
enum {
  DDPMX_OK = 0,
  DDPMX_INPUT = 1,         /* a value, pointer or struct_size that cannot be used; InputError */
  DDPMX_FILE_FORMAT = 2,   /* a file is missing, truncated, or of another format; FileFormatError */
  DDPMX_SPEC = 3,          /* the spec of a file is missing, or contradicts itself; SpecError */
  DDPMX_BACKEND = 4,       /* the library that computes the network is missing, or fails; BackendError */
  DDPMX_PLAN_MISMATCH = 5, /* a plan for another platform, TensorRT or GPU: rebuild it; PlanMismatchError */
  DDPMX_NUMERIC = 6,       /* the network returned NaN or an infinity; NumericError */
  DDPMX_CANCELLED = 7,     /* the callback cancelled the chain; Cancelled */
  DDPMX_MEMORY = 8,        /* out of host memory */
  DDPMX_BUSY = 9,          /* the pipeline is running a chain, and cannot be closed */
  DDPMX_INTERNAL = 10      /* a bug in this library: please report it */
};

/* "DDPMX_INPUT" and so on; "DDPMX_?" for an unknown number. Never NULL. */
DDPMX_API const char *ddpmx_status_name(ddpmx_status status) DDPMX_NOEXCEPT;

/* The error text of this thread's last failing call: a line with the fact, then perhaps lines with "Note: …" and
 * "Hint: …". Never NULL; empty before the first error. It stays valid until the next failing call of the same thread. */
DDPMX_API const char *ddpmx_last_error(void) DDPMX_NOEXCEPT;

/* DDPMX_ABI_VERSION of the loaded library. If it is a different number, do not call anything else. */
DDPMX_API uint32_t ddpmx_abi_version(void) DDPMX_NOEXCEPT;

/* The version of the loaded library, "0.1.0". */
DDPMX_API const char *ddpmx_version(void) DDPMX_NOEXCEPT;

/* ---- opening a model --------------------------------------------------------------------------------------------- */

typedef struct ddpmx_pipeline ddpmx_pipeline;

/* ddpmx_open_options.flags */
#define DDPMX_TRUST_HOST_CODE 1u /* accept plans that contain code for the CPU, which loading runs */

typedef struct ddpmx_open_options {
  uint32_t struct_size;
  uint32_t flags;              /* DDPMX_TRUST_HOST_CODE, or 0 */
  int32_t threads;             /* CPU threads of ONNX Runtime, 0…256; 0: its default */
  int32_t device;              /* the GPU that runs a plan, in CUDA's order, from 0 */
  const char *spec;            /* JSON of a ModelSpec, for an ONNX file without one; or NULL */
  const char *ort_library;     /* ONNX Runtime's libonnxruntime.so; NULL: $DDPMX_ORT_LIBRARY, or the system's */
  const char *trt_module;      /* libddpmx_trt.so; NULL: $DDPMX_TRT_MODULE, or the one beside this library */
  const char *trt_library;     /* TensorRT's own library; NULL: $DDPMX_TRT_LIBRARY, or the system's */
  const char *executor;        /* for a plan: "auto" (or NULL), "graph" or "plain" */
  const char *cache;           /* a folder where TensorRT-RTX keeps what it compiles for the GPU, or NULL */
} ddpmx_open_options;

/* Set the defaults. size: sizeof(ddpmx_open_options) in the caller.
 * DDPMX_INPUT: NULL, or a size that no version of the struct has. */
DDPMX_API ddpmx_status ddpmx_open_options_init(ddpmx_open_options *options, size_t size) DDPMX_NOEXCEPT;

/* Open a model.onnx, or a model.plan that was built for this machine. *pipeline is NULL after a failure.
 *
 * options: NULL for the defaults.
 * Errors: DDPMX_FILE_FORMAT, DDPMX_SPEC, DDPMX_BACKEND, DDPMX_PLAN_MISMATCH, DDPMX_INPUT, DDPMX_MEMORY. */
DDPMX_API ddpmx_status ddpmx_open(const char *path, const ddpmx_open_options *options,
                                  ddpmx_pipeline **pipeline) DDPMX_NOEXCEPT;

/* Free everything. NULL is allowed. DDPMX_BUSY, and nothing is freed: another thread is running a chain, or the caller is
 * a callback. After DDPMX_OK the pipeline must not be used; nor may another call with it begin during this one. */
DDPMX_API ddpmx_status ddpmx_close(ddpmx_pipeline *pipeline) DDPMX_NOEXCEPT;

/* The description of a model. N = channels·height·width. */
typedef struct ddpmx_model {
  uint32_t struct_size;
  int32_t channels, height, width; /* of one image */
  int32_t timesteps;               /* T; the network is evaluated at t = 0…T−1 */
  int32_t classes;                 /* labels are 0…classes−1; 0 if the model takes no label */
  int32_t condition;               /* channels of a condition image; 0 if it takes none */
  int32_t self_condition;          /* 1 if the network takes x0 of the step before, which the chain passes */
  int32_t default_batch;           /* how many images run at once by default */
  char prediction[8];              /* "eps", "x0", "v" or "mu" */
  char variance[16];               /* "fixed_small", "fixed_large", "learned_range" or "learned" */
  char precision[8];               /* "fp32", "fp16", "bf16", "int8" or "fp8", inside the network; this API uses float */
  int32_t null_class;              /* 1 if the network knows "no class": labels may be NULL, and DDPMX_GUIDED is possible */
} ddpmx_model;

/* Set *model. size: sizeof(ddpmx_model) in the caller.
 * DDPMX_INPUT: NULL, or a size that no version of the struct has. */
DDPMX_API ddpmx_status ddpmx_describe(const ddpmx_pipeline *pipeline, ddpmx_model *model, size_t size) DDPMX_NOEXCEPT;

/* The name of a class, in UTF-8, or NULL: the model names none, or there is no such class. Valid as long as the pipeline. */
DDPMX_API const char *ddpmx_class_name(const ddpmx_pipeline *pipeline, int32_t label) DDPMX_NOEXCEPT;

/* The library, version and device that compute the network, for display. "" for NULL. Valid as long as the pipeline. */
DDPMX_API const char *ddpmx_backend(const ddpmx_pipeline *pipeline) DDPMX_NOEXCEPT;

/* ---- generating images ------------------------------------------------------------------------------------------- */

/* What is passed to a callback after every step. More images than one batch are generated batch by batch. Later versions
 * may append fields. */
typedef struct ddpmx_progress {
  uint32_t struct_size;
  int32_t t;      /* the timestep of this step; it falls */
  uint64_t done;  /* steps done, over all batches of the request */
  uint64_t total; /* steps of the request */
  uint64_t first; /* the position of the batch's first image in the result */
  uint64_t n;     /* images in this batch */
  const float *x; /* with previews: float [n, C, H, W], the network's input x_t; else NULL. Valid during the call */
  const float *x0; /* with previews: float [n, C, H, W], the predicted x0; in the last step the images. Else NULL */
} ddpmx_progress;

/* Return 0 to continue; anything else ends the chain, and the request with DDPMX_CANCELLED. It is called in the thread that
 * called ddpmx_generate, must not throw, and must not run a chain of the same pipeline unless that is an ONNX Runtime one.
 * On a GPU without previews some steps may be skipped. */
typedef int32_t (*ddpmx_callback)(const ddpmx_progress *progress, void *user);

/* ddpmx_request.flags */
#define DDPMX_PREVIEWS 1u  /* pass x and x0 to the callback. On a GPU the device then waits for the host in every step */
#define DDPMX_ON_DEVICE 2u /* x, cond and both results are addresses on the GPU that runs the plan */
#define DDPMX_GUIDED 4u    /* ddpmx_request.guidance is set */

typedef struct ddpmx_request {
  uint32_t struct_size;
  uint32_t flags;     /* DDPMX_PREVIEWS | DDPMX_ON_DEVICE | DDPMX_GUIDED, or 0 */
  uint64_t n;         /* number of images; default 1 */
  uint64_t seed;      /* default 0 */
  uint64_t first;     /* index of the first image: 8 images equal 4, and 4 more with first = 4; default 0 */
  uint64_t batch;     /* the most that run at once; 0: ddpmx_model.default_batch. A plan may take fewer */
  const char *sampler; /* "ancestral" (or NULL), "ddim", "dpmpp_2m", "unipc" */
  const char *spacing; /* which timesteps, if not all: "linspace" (or NULL), "leading", "trailing", "quad", "logsnr",
                          "karras" */
  const char *variance; /* "fixed_small", "fixed_large", "learned_range", "learned"; NULL: the file's */
  double eta;          /* of ddim: 0 (no noise in the steps) … 1; default 0 */
  int32_t steps;       /* how many of the T timesteps are visited; 0: all */
  int32_t start;       /* begin at this t, or at the nearest that is visited (the t of the first step in the callback): x
                          is x_t there, and the rest of the chain denoises it; -1: at the first one. With self_condition
                          the first step takes x0 = 0 */
  const float *x;      /* float [n, C, H, W], C-contiguous: the initial states; NULL: noise */
  const int32_t *labels; /* int32 [labels_count], on the host: the class of each image, for models that have classes */
  uint64_t labels_count; /* n, or 1: one for all */
  const float *cond;   /* float [n, K, H, W]: the condition of each image, for models that have one */
  void *stream;        /* of arrays on the device: the CUstream in which x and cond are written and the results were last
                          used; NULL: CUDA's default stream. The chain waits for its present work on the device. When
                          ddpmx_generate returns, everything is done */
  ddpmx_callback callback; /* or NULL */
  void *user;              /* passed to the callback */
  double guidance;         /* with DDPMX_GUIDED: w of classifier-free guidance, out_0 + w (out_y - out_0), for models with
                              null_class. 1: none; 0: the network without classes. The network's batch takes two rows for
                              each image */
} ddpmx_request;

/* Set the defaults: one image of seed 0. size: sizeof(ddpmx_request) in the caller.
 * DDPMX_INPUT: NULL, or a size that no version of the struct has. */
DDPMX_API ddpmx_status ddpmx_request_init(ddpmx_request *request, size_t size) DDPMX_NOEXCEPT;

/* The bytes of the images of a request: n·H·W·C. As float [n, C, H, W] they take four times as many.
 * DDPMX_INPUT: NULL, or more than 64 GiB. */
DDPMX_API ddpmx_status ddpmx_output_size(const ddpmx_pipeline *pipeline, const ddpmx_request *request,
                                         uint64_t *bytes) DDPMX_NOEXCEPT;

/* Run the chain. Image i of a seed does not depend on the other images of the request.
 *
 * images:  uint8 [n, H, W, C], or NULL; images_size: its bytes, at least ddpmx_output_size.
 * samples: float [n, C, H, W] in [−1, 1], the same images before rounding, or NULL; samples_size: its bytes, at least four
 *          times as many. One of the two is required. They must not overlap x, cond or each other.
 *
 * Threads: a pipeline of ONNX Runtime runs the chains of all callers at once; a pipeline of a plan runs one at a time, and
 * other callers wait.
 * The computation uses default rounding and subnormal numbers, whatever the calling thread has set. If that thread is
 * cancelled, or ended by the callback, the chain ends with it and nothing is leaked.
 * Errors: DDPMX_INPUT (nothing was written), DDPMX_CANCELLED, DDPMX_NUMERIC, DDPMX_BACKEND, DDPMX_MEMORY; after the others
 * the content of the buffers is undefined. */
DDPMX_API ddpmx_status ddpmx_generate(ddpmx_pipeline *pipeline, const ddpmx_request *request, uint8_t *images,
                                      uint64_t images_size, float *samples, uint64_t samples_size);

#ifdef __cplusplus
}
#endif
#endif
