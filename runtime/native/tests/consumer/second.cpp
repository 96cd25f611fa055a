// A second translation unit with the same header, which has to link.
#include <ddpmx/ddpmx.hpp>

int channels_of(const ddpmx::Pipeline &pipeline) { return pipeline.model().channels; }
