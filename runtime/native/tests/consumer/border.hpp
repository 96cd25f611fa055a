// Records calls to the C API: the linker redirects some functions of libddpmx to border.cpp (--wrap).
#pragma once

#include <ddpmx/ddpmx.h>

struct Border {
  ddpmx_open_options options; // of the last ddpmx_open
  ddpmx_request request;      // of the last ddpmx_generate
  int closed, not_closed;     // calls of ddpmx_close
  uint32_t abi;               // the result of ddpmx_abi_version; 0: the real one
  int32_t condition;          // ddpmx_model.condition from ddpmx_describe; 0: the real one
};
extern Border border;
