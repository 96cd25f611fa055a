/* draw MODEL FILE [N [SEED [STEPS]]]: N images, one below the other, as a PPM (RGB) or PGM (grey) file. */
#include <ddpmx/ddpmx.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#ifdef _WIN32
#include <io.h>
#define isatty _isatty
#else
#include <unistd.h>
#endif

static int terminal; /* is standard error one? only there can a line be written over */

static int32_t show(const ddpmx_progress *now, void *user) {
  time_t *said = user;
  if (!terminal && time(NULL) < *said + 30) return 0; /* into a file goes a line every half minute */
  *said = time(NULL);
  fprintf(stderr, terminal ? "\r%llu of %llu steps" : "%llu of %llu steps\n", (unsigned long long)now->done,
          (unsigned long long)now->total);
  return 0; /* anything else cancels */
}

static int fail(const char *what) {
  fprintf(stderr, "%s%s\n", terminal ? "\n" : "", what);
  return 2;
}

int main(int argc, char **argv) {
  ddpmx_pipeline *pipeline = NULL;
  ddpmx_request request;
  ddpmx_model model;
  uint64_t size = 0;
  terminal = isatty(2);
  if (argc < 3 || argc > 6) return fail("usage: draw MODEL FILE [N [SEED [STEPS]]]");
  if (ddpmx_abi_version() != DDPMX_ABI_VERSION) return fail("libddpmx and its header have different versions");
  if (ddpmx_request_init(&request, sizeof request) || ddpmx_open(argv[1], NULL, &pipeline) ||
      ddpmx_describe(pipeline, &model, sizeof model))
    return fail(ddpmx_last_error());
  time_t said = time(NULL);
  request.callback = show, request.user = &said;
  if (argc > 3) request.n = strtoull(argv[3], NULL, 10);
  if (argc > 4) request.seed = strtoull(argv[4], NULL, 10);
  if (argc > 5) request.steps = (int32_t)strtol(argv[5], NULL, 10);

  if (model.channels != 1 && model.channels != 3) return fail("PPM needs one channel or three");
  if (ddpmx_output_size(pipeline, &request, &size)) return fail(ddpmx_last_error());
  uint8_t *images = malloc((size_t)size);
  if (!images) return fail("out of memory");
  if (ddpmx_generate(pipeline, &request, images, size, NULL, 0)) return fail(ddpmx_last_error());
  if (terminal) fprintf(stderr, "\n");

  FILE *file = fopen(argv[2], "wb");
  if (!file) return fail("cannot write the file");
  fprintf(file, "P%d %d %llu 255\n", model.channels == 3 ? 6 : 5, model.width,
          (unsigned long long)request.n * (unsigned)model.height);
  int written = fwrite(images, 1, (size_t)size, file) == size;
  if (fclose(file) || !written) return fail("cannot write the file");
  free(images);
  ddpmx_close(pipeline);
  return 0;
}
