/* The header in C99: the layouts that bindings in other languages rely on, and every function with NULL. */
#include <stdio.h>
#include <string.h>

#include "ddpmx/ddpmx.h"

static int failures;

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) {                                                \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);  \
      ++failures;                                                      \
    }                                                                  \
  } while (0)
#define AT(type, field, offset) CHECK(offsetof(type, field) == (offset))

/* On 64-bit machines, which ddpmx is for. A change here breaks all bindings: append fields instead. */
static void layouts(void) {
  CHECK(sizeof(ddpmx_open_options) == 64);
  AT(ddpmx_open_options, flags, 4);
  AT(ddpmx_open_options, threads, 8);
  AT(ddpmx_open_options, device, 12);
  AT(ddpmx_open_options, spec, 16);
  AT(ddpmx_open_options, ort_library, 24);
  AT(ddpmx_open_options, trt_module, 32);
  AT(ddpmx_open_options, trt_library, 40);
  AT(ddpmx_open_options, executor, 48);
  AT(ddpmx_open_options, cache, 56);
  CHECK(sizeof(ddpmx_model) == 72);
  AT(ddpmx_model, channels, 4);
  AT(ddpmx_model, timesteps, 16);
  AT(ddpmx_model, classes, 20);
  AT(ddpmx_model, condition, 24);
  AT(ddpmx_model, self_condition, 28);
  AT(ddpmx_model, default_batch, 32);
  AT(ddpmx_model, prediction, 36);
  AT(ddpmx_model, variance, 44);
  AT(ddpmx_model, precision, 60);
  AT(ddpmx_model, null_class, 68);
  CHECK(sizeof(ddpmx_progress) == 56);
  AT(ddpmx_progress, t, 4);
  AT(ddpmx_progress, done, 8);
  AT(ddpmx_progress, total, 16);
  AT(ddpmx_progress, first, 24);
  AT(ddpmx_progress, n, 32);
  AT(ddpmx_progress, x, 40);
  AT(ddpmx_progress, x0, 48);
  CHECK(sizeof(ddpmx_request) == 144);
  AT(ddpmx_request, flags, 4);
  AT(ddpmx_request, n, 8);
  AT(ddpmx_request, seed, 16);
  AT(ddpmx_request, first, 24);
  AT(ddpmx_request, batch, 32);
  AT(ddpmx_request, sampler, 40);
  AT(ddpmx_request, spacing, 48);
  AT(ddpmx_request, variance, 56);
  AT(ddpmx_request, eta, 64);
  AT(ddpmx_request, steps, 72);
  AT(ddpmx_request, start, 76);
  AT(ddpmx_request, x, 80);
  AT(ddpmx_request, labels, 88);
  AT(ddpmx_request, labels_count, 96);
  AT(ddpmx_request, cond, 104);
  AT(ddpmx_request, stream, 112);
  AT(ddpmx_request, callback, 120);
  AT(ddpmx_request, user, 128);
  AT(ddpmx_request, guidance, 136);
}

static void null_arguments(void) {
  ddpmx_pipeline *pipeline = (ddpmx_pipeline *)&failures;
  ddpmx_request request;
  ddpmx_open_options options;
  ddpmx_model model;
  uint64_t bytes;
  CHECK(ddpmx_last_error()[0] == 0);
  CHECK(ddpmx_abi_version() == DDPMX_ABI_VERSION);
  CHECK(strchr(ddpmx_version(), '.') != NULL);
  CHECK(ddpmx_request_init(NULL, sizeof request) == DDPMX_INPUT);
  CHECK(strstr(ddpmx_last_error(), "ddpmx_request is NULL") != NULL);
  CHECK(ddpmx_open_options_init(NULL, sizeof options) == DDPMX_INPUT);
  CHECK(ddpmx_request_init(&request, sizeof request - 1) == DDPMX_INPUT);
  CHECK(ddpmx_request_init(&request, 5000) == DDPMX_INPUT);
  CHECK(ddpmx_request_init(&request, 136) == DDPMX_OK && request.struct_size == 136); /* as it was before guidance */
  CHECK(ddpmx_request_init(&request, sizeof request) == DDPMX_OK);
  CHECK(request.struct_size == sizeof request && request.n == 1 && request.start == -1 && request.seed == 0);
  CHECK(ddpmx_open_options_init(&options, sizeof options) == DDPMX_OK && options.struct_size == sizeof options);
  CHECK(ddpmx_open(NULL, NULL, &pipeline) == DDPMX_INPUT && pipeline == NULL);
  CHECK(ddpmx_open("model.onnx", NULL, NULL) == DDPMX_INPUT);
  CHECK(ddpmx_close(NULL) == DDPMX_OK);
  CHECK(ddpmx_describe(NULL, &model, sizeof model) == DDPMX_INPUT);
  CHECK(ddpmx_output_size(NULL, &request, &bytes) == DDPMX_INPUT);
  CHECK(ddpmx_generate(NULL, &request, NULL, 0, NULL, 0) == DDPMX_INPUT);
  CHECK(ddpmx_backend(NULL)[0] == 0);
  CHECK(ddpmx_class_name(NULL, 0) == NULL);
  CHECK(strcmp(ddpmx_status_name(DDPMX_CANCELLED), "DDPMX_CANCELLED") == 0);
  CHECK(strcmp(ddpmx_status_name(99), "DDPMX_?") == 0);
}

int main(void) {
  if (sizeof(void *) == 8) {
    layouts();
  } else {
    printf("NOT VERIFIED: the layouts, which are those of 64-bit machines\n");
  }
  null_arguments();
  return failures != 0;
}
