// As much of CUDA as step.cu, each.cu and while.cu need, for a C++ compiler, so that kernels run where there is no GPU.
//
// Every thread of a grid is a coroutine, and one of them runs at a time. With order 0 they run one after the other, each as
// far as it gets. Any other order seeds a generator that picks the next thread at every barrier, fence and atomic, so a
// step that relies on which thread comes first gives different numbers. Caches and weak memory are not simulated: on a
// GPU other threads may see writes late, here they see them at once.
#ifndef CUDA_ON_HOST_H
#define CUDA_ON_HOST_H

#include <ucontext.h>

#include <cstdint>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads, blocks)

struct alignas(16) float4 {
  float x, y, z, w;
};

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

// static throughout: several of these libraries live in one process
namespace host {

enum class State { ready, waiting, ended };

struct Thread {
  ucontext_t context;
  Index block, thread;
  State state = State::ready;
};

static ucontext_t scheduler;
static Thread *running = nullptr;
static bool shuffled = false;
static void (*kernel)();

static void leave() { swapcontext(&running->context, &scheduler); }

static void maybe_leave() {
  if (shuffled) leave();
}

static void trampoline() {
  kernel();
  running->state = State::ended;
}

// By itself, since for a compiler getcontext may return twice.
static void prepare(ucontext_t &context, char *stack, std::size_t size) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  context.uc_link = &scheduler;
  makecontext(&context, trampoline, 0);
}

// False if some threads of a block wait at a barrier that others have passed by: undefined on a GPU.
static bool launch(void (*what)(), unsigned grid, unsigned block, unsigned order) {
  constexpr std::size_t stack = 32 << 10;
  const std::size_t count = std::size_t{grid} * block;
  static std::vector<char> stacks;
  if (stacks.size() < count * stack) stacks.resize(count * stack);
  std::vector<Thread> threads(count);
  kernel = what, shuffled = order != 0;
  gridDim.x = grid, blockDim.x = block;
  for (std::size_t i = 0; i < count; ++i) {
    Thread &thread = threads[i];
    thread.block.x = unsigned(i / block), thread.thread.x = unsigned(i % block);
    prepare(thread.context, stacks.data() + i * stack, stack);
  }
  std::mt19937 random(order);
  std::vector<std::size_t> ready(count), waiting(grid, 0), ended(grid, 0);
  for (std::size_t i = 0; i < count; ++i) ready[i] = count - 1 - i;  // the last is taken first
  while (!ready.empty()) {
    const std::size_t place = order ? random() % ready.size() : ready.size() - 1;
    std::swap(ready[place], ready.back());
    const std::size_t chosen = ready.back();
    Thread &thread = threads[chosen];
    running = &thread, threadIdx = thread.thread, blockIdx = thread.block;
    swapcontext(&scheduler, &thread.context);
    if (thread.state == State::ready) continue;
    ready.pop_back();
    const unsigned mine = thread.block.x;
    (thread.state == State::waiting ? waiting : ended)[mine]++;
    if (waiting[mine] == block) {
      waiting[mine] = 0;
      for (std::size_t i = block; i-- > 0;) {
        threads[std::size_t{mine} * block + i].state = State::ready;
        ready.push_back(std::size_t{mine} * block + i);
      }
    }
  }
  for (const Thread &thread : threads)
    if (thread.state != State::ended) return false;
  return true;
}

}  // namespace host

static inline void __syncthreads() {
  host::running->state = host::State::waiting;
  host::leave();
}
static inline void __threadfence() { host::maybe_leave(); }
static inline void __threadfence_system() { host::maybe_leave(); }

template <class T>
static inline T atomicAdd(T *at, T value) {
  host::maybe_leave();
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
static inline T atomicOr(T *at, T value) {
  host::maybe_leave();
  const T before = *at;
  *at = before | value;
  return before;
}

#endif
