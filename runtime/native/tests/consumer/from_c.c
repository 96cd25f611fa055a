/* from_c MODEL FILE: two images of seed 7 in 20 steps, as bytes. */
#include <ddpmx/ddpmx.h>
#include <stdio.h>
#include <stdlib.h>

static int32_t count(const ddpmx_progress *progress, void *user) {
  *(uint64_t *)user = progress->done;
  return 0;
}

int main(int argc, char **argv) {
  ddpmx_pipeline *pipeline = NULL;
  ddpmx_request request;
  uint64_t size = 0, done = 0;
  int code = 1;
  if (argc != 3) return 64;
  if (ddpmx_abi_version() != DDPMX_ABI_VERSION) return 65;
  if (ddpmx_open(argv[1], NULL, &pipeline) || ddpmx_request_init(&request, sizeof request)) goto failed;
  request.n = 2;
  request.seed = 7;
  request.steps = 20;
  request.callback = count;
  request.user = &done;
  if (ddpmx_output_size(pipeline, &request, &size)) goto failed;
  uint8_t *images = malloc((size_t)size);
  FILE *file = images ? fopen(argv[2], "wb") : NULL;
  if (file && !ddpmx_generate(pipeline, &request, images, size, NULL, 0) && done == 20 &&
      fwrite(images, 1, (size_t)size, file) == size)
    code = 0;
  if (file && fclose(file)) code = 1;
  free(images);
failed:
  if (code) fprintf(stderr, "%s\n", ddpmx_last_error());
  ddpmx_close(pipeline);
  return code;
}
