// What goes over the border to C: the linker sends some functions of libddpmx to border.cpp first (--wrap).
#pragma once

#include <ddpmx/ddpmx.h>

struct Border {
  ddpmx_open_options options; // of the last ddpmx_open
  ddpmx_request request;      // of the last ddpmx_generate
  int closed, not_closed;     // calls of ddpmx_close
  uint32_t abi;               // what ddpmx_abi_version answers; 0: the truth
  int32_t condition;          // what ddpmx_describe says of it; 0: the truth
};
extern Border border;
