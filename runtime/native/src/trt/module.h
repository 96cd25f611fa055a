/* The interface of libddpmx_trt.so: TensorRT behind C functions, since its own interface is C++ of one major version.
 *
 * It is internal: both sides are built from the same sources, which ddpmx_trt_get checks. The module opens TensorRT's
 * library itself and is not linked against it. It never calls the CUDA driver or runtime: streams and addresses are
 * passed through, and the caller has started the driver (TensorRT crashes without one) and made the GPU's context
 * current.
 *
 * Nothing is thrown. Functions that can fail return 0 for success; otherwise they write TensorRT's own message to
 * `error`, truncated to error_size, perhaps empty.
 */
#ifndef DDPMX_TRT_MODULE_H
#define DDPMX_TRT_MODULE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DDPMX_TRT_ABI 1u
#define DDPMX_TRT_MAX_RANK 8

/* ddpmx_trt_tensor.type */
enum { DDPMX_TRT_FLOAT = 0, DDPMX_TRT_INT32 = 1, DDPMX_TRT_OTHER = 2 };

typedef struct ddpmx_trt_library ddpmx_trt_library; /* TensorRT's library; stays in the process */
typedef struct ddpmx_trt_engine ddpmx_trt_engine;   /* a plan's weights on the GPU */
typedef struct ddpmx_trt_context ddpmx_trt_context; /* runs it for one batch, in one stream at a time */

typedef struct ddpmx_trt_tensor {
  const char *name; /* lives as long as the engine */
  int32_t is_input;
  int32_t type;
  int32_t on_device;
  int32_t rank;
  int64_t dims[DDPMX_TRT_MAX_RANK]; /* -1 where it is dynamic */
} ddpmx_trt_tensor;

typedef struct ddpmx_trt_module {
  uint32_t abi;         /* DDPMX_TRT_ABI */
  uint32_t size;        /* of this struct */
  const char *flavour;  /* "TensorRT" or "TensorRT-RTX" */
  const char *compiled; /* the version of the headers, "10.3.0.26" */
  const char *library;  /* the name by which its library is opened by default, "libnvinfer.so.10" */

  /* Open TensorRT's library: by path, or NULL. version: at least 32 bytes for "10.3.0.26". No GPU is needed. */
  int32_t (*open_library)(const char *path, ddpmx_trt_library **library, char *version, char *error, size_t error_size);

  /* Deserialise a plan; its bytes are not needed afterwards. cache: cache_size bytes from save_cache for this plan, or
   * NULL; keep_cache: whether save_cache will be called. Only TensorRT-RTX uses these. */
  int32_t (*open_engine)(ddpmx_trt_library *library, const void *plan, size_t plan_size, int32_t trust_host_code,
                         const void *cache, size_t cache_size, int32_t keep_cache, ddpmx_trt_engine **engine,
                         char *error, size_t error_size);
  /* Close its contexts first. NULL is allowed. */
  void (*close_engine)(ddpmx_trt_engine *engine);

  const char *(*name)(const ddpmx_trt_engine *engine); /* of the network; lives as long as the engine */
  int32_t (*tensors)(const ddpmx_trt_engine *engine);  /* how many inputs and outputs there are */
  int32_t (*tensor)(const ddpmx_trt_engine *engine, int32_t index, ddpmx_trt_tensor *tensor);
  int32_t (*profiles)(const ddpmx_trt_engine *engine);
  /* The smallest and the largest first dimension of an input in a profile. */
  int32_t (*batches)(const ddpmx_trt_engine *engine, int32_t profile, const char *input, int64_t *low, int64_t *high);
  /* Passes what has been compiled for this GPU to take(data, size, user), which may not be called at all. */
  void (*save_cache)(const ddpmx_trt_engine *engine, void (*take)(const void *data, size_t size, void *user),
                     void *user);

  /* The work that prepares the profile is put into the stream: wait for it before bind. */
  int32_t (*open_context)(ddpmx_trt_engine *engine, int32_t profile, void *stream, ddpmx_trt_context **context,
                          char *error, size_t error_size);
  /* Wait for what it has enqueued first. NULL is allowed. */
  void (*close_context)(ddpmx_trt_context *context);
  /* Set the device address of an input of this shape, or, with rank 0, of an output. */
  int32_t (*bind)(ddpmx_trt_context *context, const char *tensor, const int64_t *dims, int32_t rank, uint64_t address,
                  char *error, size_t error_size);
  /* Check that every shape is known now. */
  int32_t (*check)(ddpmx_trt_context *context, char *error, size_t error_size);
  /* Put the network into a stream. Waits for nothing. */
  int32_t (*enqueue)(ddpmx_trt_context *context, void *stream, char *error, size_t error_size);
} ddpmx_trt_module;

/* The function that a module exports. It returns NULL for an unknown ABI. */
#define DDPMX_TRT_GET "ddpmx_trt_get"
typedef const ddpmx_trt_module *(*ddpmx_trt_get_function)(uint32_t abi);

#ifdef __cplusplus
}
#endif
#endif
