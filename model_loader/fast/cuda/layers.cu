// All decoder layers of one step in one launch: a persistent kernel, one block a multiprocessor, that never gives the
// GPU back between operations. Compiled at run time for one checkpoint's sizes (compile.py gives the macros).
//
// Why one launch. At batch 1 a step of large-v3 is 256 small operations; a kernel border costs 2-3 us, as much as
// reading 10 MB. Here an operation's weights and cached keys are asked for before the barrier in front of it, so the
// memory system works while blocks wait for each other.
//
// Operations of a layer, a barrier over the whole grid between them (see step.py for their meaning):
//   qkv | self-attention | out, x += | cross query | cross-attention | out, x += | fc1, gelu | fc2, x +=
//
// Projections run on the matrix units (mma.m16n8k16): 16 outputs by 8 batch rows by 16 inputs. The inputs of a product
// may be summed in any order, so a lane takes 16 consecutive bytes of a weight row and the matching inputs; weights
// need no reordering in memory. A warp takes 128 inputs (one 4-bit group) of a tile of outputs; the block adds up.
// LayerNorm is folded into the projection behind it, as in kernels/linear.py: sums of x and x * x come from its makers.
// Attention keeps a softmax for every group of lanes that shares a position (Dao et al. 2023, flash-decoding) and joins
// them at the end. x itself, in float32, stays in shared memory: the block that adds to a part of it owns that part.
//
// Macros, SIZE_ and: D width, F inner width, H heads, L layers, T text positions, S audio positions, R rows, GRID blocks,
// NW warps a block; FORMAT 0 floats / 1 int8 / 2 int4, BF16, CROSS8 (audio cache of uint8), EPS.

constexpr int D = SIZE_D, F = SIZE_F, H = SIZE_H, L = SIZE_L, T = SIZE_T, S = SIZE_S, R = SIZE_R;
constexpr int GRID = SIZE_GRID, NW = SIZE_NW;

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// --- what a GPU has and a test's stand-in replaces --------------------------------------------------------------------

#ifndef SOTTO_HOST
#define DEVICE __device__ __forceinline__

DEVICE uint4 load_stream(const void* p) {  // read once in a step: leaves the L1 cache alone
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE uint4 load_cached(const void* p) {  // written during this step: the L1 cache may be behind
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE float load_float(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void add_release(u32* p) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory"); }
DEVICE u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE u32 select_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
DEVICE u32 subtract_half2(u32 a, u32 b) {
  u32 d;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEVICE u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DEVICE u16 float_to_bfloat(float f) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
DEVICE float divide(float a, float b) { return __fdividef(a, b); }  // a full division is a call: it would spill
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
// Keeps the compiler from computing all addresses of all operations before the loop over layers: it would spill them.
template <typename P>
DEVICE P* fresh(P* p) {
  asm volatile("" : "+l"(p));
  return p;
}
extern __shared__ __align__(16) unsigned char shared_memory[];
#endif

// --- 16-bit numbers ---------------------------------------------------------------------------------------------------

DEVICE float low_float(u32 pair) {
#if BF16
  return as_float(pair << 16);
#else
  return half_to_float((u16)(pair & 0xffff));
#endif
}
DEVICE float high_float(u32 pair) {
#if BF16
  return as_float(pair & 0xffff0000u);
#else
  return half_to_float((u16)(pair >> 16));
#endif
}
DEVICE u16 to_16(float f) {
#if BF16
  return float_to_bfloat(f);
#else
  return float_to_half(f);
#endif
}
DEVICE float from_16(u16 h) { return low_float(h); }

// --- sizes ------------------------------------------------------------------------------------------------------------

#define THREADS (NW * 32)
#define NT ((R + 7) / 8)                 // tiles of 8 batch rows
#define CHUNK 128                        // inputs a warp takes at once
#define BLOCKS (FORMAT == 0 ? 4 : FORMAT == 1 ? 2 : 1)  // 64-byte blocks of a chunk in a weight row
#define ROW_BYTES(K) (FORMAT == 0 ? (K) * 2 : FORMAT == 1 ? (K) : (K) / 2)
#define CEIL(a, b) (((a) + (b) - 1) / (b))
#define TILES_PER_BLOCK(N) (CEIL((N) / 16, GRID) > 3 ? 3 : CEIL((N) / 16, GRID))
#define MT_D TILES_PER_BLOCK(D)
#define GROUPS_D CEIL(CEIL(D / 16, MT_D), GRID)  // groups of D's tiles that one block owns
#define STAT_ROWS 32
#define STAT_TILES 128
#define PART 66                          // of a softmax: top, total, 64 sums
#define PAD 4                            // keeps the threads of a warp on different banks
#define RED_STRIDE(MT) ((MT) * 16 + PAD)
#define MAX_SPLITS 6                     // blocks that share the audio positions of one head
#define LOG2E 1.4426950408889634f

struct Projection {
  const unsigned char* weight;
  const void* scale;    // float [N] for int8, float16 [N, K / 128] for int4
  const float* bias;    // [N]
  const float* colsum;  // [N] where a LayerNorm is folded in
};

struct Arguments {
  const Projection* layers;  // [L][6]: qkv, out, cross query, cross out, fc1, fc2
  float* x;                  // [R, D]
  u16* x_copy;               // [R, D]
  float* stats;              // [2][STAT_ROWS][STAT_TILES]: sums of x_copy and its squares by tile of outputs
  float* query;              // [R, D], scaled
  u16* attended;             // [R, D]
  u16* inner;                // [R, F]
  u16* self_keys;            // [L][R, H, T, 64], layers self_stride apart
  u16* self_values;
  const unsigned char* cross_keys;    // [L][R, H, S, 64], layers cross_stride bytes apart
  const unsigned char* cross_values;
  const float* cross_scale;  // [L][R, H, 2], layers scale_stride apart
  const int* position;       // [R]
  const int* finished;       // [R]
  float* parts;              // [R * H * MAX_SPLITS, PART]
  u32* barrier;              // arrivals so far; arrivals before this launch
  u64 self_stride, cross_stride, scale_stride;
};

// Shared memory, by use: what the current operation adds up (red or parts), what lives as long as the kernel.
struct Shared {
  float* red;              // [NW][R][RED_STRIDE] or [items][NW][PART]
  float* own_x;            // [GROUPS_D][R][MT_D * 16]
  float* vectors;          // [3][48]: scale, bias, colsum of this block's outputs
  float* norm;             // [R][2]: mean, 1 / deviation
  u16* attended;           // [R][D] where parts are joined by everybody
  int* alive;              // [R] rows that decode, in order; [R] their positions; [1] how many
  Projection* projections; // [2][6] of this layer and the next
};

#define MAX_MT TILES_PER_BLOCK(F)
#define ITEMS (CEIL(R * H, GRID) + 1)
#define RED_FLOATS_1 (NW * R * RED_STRIDE(3))
#define RED_FLOATS_2 ((ITEMS > NW ? ITEMS : NW) * NW * PART)
#define RED_FLOATS (RED_FLOATS_1 > RED_FLOATS_2 ? RED_FLOATS_1 : RED_FLOATS_2)
#define JOINED (R <= 4 ? R * D : 0)

DEVICE Shared carve(unsigned char* base) {
  Shared s;
  s.projections = (Projection*)base;
  s.red = (float*)(s.projections + 12);
  s.own_x = s.red + RED_FLOATS;
  s.vectors = s.own_x + GROUPS_D * R * MT_D * 16;
  s.norm = s.vectors + 3 * 48;
  s.alive = (int*)(s.norm + 2 * R);
  s.attended = (u16*)(((u64)(s.alive + 2 * R + 1) + 15) & ~(u64)15);
  return s;
}
// A host asks for 12 * sizeof(Projection) + 4 * (RED_FLOATS + GROUPS_D * R * MT_D * 16 + 144 + 4 * R + 1) + 16 + 2 * JOINED.

// --- the barrier ------------------------------------------------------------------------------------------------------

DEVICE void arrive(const Arguments& a) {
  __syncthreads();
  if (threadIdx.x == 0) add_release(a.barrier);
}

DEVICE void wait(const Arguments& a, u32 target) {
  if (threadIdx.x == 0)
    while ((int)(load_acquire(a.barrier) - target) < 0) {
    }
  __syncthreads();
}

// --- projections ------------------------------------------------------------------------------------------------------

template <int MT>
struct Chunk {  // a warp's weights: 128 inputs of MT * 16 outputs
  uint4 w[MT][BLOCKS][2];
  u16 scale[MT][2];
};

template <int K, int MT>
DEVICE void load_chunk(Chunk<MT>& c, const Projection& p, int first_row, int n_rows, int chunk) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const unsigned char* at =
      fresh(p.weight + (u64)(first_row + g) * ROW_BYTES(K) + chunk * (BLOCKS * 64) + t * 16);
  const u16* scale = (const u16*)p.scale + (first_row + g) * (K / CHUNK) + chunk;
#pragma unroll
  for (int m = 0; m < MT; m++) {
    const bool inside = first_row + m * 16 < n_rows;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        if (inside)
          c.w[m][b][half] = load_stream(at + (m * 16 + half * 8) * ROW_BYTES(K) + b * 64);
        else
          c.w[m][b][half] = make_uint4(0, 0, 0, 0);
      }
      if (FORMAT == 2) c.scale[m][half] = inside ? scale[(m * 16 + half * 8) * (K / CHUNK)] : (u16)0;
    }
  }
}

// Without a value on every path, the registers of all operations would be live throughout the loop over layers.
template <int MT>
DEVICE void clear_chunk(Chunk<MT>& c) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) c.w[m][b][half] = make_uint4(0, 0, 0, 0);
      c.scale[m][half] = 0;
    }
}

// The inputs of a half chunk: for k-steps 4 * half .. 4 * half + 3 of every batch row's tile.
template <int K, bool IN_SHARED>
DEVICE void load_inputs(uint4 (&b)[NT][2], const u16* x, int chunk, int half) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u16* base = fresh(x + g * K + chunk * CHUNK + 64 * half + (FORMAT == 0 ? 8 : 16) * t);
#pragma unroll
  for (int n = 0; n < NT; n++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u16* at = base + n * 8 * K + (FORMAT == 0 ? 32 : 8) * j;
      if (R >= 8 || n * 8 + g < R)
        b[n][j] = IN_SHARED ? *(const uint4*)at : load_cached(at);
      else
        b[n][j] = make_uint4(0, 0, 0, 0);
    }
  }
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Two halves from bytes 0, 1 (low) or 2, 3 of four stored values; the offset (128 or 8) is taken off: exact.
DEVICE u32 halves(u32 bytes, bool high) {
  const u32 pair = select_bytes(bytes, 0x64646464u, high ? 0x4342 : 0x4140);
  return subtract_half2(pair, FORMAT == 1 ? 0x64806480u : 0x64086408u);
}

// Weights of k-step s (0 .. 7) of a chunk as the matrix units take them.
template <int MT>
DEVICE void step_weights(u32 (&a)[4], const Chunk<MT>& c, int m, int s) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (FORMAT == 0) {
      a[half] = word(c.w[m][s / 2 % BLOCKS][half], 2 * (s & 1));
      a[half + 2] = word(c.w[m][s / 2 % BLOCKS][half], 2 * (s & 1) + 1);
    } else {
      u32 bytes = word(c.w[m][FORMAT == 1 ? s / 4 % BLOCKS : 0][half], s & 3);
      if (FORMAT == 2) bytes = (s < 4 ? bytes : bytes >> 4) & 0x0f0f0f0fu;
      a[half] = halves(bytes, false);
      a[half + 2] = halves(bytes, true);
    }
  }
}

template <int MT>
DEVICE void multiply(float (&acc)[MT][NT][4], const Chunk<MT>& c, const uint4 (&b)[NT][2], int half) {
#pragma unroll
  for (int m = 0; m < MT; m++) {
    float part[NT][4];
    if (FORMAT == 2) {
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) part[n][i] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 a[4];
      step_weights<MT>(a, c, m, 4 * half + i);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const u32 b0 = word(b[n][i / 2], 2 * (i & 1)), b1 = word(b[n][i / 2], 2 * (i & 1) + 1);
        mma(FORMAT == 2 ? part[n] : acc[m][n], a[0], a[1], a[2], a[3], b0, b1);
      }
    }
    if (FORMAT == 2) {
      const float low = half_to_float(c.scale[m][0]), high = half_to_float(c.scale[m][1]);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        acc[m][n][0] += part[n][0] * low;
        acc[m][n][1] += part[n][1] * low;
        acc[m][n][2] += part[n][2] * high;
        acc[m][n][3] += part[n][3] * high;
      }
    }
  }
}

template <int CHUNKS>
DEVICE bool has_chunk(int chunk) { return CHUNKS % NW == 0 || chunk < CHUNKS; }

enum Kind { QKV, QUERY, RESIDUAL, EXPAND };

template <int K, int N, int MT, int KIND, bool IN_SHARED = false>
struct Linear {
  static const int CHUNKS = K / CHUNK;
  static const int MINE = CEIL(CHUNKS, NW);                    // chunks of a warp
  static const int AHEAD = MINE < 2 ? MINE : 2;                // chunks whose weights are asked for early
  static const int HALVES = 2 * MINE;
  static const int DEEP = NT == 1 ? 8 : NT == 2 ? 4 : 2;       // half chunks whose inputs are asked for early
  static const int DEPTH = HALVES < DEEP ? HALVES : DEEP;
  static const int GROUPS = CEIL(N / 16, MT);
  Chunk<MT> chunks[AHEAD];

  // What may be read before the barrier: weights, and the vectors of this block's outputs.
  DEVICE void ask(const Projection& p, const Shared& s, int group) {
    const int warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (group < GROUPS && has_chunk<CHUNKS>(warp + i * NW))
        load_chunk<K, MT>(chunks[i], p, group * MT * 16, N, warp + i * NW);
      else
        clear_chunk<MT>(chunks[i]);
    }
    const int o = threadIdx.x;
    if (group < GROUPS && o < MT * 16) {
      const int n = group * MT * 16 + o;
      const bool inside = n < N;
      if (FORMAT == 1) s.vectors[o] = inside ? ((const float*)p.scale)[n] : 0.0f;
      s.vectors[48 + o] = inside ? p.bias[n] : 0.0f;
      if (KIND == QKV || KIND == QUERY || KIND == EXPAND) s.vectors[96 + o] = inside ? p.colsum[n] : 0.0f;
    }
  }

  DEVICE void products(float (&acc)[MT][NT][4], const Projection& p, const u16* x, int group) {
    const int warp = threadIdx.x >> 5;
    uint4 b[DEPTH][NT][2];
#pragma unroll
    for (int h = 0; h < DEPTH; h++)
      load_inputs<K, IN_SHARED>(b[h], x, has_chunk<CHUNKS>(warp + h / 2 * NW) ? warp + h / 2 * NW : 0, h & 1);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const int i = h / 2, chunk = warp + i * NW;
      if (has_chunk<CHUNKS>(chunk)) {
        multiply<MT>(acc, chunks[i % AHEAD], b[h % DEPTH], h & 1);
        if ((h & 1) && i + AHEAD < MINE && has_chunk<CHUNKS>(chunk + AHEAD * NW))
          load_chunk<K, MT>(chunks[i % AHEAD], p, group * MT * 16, N, chunk + AHEAD * NW);
        const int next = h + DEPTH;
        if (next < HALVES && has_chunk<CHUNKS>(warp + next / 2 * NW))
          load_inputs<K, IN_SHARED>(b[h % DEPTH], x, warp + next / 2 * NW, next & 1);
      }
    }
  }

  // Products of this block's outputs with all rows, added up over the warps, then the epilogue. own: which of the
  // block's groups of x this is.
  DEVICE void run(const Arguments& a, const Shared& s, const Projection& p, const u16* x, int group, int own,
                  int layer, bool last) {
    if (group >= GROUPS) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    float acc[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
    products(acc, p, x, group);
    const int stride = RED_STRIDE(MT);
    float* mine = s.red + warp * R * stride;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = n * 8 + 2 * t + (i & 1);
          if (R % 8 == 0 || row < R) mine[row * stride + m * 16 + g + 8 * (i >> 1)] = acc[m][n][i];
        }
    __syncthreads();
    for (int e0 = warp * 32; e0 < R * MT * 16; e0 += THREADS) finish(a, s, group, own, layer, last, e0 + lane);
    __syncthreads();
  }

  // One output of one row. A warp's lanes come together, for they add up sums of x.
  DEVICE void finish(const Arguments& a, const Shared& s, int group, int own, int layer, bool last, int e) {
    const int r = e / (MT * 16), o = e % (MT * 16), n = group * MT * 16 + o, stride = RED_STRIDE(MT);
    const bool inside = r < R && n < N;
    float v = 0.0f;
    if (inside) {
#pragma unroll
      for (int w = 0; w < NW; w++) v += s.red[(w * R + r) * stride + o];
      if (FORMAT == 1) v *= s.vectors[o];
      if (KIND != RESIDUAL) v = (v - s.norm[2 * r] * s.vectors[96 + o]) * s.norm[2 * r + 1];
      v += s.vectors[48 + o];
    }
    if (KIND == QKV) {
      if (inside) store_qkv(a, layer, s.alive[R + r], r, n, v);
    } else if (KIND == QUERY) {
      if (inside) a.query[r * D + n] = v;
    } else if (KIND == EXPAND) {
      if (inside) a.inner[r * F + n] = to_16(0.5f * v * (1.0f + erff(v * 0.70710678118654752f)));
    } else {
      float rounded = 0.0f;
      if (inside) {
        float* own_x = s.own_x + (own * R + r) * (MT_D * 16) + o;
        v += *own_x;
        *own_x = v;
        const u16 copy = to_16(v);
        rounded = from_16(copy);
        a.x_copy[r * D + n] = copy;
        if (last) a.x[r * D + n] = v;
      }
      float sum = rounded, square = rounded * rounded;
#pragma unroll
      for (int mask = 1; mask < 16; mask *= 2) {
        sum += shuffle_xor(sum, mask);
        square += shuffle_xor(square, mask);
      }
      if (inside && o % 16 == 0) {
        a.stats[r * STAT_TILES + n / 16] = sum;
        a.stats[(STAT_ROWS + r) * STAT_TILES + n / 16] = square;
      }
    }
  }

  DEVICE void store_qkv(const Arguments& a, int layer, int position, int r, int n, float v) {
    const int part = n / D, i = n % D;
    if (part == 0) {
      a.query[r * D + i] = v;
      return;
    }
    u16* cache = (part == 1 ? a.self_keys : a.self_values) + layer * a.self_stride;
    cache[(((u64)r * H + i / 64) * T + position) * 64 + i % 64] = to_16(v);
  }
};

// Mean and deviation of every row of x from the sums that its makers left. A warp takes a row at a time.
DEVICE void read_norm(const Arguments& a, const Shared& s, int n_tiles) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int r = warp; r < R; r += NW) {
    float sum = 0.0f, square = 0.0f;
    for (int tile = lane; tile < n_tiles; tile += 32) {
      sum += load_float(a.stats + r * STAT_TILES + tile);
      square += load_float(a.stats + (STAT_ROWS + r) * STAT_TILES + tile);
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      sum += shuffle_xor(sum, mask);
      square += shuffle_xor(square, mask);
    }
    if (lane == 0) {
      const float mean = sum * (1.0f / D);
      s.norm[2 * r] = mean;
      s.norm[2 * r + 1] = rsqrtf(square * (1.0f / D) - mean * mean + EPS);
    }
  }
}

// --- attention --------------------------------------------------------------------------------------------------------

// A softmax over the positions of one group of lanes; each lane holds WIDE of the 64 sums.
template <int WIDE>
struct Softmax {
  float top, total, acc[WIDE];
  DEVICE void clear() {
    top = -1.0e30f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDE; i++) acc[i] = 0.0f;
  }
};

template <int WIDE, bool BYTES>
DEVICE void widen(float (&f)[WIDE], const uint4& v) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 w = word(v, i);
    if (BYTES) {  // a byte in the mantissa of 2^23, which is taken off with the offset of 128
#pragma unroll
      for (int j = 0; j < 4; j++) f[(4 * i + j) % WIDE] = as_float(select_bytes(w, 0x4B000000u, 0x7540 + j)) - 8388736.0f;
    } else {
      f[(2 * i) % WIDE] = low_float(w);
      f[(2 * i + 1) % WIDE] = high_float(w);
    }
  }
}

// U positions of this lane's group. seen: bit i = position i counts.
template <int U, int WIDE, bool BYTES>
DEVICE void attend(Softmax<WIDE>& soft, const uint4 (&k)[U], const uint4 (&v)[U], const float (&q)[WIDE], u32 seen) {
  float score[U];
  float top = soft.top;
#pragma unroll
  for (int u = 0; u < U; u++) {
    float f[WIDE];
    widen<WIDE, BYTES>(f, k[u]);
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDE; i++) dot += f[i] * q[i];
#pragma unroll
    for (int mask = 1; mask < 64 / WIDE; mask *= 2) dot += shuffle_xor(dot, mask);
    score[u] = (seen >> u) & 1 ? dot : -1.0e30f;
    top = fmaxf(top, score[u]);
  }
  const float keep = exp2_fast(soft.top - top);
  soft.total *= keep;
#pragma unroll
  for (int i = 0; i < WIDE; i++) soft.acc[i] *= keep;
#pragma unroll
  for (int u = 0; u < U; u++) {
    const float weight = (seen >> u) & 1 ? exp2_fast(score[u] - top) : 0.0f;
    float f[WIDE];
    widen<WIDE, BYTES>(f, v[u]);
    soft.total += weight;
#pragma unroll
    for (int i = 0; i < WIDE; i++) soft.acc[i] += weight * f[i];
  }
  soft.top = top;
}

// Join the groups of a warp and leave the warp's part in out[PART].
template <int WIDE>
DEVICE void leave_part(Softmax<WIDE>& soft, float scale, float* out) {
  const int lane = threadIdx.x & 31;
  float top = soft.top;
#pragma unroll
  for (int mask = 64 / WIDE; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
  const float keep = exp2_fast(soft.top - top);
  float total = soft.total * keep;
#pragma unroll
  for (int mask = 64 / WIDE; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
#pragma unroll
  for (int i = 0; i < WIDE; i++) {
    float sum = soft.acc[i] * keep;
#pragma unroll
    for (int mask = 64 / WIDE; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane < 64 / WIDE) out[2 + lane * WIDE + i] = sum * scale;
  }
  if (lane == 0) out[0] = top, out[1] = total;
}

template <int WIDE>
DEVICE void read_query(float (&q)[WIDE], const float* query, float scale) {
#pragma unroll
  for (int i = 0; i < WIDE / 4; i++) {
    const uint4 v = load_cached(query + 4 * i);
#pragma unroll
    for (int j = 0; j < 4; j++) q[4 * i + j] = as_float(word(v, j)) * scale;
  }
}

// Sum i (0 .. 63) of n_parts parts that are PART floats each, over their total.
DEVICE float join(const float* parts, int n_parts, int i) {
  float top = -1.0e30f;
  for (int p = 0; p < n_parts; p++) top = fmaxf(top, parts[p * PART]);
  float total = 0.0f, sum = 0.0f;
  for (int p = 0; p < n_parts; p++) {
    const float share = exp2_fast(parts[p * PART] - top);
    total += share * parts[p * PART + 1];
    sum += share * parts[p * PART + 2 + i];
  }
  return total > 0.0f ? divide(sum, total) : 0.0f;
}

// A cell is a head of a row that decodes.
DEVICE void find_cell(const Shared& s, int cell, int& row, int& head, int& position) {
  row = s.alive[cell / H], head = cell % H, position = s.alive[R + row];
}

struct SelfAttention {
  static const int U = 4;
  uint4 k[U], v[U];
  int row, head, position, warps, sub, slot;
  bool active;

  DEVICE const u16* at(const u16* cache, const Arguments& a, int layer, int p) {
    const int lane = threadIdx.x & 31;
    return cache + layer * a.self_stride + (((u64)row * H + head) * T + p) * 64 + (lane & 7) * 8;
  }
  DEVICE int place(int round) { return (round * warps + sub) * 4 + ((threadIdx.x & 31) >> 3); }

  DEVICE void choose(const Shared& s, int n_cells, int first) {
    const int warp = threadIdx.x >> 5, each = CEIL(n_cells, GRID);
    warps = each >= NW ? 1 : NW / each;
    slot = warp / warps, sub = warp % warps;
    const int cell = first + slot * GRID + blockIdx.x;
    row = head = position = 0;
    active = slot < NW / warps && cell < n_cells;
    if (active) find_cell(s, cell, row, head, position);
  }

  // Positions before the newest are in the cache already.
  DEVICE void ask(const Arguments& a, int layer) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int p = place(u);
      k[u] = v[u] = make_uint4(0, 0, 0, 0);
      if (active && p < position) k[u] = load_cached(at(a.self_keys, a, layer, p)), v[u] = load_cached(at(a.self_values, a, layer, p));
    }
  }

  DEVICE void run(const Arguments& a, const Shared& s, int layer) {
    if (active) {
      Softmax<8> soft;
      soft.clear();
      float q[8];
      read_query<8>(q, a.query + row * D + head * 64 + (threadIdx.x & 7) * 8, LOG2E);
      for (int round = 0; (round * warps + sub) * 4 <= position; round += U) {
        u32 seen = 0;
#pragma unroll
        for (int u = 0; u < U; u++) {
          const int p = place(round + u);
          if (p <= position) seen |= 1u << u;
          if (p <= position && (round > 0 || p == position))
            k[u] = load_cached(at(a.self_keys, a, layer, p)), v[u] = load_cached(at(a.self_values, a, layer, p));
        }
        attend<U, 8, false>(soft, k, v, q, seen);
      }
      leave_part<8>(soft, 1.0f, s.red + (slot * warps + sub) * PART);
    }
    __syncthreads();
    // A warp writes its share of its cell's 64 sums.
    if (active) {
      const float* parts = s.red + slot * warps * PART;
      for (int i = sub * 32 + (threadIdx.x & 31); i < 64; i += warps * 32)
        a.attended[row * D + head * 64 + i] = to_16(join(parts, warps, i));
    }
    __syncthreads();
  }
};

struct CrossAttention {
  static const int WIDE = CROSS8 ? 16 : 8, PER_LOAD = WIDE / 2, U = 4;
  uint4 k[2][U], v[2][U];
  int n_items, splits, positions, chunks, mine;

  DEVICE void choose(int n_cells) {
    splits = 1;
    if (JOINED > 0) {
      int best = CEIL(n_cells, GRID) * 60;
      for (int n = 2; n <= MAX_SPLITS; n++) {
        const int cost = CEIL(n_cells * n, GRID) * 60 / n;
        if (cost < best) best = cost, splits = n;
      }
    }
    n_items = n_cells * splits;
    positions = CEIL(S, splits);
    chunks = CEIL(positions, NW * PER_LOAD * U);
    mine = blockIdx.x < n_items ? CEIL(n_items - (int)blockIdx.x, GRID) * chunks : 0;
  }

  DEVICE int place(int split, int chunk, int u) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    return split * positions + ((chunk * U + u) * NW + warp) * PER_LOAD + lane / (64 / WIDE);
  }

  template <int B>
  DEVICE void ask(const Arguments& a, const Shared& s, int layer, int index) {
    if (index >= mine) {
#pragma unroll
      for (int u = 0; u < U; u++) k[B][u] = v[B][u] = make_uint4(0, 0, 0, 0);
      return;
    }
    const int item = blockIdx.x + index / chunks * GRID, chunk = index % chunks, split = item % splits;
    int row, head, position;
    find_cell(s, item / splits, row, head, position);
    const int end = (split + 1) * positions < S ? (split + 1) * positions : S;
    const u64 base = layer * a.cross_stride + ((u64)row * H + head) * S * (CROSS8 ? 64 : 128) +
                     ((threadIdx.x & 31) % (64 / WIDE)) * 16;
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int p = place(split, chunk, u);
      if (p < end)
        k[B][u] = load_stream(a.cross_keys + base + (u64)p * (CROSS8 ? 64 : 128));
      else
        k[B][u] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      const int p = place(split, chunk, u);
      if (p < end)
        v[B][u] = load_stream(a.cross_values + base + (u64)p * (CROSS8 ? 64 : 128));
      else
        v[B][u] = make_uint4(0, 0, 0, 0);
    }
  }

  template <int B>
  DEVICE void take(const Arguments& a, const Shared& s, int layer, int index, Softmax<WIDE>& soft, float (&q)[WIDE],
                   float& v_scale) {
    if (index >= mine) return;
    const int item = blockIdx.x + index / chunks * GRID, chunk = index % chunks, split = item % splits;
    if (chunk == 0) {
      int row, head, position;
      find_cell(s, item / splits, row, head, position);
      float scale = LOG2E;
      if (CROSS8) {
        const float* scales = a.cross_scale + layer * a.scale_stride + (row * H + head) * 2;
        scale *= scales[0], v_scale = scales[1];
      }
      read_query<WIDE>(q, a.query + row * D + head * 64 + ((threadIdx.x & 31) % (64 / WIDE)) * WIDE, scale);
      soft.clear();
    }
    const int end = (split + 1) * positions < S ? (split + 1) * positions : S;
    u32 seen = 0;
#pragma unroll
    for (int u = 0; u < U; u++)
      if (place(split, chunk, u) < end) seen |= 1u << u;
    attend<U, WIDE, CROSS8>(soft, k[B], v[B], q, seen);
    ask<B>(a, s, layer, index + 2);
    if (chunk == chunks - 1)
      leave_part<WIDE>(soft, v_scale, s.red + (index / chunks * NW + (threadIdx.x >> 5)) * PART);
  }

  DEVICE void run(const Arguments& a, const Shared& s, int layer) {
    Softmax<WIDE> soft;
    soft.clear();
    float q[WIDE], v_scale = 1.0f;
#pragma unroll
    for (int i = 0; i < WIDE; i++) q[i] = 0.0f;
    for (int index = 0; index < mine; index += 2) {
      take<0>(a, s, layer, index, soft, q, v_scale);
      take<1>(a, s, layer, index + 1, soft, q, v_scale);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < mine / chunks * 64; e += THREADS) {
      const int item = blockIdx.x + e / 64 * GRID, i = e % 64;
      const float* parts = s.red + e / 64 * NW * PART;
      if (splits == 1) {
        int row, head, position;
        find_cell(s, item, row, head, position);
        a.attended[row * D + head * 64 + i] = to_16(join(parts, NW, i));
      } else {
        float top = -1.0e30f, total = 0.0f, sum = 0.0f;
        for (int w = 0; w < NW; w++) top = fmaxf(top, parts[w * PART]);
        for (int w = 0; w < NW; w++) {
          const float share = exp2_fast(parts[w * PART] - top);
          total += share * parts[w * PART + 1], sum += share * parts[w * PART + 2 + i];
        }
        float* out = a.parts + (u64)item * PART;
        out[2 + i] = sum;
        if (i == 0) out[0] = top, out[1] = total;
      }
    }
    __syncthreads();
  }

  // Where blocks shared a head, everybody joins their parts: it costs a barrier less.
  DEVICE void join_all(const Arguments& a, const Shared& s, int n_cells) {
    if (splits == 1) {
      for (int e = threadIdx.x; e < R * D / 8; e += THREADS) ((uint4*)s.attended)[e] = load_cached(a.attended + e * 8);
    } else {
      for (int e = threadIdx.x; e < n_cells * 64; e += THREADS) {
        int row, head, position;
        find_cell(s, e / 64, row, head, position);
        const float* parts = a.parts + (u64)(e / 64) * splits * PART;
        float tops[MAX_SPLITS], totals[MAX_SPLITS], sums[MAX_SPLITS], top = -1.0e30f, total = 0.0f, sum = 0.0f;
#pragma unroll
        for (int p = 0; p < MAX_SPLITS; p++) {
          const bool is_part = p < splits;
          tops[p] = is_part ? load_float(parts + p * PART) : -1.0e30f;
          totals[p] = is_part ? load_float(parts + p * PART + 1) : 0.0f;
          sums[p] = is_part ? load_float(parts + p * PART + 2 + e % 64) : 0.0f;
        }
#pragma unroll
        for (int p = 0; p < MAX_SPLITS; p++) top = fmaxf(top, tops[p]);
#pragma unroll
        for (int p = 0; p < MAX_SPLITS; p++) {
          const float share = exp2_fast(tops[p] - top);
          total += share * totals[p], sum += share * sums[p];
        }
        s.attended[row * D + head * 64 + e % 64] = to_16(total > 0.0f ? divide(sum, total) : 0.0f);
      }
    }
    __syncthreads();
  }
};

// --- the step ---------------------------------------------------------------------------------------------------------

// Rows that decode and where they are; this block's part of x.
DEVICE int prepare(const Arguments& a, const Shared& s) {
  if (threadIdx.x == 0) {
    int n = 0;
    for (int r = 0; r < R; r++) {
      s.alive[R + r] = a.position[r];
      if (a.finished[r] == 0) s.alive[n++] = r;
    }
    s.alive[2 * R] = n;
  }
  for (int own = 0; own < GROUPS_D; own++) {
    const int group = blockIdx.x + own * GRID;
    for (int e = threadIdx.x; e < R * MT_D * 16; e += THREADS) {
      const int n = group * MT_D * 16 + e % (MT_D * 16);
      if (n < D) s.own_x[own * R * MT_D * 16 + e] = a.x[e / (MT_D * 16) * D + n];
    }
  }
  for (int e = threadIdx.x; e < (JOINED + 1) / 2; e += THREADS) ((u32*)s.attended)[e] = 0;
  __syncthreads();
  return s.alive[2 * R] * H;
}

DEVICE void fetch_projections(const Arguments& a, const Shared& s, int layer) {
  const int words = 6 * sizeof(Projection) / 8;
  if (threadIdx.x < words && layer < L)
    ((u64*)(s.projections + (layer & 1) * 6))[threadIdx.x] = ((const u64*)(a.layers + (u64)layer * 6))[threadIdx.x];
}

// A projection whose groups may be more than the blocks: the first is asked for early, the rest as they come.
#define PROJECT(TYPE, P, X, FLAG)                                                     \
  {                                                                                   \
    linear.run(a, s, P, X, blockIdx.x, 0, layer, FLAG);                               \
    for (int own = 1; own < CEIL(TYPE::GROUPS, GRID); own++) {                        \
      linear.ask(P, s, blockIdx.x + own * GRID);                                      \
      __syncthreads();                                                                \
      linear.run(a, s, P, X, blockIdx.x + own * GRID, own, layer, FLAG);              \
    }                                                                                 \
  }
#define BARRIER_AFTER arrive(a), target += GRID

extern "C" __global__ void __launch_bounds__(THREADS, 1) decoder_layers(Arguments a) {
  const Shared s = carve(shared_memory);
  const u32 started = a.barrier[1];
  u32 target = started;
  fetch_projections(a, s, 0);
  const int n_cells = prepare(a, s);
#pragma unroll 1
  for (int layer = 0; layer < L; layer++) {
    const Projection* p = s.projections + (layer & 1) * 6;
    {
      typedef Linear<D, 3 * D, TILES_PER_BLOCK(3 * D), QKV> Qkv;
      Qkv linear;
      linear.ask(p[0], s, blockIdx.x);
      if (layer > 0) wait(a, target);
      read_norm(a, s, layer > 0 ? D / 16 : 1);
      __syncthreads();
      PROJECT(Qkv, p[0], a.x_copy, false)
      fetch_projections(a, s, layer + 1);
      BARRIER_AFTER;
    }
    {
      SelfAttention attention;
      attention.choose(s, n_cells, 0);
      attention.ask(a, layer);
      wait(a, target);
      for (int first = 0; first < n_cells; first += GRID * (NW / attention.warps)) {
        if (first > 0) attention.choose(s, n_cells, first), attention.ask(a, layer);
        attention.run(a, s, layer);
      }
      BARRIER_AFTER;
    }
    {
      typedef Linear<D, D, MT_D, RESIDUAL> Out;
      Out linear;
      linear.ask(p[1], s, blockIdx.x);
      wait(a, target);
      PROJECT(Out, p[1], a.attended, false)
      BARRIER_AFTER;
    }
    {
      typedef Linear<D, D, MT_D, QUERY> Query;
      Query linear;
      linear.ask(p[2], s, blockIdx.x);
      wait(a, target);
      read_norm(a, s, D / 16);
      __syncthreads();
      PROJECT(Query, p[2], a.x_copy, false)
      BARRIER_AFTER;
    }
    CrossAttention cross;
    {
      cross.choose(n_cells);
      cross.ask<0>(a, s, layer, 0);
      cross.ask<1>(a, s, layer, 1);
      wait(a, target);
      cross.run(a, s, layer);
      BARRIER_AFTER;
    }
    {
      typedef Linear<D, D, MT_D, RESIDUAL, (JOINED > 0)> Out;
      Out linear;
      linear.ask(p[3], s, blockIdx.x);
      wait(a, target);
      if (JOINED > 0) cross.join_all(a, s, n_cells);
      PROJECT(Out, p[3], JOINED > 0 ? s.attended : a.attended, false)
      BARRIER_AFTER;
    }
    {
      typedef Linear<D, F, TILES_PER_BLOCK(F), EXPAND> Expand;
      Expand linear;
      linear.ask(p[4], s, blockIdx.x);
      wait(a, target);
      read_norm(a, s, D / 16);
      __syncthreads();
      PROJECT(Expand, p[4], a.x_copy, false)
      BARRIER_AFTER;
    }
    {
      typedef Linear<F, D, MT_D, RESIDUAL> Add;
      Add linear;
      linear.ask(p[5], s, blockIdx.x);
      wait(a, target);
      PROJECT(Add, p[5], a.inner, layer == L - 1)
      if (layer < L - 1) BARRIER_AFTER;
    }
  }
  // Everybody has read the count by now, for everybody has passed a barrier since.
  if (blockIdx.x == 0 && threadIdx.x == 0) a.barrier[1] = started + (8 * L - 1) * GRID;
}
