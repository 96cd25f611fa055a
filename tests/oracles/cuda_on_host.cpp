// step.cu, each.cu and while.cu as a library for ctypes. Each function returns whether the launch was legal.
#include "cuda_on_host.h"

#include "each.cu"
#include "step.cu"
#include "while.cu"

static ddpmx_chain *argument;
static ddpmx_call *call;
static unsigned long long handle;
static long long condition;

extern "C" {

void cudaGraphSetConditional(unsigned long long which, unsigned value) { condition = which == handle ? value : -1; }

bool begin(ddpmx_chain *chain, unsigned grid, unsigned block, unsigned order) {
  argument = chain;
  return host::launch([] { ddpmx_begin(argument); }, grid, block, order);
}

bool step(ddpmx_chain *chain, unsigned grid, unsigned block, unsigned order) {
  argument = chain;
  return host::launch([] { ddpmx_step(argument); }, grid, block, order);
}

bool begin_each(ddpmx_call *what, unsigned grid, unsigned block, unsigned order) {
  call = what;
  return host::launch([] { ddpmx_begin_each(call); }, grid, block, order);
}

bool step_each(ddpmx_call *what, unsigned grid, unsigned block, unsigned order) {
  call = what;
  return host::launch([] { ddpmx_step_each(call); }, grid, block, order);
}

// The value that ddpmx_condition sets for the node, or -1.
long long go_on(ddpmx_chain *chain, unsigned long long node) {
  argument = chain, handle = node, condition = -1;
  return host::launch([] { ddpmx_condition(argument, handle); }, 1, 1, 0) ? condition : -1;
}

bool has_fma() {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return true;
#else
  return false;
#endif
}
}
