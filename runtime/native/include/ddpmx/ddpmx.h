/* libddpmx: the whole reverse chain of a diffusion model behind a C ABI.
 *
 * Open a model file that `ddpmx export` or `ddpmx build` wrote, ask for images, get bytes. No Python, no torch; ONNX
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
 * The same file, seed and request give the bytes that Python's ddpmx.load(...).generate(...) gives with the same
 * ONNX Runtime on the same CPU.
 *
 * Rules that hold everywhere:
 * - Every function that can fail returns a ddpmx_status; 0 is success. What went wrong is text in ddpmx_last_error().
 * - Nothing is thrown, printed or aborted across this border, and the library never ends the process.
 * - Memory for results is the caller's. What the library allocates goes with ddpmx_close.
 * - A struct begins with its size, so that later versions can append fields. What a program hands over is filled in by an
 *   _init function first: everything that is not set afterwards has its usual value.
 * - Text is UTF-8 and ends with a zero byte; paths are in the encoding of the file system. What is given is copied before
 *   a call returns.
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

/* What ddpmx_abi_version() has to answer for a program that was compiled with this header. */
#define DDPMX_ABI_VERSION 1u

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/* The kinds of errors that Python's ddpmx.errors has, and three of C's own. Numbers never change; new ones may come. */
typedef int32_t ddpmx_status;
enum {
  DDPMX_OK = 0,
  DDPMX_INPUT = 1,         /* a value, pointer or struct_size that cannot be used; InputError */
  DDPMX_FILE_FORMAT = 2,   /* missing, cut off, or not what its name says; FileFormatError */
  DDPMX_SPEC = 3,          /* what the file says about itself is missing or contradicts itself; SpecError */
  DDPMX_BACKEND = 4,       /* the library that computes the network is missing, or refuses; BackendError */
  DDPMX_PLAN_MISMATCH = 5, /* a plan of another platform, TensorRT or GPU: build it anew; PlanMismatchError */
  DDPMX_NUMERIC = 6,       /* the network answered NaN or an infinity; NumericError */
  DDPMX_CANCELLED = 7,     /* the callback asked for it; Cancelled */
  DDPMX_MEMORY = 8,        /* the host's memory does not suffice */
  DDPMX_BUSY = 9,          /* the pipeline is at work, and cannot be closed */
  DDPMX_INTERNAL = 10      /* a fault of this library: please report it */
};

/* "DDPMX_INPUT" and so on; "DDPMX_?" for a number that is none. Never NULL. */
DDPMX_API const char *ddpmx_status_name(ddpmx_status status) DDPMX_NOEXCEPT;

/* What this thread's last failing call said: a fact, and after line breaks "Note: …" and "Hint: …" where there is more to
 * say. Never NULL, empty before the first error. It stays until the next failing call of the same thread. */
DDPMX_API const char *ddpmx_last_error(void) DDPMX_NOEXCEPT;

/* DDPMX_ABI_VERSION of the library that was loaded. Another number: do not call anything else. */
DDPMX_API uint32_t ddpmx_abi_version(void) DDPMX_NOEXCEPT;

/* "0.1.0", of the library that was loaded. */
DDPMX_API const char *ddpmx_version(void) DDPMX_NOEXCEPT;

/* ---- opening a model --------------------------------------------------------------------------------------------- */

typedef struct ddpmx_pipeline ddpmx_pipeline;

/* ddpmx_open_options.flags */
#define DDPMX_TRUST_HOST_CODE 1u /* a plan may hold code for the CPU, which loading it runs */

typedef struct ddpmx_open_options {
  uint32_t struct_size;
  uint32_t flags;              /* DDPMX_TRUST_HOST_CODE, or 0 */
  int32_t threads;             /* CPU threads of ONNX Runtime, 0…256; 0: its own choice */
  int32_t device;              /* which GPU runs a plan, in CUDA's order, from 0 */
  const char *spec;            /* JSON of a ModelSpec, for an ONNX file that does not describe itself; or NULL */
  const char *ort_library;     /* ONNX Runtime's libonnxruntime.so; NULL: $DDPMX_ORT_LIBRARY, or the system's */
  const char *trt_module;      /* libddpmx_trt.so; NULL: $DDPMX_TRT_MODULE, or the one beside this library */
  const char *trt_library;     /* TensorRT's own library; NULL: $DDPMX_TRT_LIBRARY, or the system's */
  const char *executor;        /* of a plan: "auto" (or NULL), "graph" or "plain" */
  const char *cache;           /* a folder where TensorRT-RTX keeps what it compiles for the GPU, or NULL */
} ddpmx_open_options;

/* Fill in the usual values. size: sizeof(ddpmx_open_options) where the caller was compiled.
 * DDPMX_INPUT: NULL, or a size that no version of the struct has. */
DDPMX_API ddpmx_status ddpmx_open_options_init(ddpmx_open_options *options, size_t size) DDPMX_NOEXCEPT;

/* Open a model.onnx, or a model.plan that was built where it is to run. *pipeline is NULL after a failure.
 *
 * options: NULL for the usual ones.
 * Errors: DDPMX_FILE_FORMAT, DDPMX_SPEC, DDPMX_BACKEND, DDPMX_PLAN_MISMATCH, DDPMX_INPUT, DDPMX_MEMORY. */
DDPMX_API ddpmx_status ddpmx_open(const char *path, const ddpmx_open_options *options,
                                  ddpmx_pipeline **pipeline) DDPMX_NOEXCEPT;

/* Free everything. NULL is harmless. DDPMX_BUSY, and nothing is freed: another thread, or the caller's own callback, is
 * in the middle of a chain. After DDPMX_OK the pipeline must not be used, nor may a call with it begin while this one is
 * under way. */
DDPMX_API ddpmx_status ddpmx_close(ddpmx_pipeline *pipeline) DDPMX_NOEXCEPT;

/* What the file says about itself. N = channels·height·width. */
typedef struct ddpmx_model {
  uint32_t struct_size;
  int32_t channels, height, width; /* of one image */
  int32_t timesteps;               /* T; the network is asked at t = 0…T−1 */
  int32_t classes;                 /* labels are 0…classes−1; 0 if the model knows no classes */
  int32_t condition;               /* channels of a condition image; 0 if it takes none */
  int32_t self_condition;          /* 1 if the network is told its last x0; the chain sees to it */
  int32_t default_batch;           /* how many images run at once if a request says nothing */
  char prediction[8];              /* "eps", "x0" or "v" */
  char variance[16];               /* "fixed_small", "fixed_large" or "learned_range" */
  char precision[8];               /* "fp32", "fp16" or "bf16": inside the network; here everything is float */
} ddpmx_model;

/* Fill in *model. size: sizeof(ddpmx_model) where the caller was compiled.
 * DDPMX_INPUT: NULL, or a size that no version of the struct has. */
DDPMX_API ddpmx_status ddpmx_describe(const ddpmx_pipeline *pipeline, ddpmx_model *model, size_t size) DDPMX_NOEXCEPT;

/* What really computes the network, for people: library, version and device. "" for NULL. It lives as long as the
 * pipeline. */
DDPMX_API const char *ddpmx_backend(const ddpmx_pipeline *pipeline) DDPMX_NOEXCEPT;

/* ---- drawing images ---------------------------------------------------------------------------------------------- */

/* What a callback is told after every step. More images than one batch are drawn batch by batch. Later versions may append
 * fields. */
typedef struct ddpmx_progress {
  uint32_t struct_size;
  int32_t t;      /* the timestep that was done; it falls */
  uint64_t done;  /* steps done, over all batches of the request */
  uint64_t total; /* and to be done */
  uint64_t first; /* the position in the result of the batch's first image */
  uint64_t n;     /* images in this batch */
  const float *x; /* with previews: float [n, C, H, W], x_t as the network saw it; else NULL. Gone after the call */
  const float *x0; /* with previews: float [n, C, H, W], where it leads; in the last step the images. Else NULL */
} ddpmx_progress;

/* 0 to go on; anything else ends the chain, and the request with DDPMX_CANCELLED. It is called in the thread that called
 * ddpmx_generate, must not throw, and must not use the pipeline for a chain of its own unless it is of ONNX Runtime. On a
 * GPU without previews some steps may be left out. */
typedef int32_t (*ddpmx_callback)(const ddpmx_progress *progress, void *user);

/* ddpmx_request.flags */
#define DDPMX_PREVIEWS 1u  /* tell the callback x and x0. On a GPU the device then waits for the host in every step */
#define DDPMX_ON_DEVICE 2u /* x, cond and both results are addresses on the GPU that runs the plan */

typedef struct ddpmx_request {
  uint32_t struct_size;
  uint32_t flags;     /* DDPMX_PREVIEWS, DDPMX_ON_DEVICE, or 0 */
  uint64_t n;         /* images; 1 */
  uint64_t seed;      /* 0 */
  uint64_t first;     /* the index of the first image: 8 images equal 4, and 4 more with first = 4; 0 */
  uint64_t batch;     /* how many run at once, at most; 0: ddpmx_model.default_batch. A plan may take fewer */
  const char *sampler; /* "ancestral" (or NULL), "ddim" */
  const char *spacing; /* which timesteps, if not all: "linspace" (or NULL), "leading", "trailing", "quad" */
  const char *variance; /* "fixed_small", "fixed_large", "learned_range"; NULL: the file's */
  double eta;          /* of ddim: 0 (no noise on the way) … 1; 0 */
  int32_t steps;       /* how many of the T timesteps are visited; 0: all */
  int32_t start;       /* begin at this t, which has to be one that is visited: x is x_t there, and the rest of the chain
                          a denoiser; -1: at the first one. A network with self_condition is told no x0 at its first step */
  const float *x;      /* float [n, C, H, W], C-contiguous: the states to begin with; NULL: noise */
  const int32_t *labels; /* int32 [labels_count], on the host: the class of each image, for models that have classes */
  uint64_t labels_count; /* n, or 1: one for all */
  const float *cond;   /* float [n, K, H, W]: the condition of each image, for models that have one */
  void *stream;        /* a CUstream in which x and cond are being written and the results were last used, or NULL. What
                          is in it by now is waited for on the device. When ddpmx_generate returns, everything is done */
  ddpmx_callback callback; /* or NULL */
  void *user;              /* for the callback */
} ddpmx_request;

/* Fill in the usual values: one image of seed 0. size: sizeof(ddpmx_request) where the caller was compiled.
 * DDPMX_INPUT: NULL, or a size that no version of the struct has. */
DDPMX_API ddpmx_status ddpmx_request_init(ddpmx_request *request, size_t size) DDPMX_NOEXCEPT;

/* Bytes that the images of a request take: n·H·W·C. As float [n, C, H, W] they take four times that.
 * DDPMX_INPUT: NULL, or more than 64 GiB. */
DDPMX_API ddpmx_status ddpmx_output_size(const ddpmx_pipeline *pipeline, const ddpmx_request *request,
                                         uint64_t *bytes) DDPMX_NOEXCEPT;

/* Run the chain. Image i of a seed is the same whatever else is drawn with it.
 *
 * images:  uint8 [n, H, W, C], or NULL; images_size: bytes there, at least ddpmx_output_size.
 * samples: float [n, C, H, W] in [−1, 1], the same images before they were rounded, or NULL; samples_size: bytes there, at
 *          least four times as many. One of the two is needed. They must not overlap x, cond or each other.
 *
 * From several threads: one pipeline of ONNX Runtime runs as many chains at once as there are callers; one of a plan runs
 * one, and the others wait.
 * It is computed with the usual rounding and subnormal numbers, whatever the calling thread has set for itself. Where that
 * thread is cancelled, or ended by the callback, the chain ends with it and nothing is leaked.
 * Errors: DDPMX_INPUT (nothing was written), DDPMX_CANCELLED, DDPMX_NUMERIC, DDPMX_BACKEND, DDPMX_MEMORY; what the buffers
 * hold is undefined after these. */
DDPMX_API ddpmx_status ddpmx_generate(ddpmx_pipeline *pipeline, const ddpmx_request *request, uint8_t *images,
                                      uint64_t images_size, float *samples, uint64_t samples_size);

#ifdef __cplusplus
}
#endif
#endif
