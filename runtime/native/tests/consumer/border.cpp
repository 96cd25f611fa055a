// A second translation unit with ddpmx.hpp, which has to link.
#include "border.hpp"

#include <ddpmx/ddpmx.hpp>

Border border{};

int channels_of(const ddpmx::Pipeline &pipeline) { return pipeline.model().channels; }

extern "C" {

ddpmx_status __real_ddpmx_open(const char *path, const ddpmx_open_options *options, ddpmx_pipeline **pipeline);
ddpmx_status __wrap_ddpmx_open(const char *path, const ddpmx_open_options *options, ddpmx_pipeline **pipeline) {
  border.options = *options;
  return __real_ddpmx_open(path, options, pipeline);
}

ddpmx_status __real_ddpmx_generate(ddpmx_pipeline *pipeline, const ddpmx_request *request, uint8_t *images,
                                   uint64_t images_size, float *samples, uint64_t samples_size);
ddpmx_status __wrap_ddpmx_generate(ddpmx_pipeline *pipeline, const ddpmx_request *request, uint8_t *images,
                                   uint64_t images_size, float *samples, uint64_t samples_size) {
  border.request = *request;
  return __real_ddpmx_generate(pipeline, request, images, images_size, samples, samples_size);
}

ddpmx_status __real_ddpmx_close(ddpmx_pipeline *pipeline);
ddpmx_status __wrap_ddpmx_close(ddpmx_pipeline *pipeline) {
  const ddpmx_status status = __real_ddpmx_close(pipeline);
  ++(status == DDPMX_OK ? border.closed : border.not_closed);
  return status;
}

uint32_t __real_ddpmx_abi_version();
uint32_t __wrap_ddpmx_abi_version() { return border.abi ? border.abi : __real_ddpmx_abi_version(); }

ddpmx_status __real_ddpmx_describe(const ddpmx_pipeline *pipeline, ddpmx_model *model, size_t size);
ddpmx_status __wrap_ddpmx_describe(const ddpmx_pipeline *pipeline, ddpmx_model *model, size_t size) {
  const ddpmx_status status = __real_ddpmx_describe(pipeline, model, size);
  if (border.condition) model->condition = border.condition;
  return status;
}
}
