// Out of memory, everywhere: one allocation after the other fails, and each time the status is DDPMX_MEMORY, nothing leaks
// (the sanitizers check that), and the next call works.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "ddpmx/ddpmx.h"

namespace {

// The allocation, from 1, that fails; 0 for none. Counted down.
long left = 0;
bool fails() { return left > 0 && --left == 0; }

void *take(size_t size, size_t alignment) {
  if (fails()) throw std::bad_alloc();
  void *memory = alignment ? std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment)
                           : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

// The library has none of its own, so it uses these.
void *operator new(size_t size) { return take(size, 0); }
void *operator new[](size_t size) { return take(size, 0); }
void *operator new(size_t size, std::align_val_t alignment) { return take(size, static_cast<size_t>(alignment)); }
void *operator new(size_t size, const std::nothrow_t &) noexcept { return fails() ? nullptr : std::malloc(size ? size : 1); }
void operator delete(void *memory) noexcept { std::free(memory); }
void operator delete[](void *memory) noexcept { std::free(memory); }
void operator delete(void *memory, size_t) noexcept { std::free(memory); }
void operator delete[](void *memory, size_t) noexcept { std::free(memory); }
void operator delete(void *memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void *memory, size_t, std::align_val_t) noexcept { std::free(memory); }

int main() {
  long failed = 0, faults = 0;
  ddpmx_open_options options;
  ddpmx_open_options_init(&options, sizeof options);
  options.ort_library = FAKE_ORT;
  ddpmx_request request;
  ddpmx_request_init(&request, sizeof request);
  request.n = 3, request.steps = 4, request.batch = 2;
  static uint8_t images[3 * 192], wanted[3 * 192];
  static float samples[3 * 192];
  bool finished = false;
  for (long which = 1; !finished && which < 100000; ++which) {
    ddpmx_pipeline *pipeline = nullptr;
    left = which;
    ddpmx_status status = ddpmx_open(GAUSSIAN, &options, &pipeline);
    if (status == DDPMX_OK) status = ddpmx_generate(pipeline, &request, images, sizeof images, samples, sizeof samples);
    finished = left > 0;
    left = 0;
    if (finished) {
      std::memcpy(wanted, images, sizeof wanted);
      faults += status != DDPMX_OK;
    } else {
      ++failed;
      if (status != DDPMX_MEMORY || !std::strstr(ddpmx_last_error(), "memory")) {
        std::fprintf(stderr, "allocation %ld: %s: %s\n", which, ddpmx_status_name(status), ddpmx_last_error());
        ++faults;
      }
    }
    if (pipeline) {  // it still works
      faults += ddpmx_generate(pipeline, &request, images, sizeof images, nullptr, 0) != DDPMX_OK;
      if (finished) faults += std::memcmp(wanted, images, sizeof wanted) != 0;
    }
    faults += ddpmx_close(pipeline) != DDPMX_OK;
  }
  void *fake = dlopen(FAKE_ORT, RTLD_NOW | RTLD_NOLOAD);
  const auto live = fake ? reinterpret_cast<int (*)()>(dlsym(fake, "fake_ort_live")) : nullptr;
  if (!live || live() != 0) ++faults;
  std::printf("%ld allocations failed, %ld faults\n", failed, faults);
  return faults || failed < 100 || !finished;
}
