/* A real ONNX Runtime, where there is one, on a tiny model whose distribution is known. Every pixel of the model in GAUSSIAN
 * is N(mu, 0.1^2) with mu from -0.5 to 0.5 over the image, and its network is the exact optimum. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ddpmx/ddpmx.h"

enum { kImages = 32, kElements = 3 * 8 * 8, kNothingVerified = 77 };

int main(void) {
  static float samples[kImages * kElements];
  ddpmx_pipeline *pipeline = NULL;
  ddpmx_request request;
  if (ddpmx_request_init(&request, sizeof request)) return 1;
  request.n = kImages;
  const ddpmx_status opened = ddpmx_open(GAUSSIAN, NULL, &pipeline);
  if (opened == DDPMX_BACKEND && strstr(ddpmx_last_error(), "there is no ONNX Runtime here")) {
    printf("not verified here: chains with a real ONNX Runtime (name one in $DDPMX_ORT_LIBRARY)\n");
    return kNothingVerified;
  }
  if (opened || ddpmx_generate(pipeline, &request, NULL, 0, samples, sizeof samples)) {
    fprintf(stderr, "%s\n", ddpmx_last_error());
    return 1;
  }
  double sum = 0, squares = 0;
  for (int image = 0; image < kImages; ++image) {
    for (int k = 0; k < kElements; ++k) {
      const double mu = -0.5 + k / (kElements - 1.0), z = (samples[image * kElements + k] - mu) / 0.1;
      sum += z;
      squares += z * z;
    }
  }
  const double n = kImages * kElements, mean = sum / n, deviation = sqrt(squares / n - mean * mean);
  /* 1/sqrt(n) = 0.013 and 1/sqrt(2 n) = 0.009 are one standard deviation of the measured values */
  printf("%s: mean %.4f, standard deviation %.4f\n", ddpmx_backend(pipeline), mean, deviation);
  const int holds = fabs(mean) < 0.06 && fabs(deviation - 1) < 0.05;
  return ddpmx_close(pipeline) || !holds;
}
