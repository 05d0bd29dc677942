// A GPU for one kernel, on a processor: what model_loader/fast/cuda/layers.cu asks of one, as plain C++.
//
// Every thread of the grid is a coroutine, and all take turns in a fixed order. Barriers, exchanges between lanes and
// matrix products are where turns end, so a missing barrier shows as a wrong result, every time the same. Include the
// kernel's source behind this file; run_grid then runs it.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define SOTTO_HOST
#define DEVICE inline
#define OPTIMISED __attribute__((noinline, optimize("O2")))
#define __global__
#define __launch_bounds__(...)

struct uint4 {
  unsigned int x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return float2{x, y}; }
struct Index {
  int x;
};

namespace host {
struct Thread {
  ucontext_t context;  // for its first turn
  jmp_buf place;       // for later ones
  bool started = false;
  std::vector<char> stack;
  int block, index;
  bool done = false;
};
struct Gate {  // opens when all have come
  int waiting = 0, opened = 0;
};
struct Warp {
  Gate gate;
  float values[32];
  unsigned words[32][6];
};
inline std::vector<Thread> threads;
inline std::vector<std::vector<Gate>> block_gates;  // the numbered barriers of every block
inline std::vector<Warp> warps;
inline std::vector<std::vector<unsigned char>> shared;
inline ucontext_t scheduler;
inline jmp_buf turns;
inline int current, block_threads;

inline Thread& self() { return threads[current]; }
inline void yield() {  // swapcontext would ask the system twice for its mask of signals
  if (!_setjmp(self().place)) _longjmp(turns, 1);
}
inline void arrive(Gate& gate, int expected) {
  if (++gate.waiting == expected) {
    gate.waiting = 0;
    gate.opened++;
  }
}
inline void pass(Gate& gate, int expected) {
  const int opened = gate.opened;
  arrive(gate, expected);
  while (gate.opened == opened) yield();
}
inline Warp& warp() { return warps[self().block * (block_threads / 32) + self().index / 32]; }
inline void meet() { pass(warp().gate, 32); }

inline float from_half(unsigned short h) {
  const unsigned sign = (h >> 15) & 1, exponent = (h >> 10) & 31, mantissa = h & 1023;
  float value;
  if (exponent == 31)
    value = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    value = std::ldexp((float)mantissa, -24);
  else
    value = std::ldexp((float)(1024 + mantissa), (int)exponent - 25);
  return sign ? -value : value;
}
OPTIMISED inline unsigned short to_half(float f) {
  const unsigned short sign = std::signbit(f) ? 0x8000 : 0;
  const float size = std::fabs(f);
  if (std::isnan(f)) return 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);  // size = m * 2^exponent, m in [0.5, 1)
  if (exponent < -13) exponent = -13;
  const float scaled = std::nearbyint(std::ldexp(size, 11 - exponent));  // to even, at 11 bits
  const float rounded = std::ldexp(scaled, exponent - 11);
  std::frexp(rounded, &exponent);
  if (rounded < std::ldexp(1.0f, -14)) return sign | (unsigned short)std::ldexp(rounded, 24);
  const int mantissa = (int)std::ldexp(rounded, 11 - exponent) - 1024;
  return sign | (unsigned short)((exponent + 14) << 10) | (unsigned short)mantissa;
}
inline float from_bfloat(unsigned short h) {
  const unsigned bits = (unsigned)h << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline unsigned short to_bfloat(float f) {
  unsigned bits;
  std::memcpy(&bits, &f, 4);
  return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static float of_16_bits[65536];
static const bool is_filled = [] {
  for (int h = 0; h < 65536; h++) of_16_bits[h] = BF16 ? from_bfloat(h) : from_half(h);
  return true;
}();
}  // namespace host

#define threadIdx (Index{host::self().index})
#define blockIdx (Index{host::self().block})
#define shared_memory (host::shared[host::self().block].data())

inline void meet_at(int barrier, int n_threads) { host::pass(host::block_gates[host::self().block][barrier], n_threads); }
inline void arrive_at(int barrier, int n_threads) { host::arrive(host::block_gates[host::self().block][barrier], n_threads); }
inline uint4 load_stream(const void* p) { return *(const uint4*)p; }
inline uint4 load_cached(const void* p) { return *(const uint4*)p; }
inline float load_float(const float* p) { return *p; }
inline float2 load_float2(const float2* p) { return *p; }
inline void add_release(unsigned* p) { ++*p; }
inline unsigned load_acquire(const unsigned* p) {
  host::yield();
  return *p;
}
inline float shuffle_xor(float v, int mask) {
  host::Warp& w = host::warp();
  const int lane = host::self().index & 31;
  w.values[lane] = v;
  host::meet();
  const float other = w.values[lane ^ mask];
  host::meet();
  return other;
}
inline unsigned select_bytes(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = ((unsigned long long)b << 32) | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)((both >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
  return out;
}
inline unsigned subtract_half2(unsigned a, unsigned b) {
  const unsigned low = host::to_half(host::from_half(a & 0xffff) - host::from_half(b & 0xffff));
  const unsigned high = host::to_half(host::from_half(a >> 16) - host::from_half(b >> 16));
  return low | (high << 16);
}
inline unsigned fma_half2(unsigned a, unsigned b, unsigned c) {
  auto one = [](unsigned x, unsigned y, unsigned z) {
    return (unsigned)host::to_half(host::from_half(x & 0xffff) * host::from_half(y & 0xffff) + host::from_half(z & 0xffff));
  };
  return one(a, b, c) | (one(a >> 16, b >> 16, c >> 16) << 16);
}
inline unsigned multiply_half2(unsigned a, unsigned b) { return fma_half2(a, b, 0x80008000u); }
inline void __syncwarp() { host::meet(); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float half_to_float(unsigned short h) { return host::from_half(h); }
inline unsigned short float_to_half(float f) { return host::to_half(f); }
inline unsigned short float_to_bfloat(float f) { return host::to_bfloat(f); }
inline float divide(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float as_float(unsigned bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <typename P>
inline P* fresh(P* p) {
  return p;
}

namespace host {
// What lane 4 g + t holds of the product below. OPTIMISED: most of a test's time is spent here, the rest of it compiling.
OPTIMISED inline void multiply(const unsigned (*words)[6], float* c, int g, int t) {
  for (int i = 0; i < 4; i++) {
    const int m = g + 8 * (i >> 1), n = 2 * t + (i & 1);
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const int shift = 16 * (k & 1), at = (k & 7) / 2;
      const unsigned a = words[(m & 7) * 4 + at][(m >> 3) + 2 * (k >> 3)], b = words[n * 4 + at][4 + (k >> 3)];
      sum += (double)of_16_bits[(a >> shift) & 0xffff] * of_16_bits[(b >> shift) & 0xffff];
    }
    c[i] = (float)sum;
  }
}
}  // namespace host

// D = A B + C of 16 x 8 x 16, with PTX's places of the elements (PTX ISA, Matrix Fragments for mma.m16n8k16).
inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  host::Warp& w = host::warp();
  const int lane = host::self().index & 31, g = lane >> 2, t = lane & 3;
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(w.words[lane], mine, sizeof(mine));
  host::meet();
  host::multiply(w.words, c, g, t);
  host::meet();
}

namespace host {
__attribute__((noinline)) inline void take_turn(Thread& t) {
  if (_setjmp(turns)) return;
  if (t.started) _longjmp(t.place, 1);
  t.started = true;
  swapcontext(&scheduler, &t.context);
}
}  // namespace host

// Run `kernel` on n_blocks blocks of n_threads threads with so many bytes of shared memory each. False if one wrote behind
// them.
constexpr size_t BEHIND = 65536;
template <typename Kernel>
bool run_grid(int n_blocks, int n_threads, size_t shared_bytes, Kernel kernel) {
  using namespace host;
  static Kernel* running;
  running = &kernel;
  block_threads = n_threads;
  threads.assign(n_blocks * n_threads, Thread{});
  block_gates.assign(n_blocks, std::vector<Gate>(16));
  warps.assign(n_blocks * n_threads / 32, Warp{});
  // What nobody wrote is not a number; what lies behind must not be written.
  shared.assign(n_blocks, std::vector<unsigned char>(shared_bytes + BEHIND, 0xff));
  for (int i = 0; i < (int)threads.size(); i++) {
    Thread& t = threads[i];
    t.block = i / n_threads, t.index = i % n_threads;
    t.stack.resize(64 * 1024);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = &scheduler;
    makecontext(
        &t.context,
        +[]() {
          (*running)();
          self().done = true;
          _longjmp(turns, 1);
        },
        0);
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (current = 0; current < (int)threads.size(); current++) {
      if (threads[current].done) continue;
      busy = true;
      take_turn(threads[current]);
    }
  }
  for (const auto& memory : shared)
    for (size_t i = shared_bytes; i < memory.size(); i++)
      if (memory[i] != 0xff) return false;
  return true;
}
