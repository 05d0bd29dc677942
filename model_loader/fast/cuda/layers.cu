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
// Attention: a warp takes 16 positions at once, their products with the query on the matrix units; every group of four
// lanes keeps a softmax of its own (Dao et al. 2023, flash-decoding), joined at the end. x itself, in float32, stays in
// shared memory: the block that adds to a part of it owns that part.
//
// Macros, SIZE_ and: D width, F inner width, H heads, L layers, T text positions, S audio positions, R rows, GRID blocks,
// NW working warps a block; FORMAT 0 floats / 1 int8 / 2 int4, BF16, CROSS8 (audio cache of uint8), EPS.

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
DEVICE void meet_at(int barrier, int n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(n_threads) : "memory");
}
DEVICE void arrive_at(int barrier, int n_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(n_threads) : "memory");
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
DEVICE u32 multiply_half2(u32 a, u32 b) {
  u32 d;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE float2 load_float2(const float2* p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
  return v;
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

constexpr int WORKERS = NW * 32, THREADS = WORKERS + 32;  // the last warp of a block minds the barrier
#define NT ((R + 7) / 8)                 // tiles of 8 batch rows
#define CHUNK 128                        // inputs a warp takes at once
#define BLOCKS (FORMAT == 0 ? 4 : FORMAT == 1 ? 2 : 1)  // 64-byte blocks of a chunk in a weight row
#define ROW_BYTES(K) (FORMAT == 0 ? (K) * 2 : FORMAT == 1 ? (K) : (K) / 2)
#define CEIL(a, b) (((a) + (b) - 1) / (b))
// Outputs that a block takes at once, and their tiles of 16. Few rows: as even as can be, since all of the weights'
// time is theirs. Many rows: whole tiles, since every block more reads all inputs once more.
#define OUTS(N) (R <= 8 ? (CEIL(N, GRID) < 48 ? CEIL(N, GRID) : 48) : 16 * (CEIL((N) / 16, GRID) < 3 ? CEIL((N) / 16, GRID) : 3))
#define TILES(N) CEIL(OUTS(N), 16)
#define GROUPS(N) CEIL(N, OUTS(N))
constexpr int PARTS = GROUPS(D) * TILES(D);  // of x, each with sums of its own
constexpr int OWN = CEIL(GROUPS(D), GRID);  // groups of x that one block owns
constexpr int OWN_WIDTH = TILES(D) * 16;
constexpr int STAT_ROWS = 32, STAT_TILES = 128;
constexpr int PART = 68;  // of a softmax: top, total, two unused, 64 sums
constexpr int PAD = 4;    // keeps the threads of a warp on different banks
#define RED_STRIDE(MT) ((MT) * 16 + PAD)
constexpr int MAX_SPLITS = 6;  // blocks that share the audio positions of one head
constexpr float LOG2E = 1.4426950408889634f;
static_assert(PARTS <= STAT_TILES, "x has more parts than there are sums");

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
  float2* stats;             // [STAT_TILES][STAT_ROWS]: sums of x_copy and of its squares by part of x
  float* last_stats;         // the same behind the last layer: [2][STAT_ROWS][STAT_TILES]
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
  const int* tokens;         // [R, T]
  const u16* token_table;    // [V, D]
  const u16* position_table; // [T, D]
  float* parts;              // [R * H * MAX_SPLITS, PART]
  u32* barrier;              // arrivals so far; arrivals before this launch
  u64 self_stride, cross_stride, scale_stride;
};

constexpr int ITEMS = CEIL(R * H, GRID) + 1;
constexpr int RED_FLOATS_1 = NW * R * RED_STRIDE(3);
constexpr int RED_FLOATS_2 = (ITEMS > NW ? ITEMS : NW) * NW * PART;
constexpr int RED_FLOATS = RED_FLOATS_1 > RED_FLOATS_2 ? RED_FLOATS_1 : RED_FLOATS_2;
constexpr bool JOINED = R <= 4;  // blocks share heads, and whoever reads what was attended joins their parts

struct Shared {
  Projection* projections;  // [2][6] of this layer and the next
  float* red;               // what an operation adds up: [NW][R][RED_STRIDE] or [items][NW][PART]
  float* queries;           // [ITEMS][PART]: a query, the scales of its keys and values
  float* own_x;             // [OWN][R][OWN_WIDTH]
  float* vectors;           // [2][3][48]: scale, bias, colsum of this block's outputs
  float2* sums;             // [NW][R]: of x and its squares, by warp
  float2* norm;             // [R]: mean, 1 / deviation
  u16* attended;            // [R][D] if JOINED
  int* alive;               // [R] rows that decode; [R] positions by row; [R] rank by row; [1] how many
};

DEVICE Shared carve(unsigned char* base) {
  Shared s;
  s.projections = (Projection*)base;
  s.red = (float*)(s.projections + 12);
  s.queries = s.red + RED_FLOATS;
  s.own_x = s.queries + ITEMS * PART;
  s.vectors = s.own_x + OWN * R * OWN_WIDTH;
  s.sums = (float2*)(s.vectors + 2 * 3 * 48);
  s.norm = s.sums + NW * R;
  s.attended = (u16*)(s.norm + R + R % 2);
  s.alive = (int*)(s.attended + (JOINED ? R * D : 0));
  return s;
}
constexpr int SHARED_BYTES = 12 * sizeof(Projection) + 4 * (RED_FLOATS + ITEMS * PART + OWN * R * OWN_WIDTH + 2 * 3 * 48) +
                             8 * (NW * R + R + R % 2) + (JOINED ? 2 * R * D : 0) + 4 * (3 * R + 1);

// --- the barrier ------------------------------------------------------------------------------------------------------
//
// One warp of a block, the guard, tells the grid that the block is through and looks for the others. The rest ask for
// the next operation's weights meanwhile: their loads would otherwise stand in front of the guard's.

enum { WORK = 1, LEAVE = 2, ENTER = 3 };  // barriers of a block: among workers; workers to guard; guard to workers

DEVICE void work_sync() { meet_at(WORK, WORKERS); }
DEVICE void leave() { arrive_at(LEAVE, THREADS); }
DEVICE void enter() { meet_at(ENTER, THREADS); }

constexpr int BARRIERS = 8 * L;

// By one warp: the addresses of a layer's weights, in the place of those of two layers before.
DEVICE void fetch_projections(const Arguments& a, const Shared& s, int layer) {
  const int words = 6 * sizeof(Projection) / 8;
  const int lane = threadIdx.x & 31;
  if (lane < words && layer < L)
    ((u64*)(s.projections + (layer & 1) * 6))[lane] = ((const u64*)(a.layers + (u64)layer * 6))[lane];
}

DEVICE void guard(const Arguments& a, const Shared& s) {
  const bool first = threadIdx.x == WORKERS;
  const u32 started = a.barrier[1];
  u32 target = started;
  for (int i = 0; i < BARRIERS; i++) {
    if (i % 8 == 1) fetch_projections(a, s, i / 8 + 1);  // while the workers are in the first operation of a layer
    meet_at(LEAVE, THREADS);
    target += GRID;
    if (first) {
      add_release(a.barrier);
      while ((int)(load_acquire(a.barrier) - target) < 0) {
      }
    }
    __syncwarp();
    arrive_at(ENTER, THREADS);
  }
  // Everybody has read the count by now, for everybody has passed a barrier since.
  if (blockIdx.x == 0 && first) a.barrier[1] = target;
}

// --- projections ------------------------------------------------------------------------------------------------------

template <int MT>
struct Chunk {  // a warp's weights: 128 inputs of MT * 16 outputs
  uint4 w[MT][BLOCKS][2];
  u16 scale[MT][2];
};

// OUT: outputs of a block. Lanes whose output is none of them take zeros.
template <int K, int N, int OUT>
DEVICE void load_chunk(Chunk<CEIL(OUT, 16)>& c, const Projection& p, int first_row, int chunk) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const unsigned char* at =
      fresh(p.weight + (u64)(first_row + g) * ROW_BYTES(K) + chunk * (BLOCKS * 64) + t * 16);
  const u16* scale = (const u16*)p.scale + (first_row + g) * (K / CHUNK) + chunk;
#pragma unroll
  for (int m = 0; m < CEIL(OUT, 16); m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int o = m * 16 + half * 8;
      const bool inside = (o + 8 <= OUT || o + g < OUT) && (N % OUT == 0 || first_row + o + g < N);
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        if (inside)
          c.w[m][b][half] = load_stream(at + o * ROW_BYTES(K) + b * 64);
        else
          c.w[m][b][half] = make_uint4(0, 0, 0, 0);
      }
      if (FORMAT == 2) c.scale[m][half] = inside ? scale[o * (K / CHUNK)] : (u16)0;
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

DEVICE u32 byte_halves(u32 bytes, bool high) {
  return subtract_half2(select_bytes(bytes, 0x64646464u, high ? 0x4342 : 0x4140), 0x64806480u);
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

// Sums of x by its makers: a warp takes every NW-th group of parts, a lane a row.
struct NormSums {
  static constexpr int ROWS = R > 16 ? 32 : R > 8 ? 16 : R > 4 ? 8 : R > 2 ? 4 : R;
  static constexpr int SUBS = 32 / ROWS, EACH = CEIL(PARTS, NW * SUBS);
  float2 sum[EACH];

  DEVICE void ask(const Arguments& a) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int tile = (i * NW + warp) * SUBS + lane / ROWS;
      sum[i] = make_float2(0.0f, 0.0f);
      if (tile < PARTS && lane % ROWS < R) sum[i] = load_float2(a.stats + tile * STAT_ROWS + lane % ROWS);
    }
  }

  DEVICE void leave(const Shared& s) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float total = 0.0f, square = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) total += sum[i].x, square += sum[i].y;
#pragma unroll
    for (int mask = ROWS; mask < 32; mask *= 2) total += shuffle_xor(total, mask), square += shuffle_xor(square, mask);
    if (lane < R) s.sums[warp * R + lane] = make_float2(total, square);
  }
};

// Behind a barrier of the block: mean and deviation of every row.
DEVICE void join_norm(const Shared& s) {
  const int r = threadIdx.x;
  if (r >= R) return;
  float total = 0.0f, square = 0.0f;
#pragma unroll
  for (int w = 0; w < NW; w++) total += s.sums[w * R + r].x, square += s.sums[w * R + r].y;
  const float mean = total * (1.0f / D);
  s.norm[r] = make_float2(mean, rsqrtf(square * (1.0f / D) - mean * mean + EPS));
}

// A part of x: a rounded copy for the next operation, and the copy's sums. A warp's lanes come together; those of one
// row's 16 outputs lie side by side.
DEVICE void leave_x(const Arguments& a, float v, bool inside, int r, int group, int o, bool last) {
  const int n = group * OUTS(D) + o, part = group * TILES(D) + o / 16;
  const u16 copy = to_16(v);
  float sum = inside ? from_16(copy) : 0.0f, square = sum * sum;
  if (inside) {
    a.x_copy[r * D + n] = copy;
    if (last) a.x[r * D + n] = v;
  }
#pragma unroll
  for (int mask = 1; mask < 16; mask *= 2) sum += shuffle_xor(sum, mask), square += shuffle_xor(square, mask);
  if (!inside || o % 16 != 0) return;
  a.stats[part * STAT_ROWS + r] = make_float2(sum, square);
  if (last) {
    a.last_stats[r * STAT_TILES + part] = sum;
    a.last_stats[(STAT_ROWS + r) * STAT_TILES + part] = square;
  }
}

template <int K, int N, int KIND, int SIDE, bool IN_SHARED = false>
struct Linear {  // SIDE: which of two places its vectors take, so that they may be written while the last ones are read
  static constexpr int OUT = OUTS(N), MT = TILES(N), GROUPS_N = GROUPS(N);
  static constexpr int CHUNKS = K / CHUNK;
  static constexpr int MINE = CEIL(CHUNKS, NW);                  // chunks of a warp
  static constexpr int EARLY = NT == 1 ? 3 : 2;
  static constexpr int AHEAD = MINE < EARLY ? MINE : EARLY;      // chunks whose weights are asked for early
  static constexpr int HALVES = 2 * MINE;
  static constexpr int DEEP = NT <= 2 ? 4 : FORMAT ? 3 : 2;                  // half chunks whose inputs are asked for early
  static constexpr int DEPTH = HALVES < DEEP ? HALVES : DEEP;
  static constexpr bool NORMED = KIND != RESIDUAL;
  Chunk<MT> chunks[AHEAD];

  // What may be read before the barrier: weights, and the vectors of this block's outputs.
  DEVICE void ask(const Projection& p, const Shared& s, int group) {
    const int warp = threadIdx.x >> 5;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (group < GROUPS_N && has_chunk<CHUNKS>(warp + i * NW))
        load_chunk<K, N, OUT>(chunks[i], p, group * OUT, warp + i * NW);
      else
        clear_chunk<MT>(chunks[i]);
    }
    const int o = threadIdx.x;
    float* vectors = s.vectors + SIDE * 144;
    if (group < GROUPS_N && o < OUT) {
      const int n = group * OUT + o;
      const bool inside = n < N;
      if (FORMAT == 1) vectors[o] = inside ? ((const float*)p.scale)[n] : 0.0f;
      vectors[48 + o] = inside ? p.bias[n] : 0.0f;
      if (NORMED) vectors[96 + o] = inside ? p.colsum[n] : 0.0f;
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
          load_chunk<K, N, OUT>(chunks[i % AHEAD], p, group * OUT, chunk + AHEAD * NW);
        const int next = h + DEPTH;
        if (next < HALVES && has_chunk<CHUNKS>(warp + next / 2 * NW))
          load_inputs<K, IN_SHARED>(b[h % DEPTH], x, warp + next / 2 * NW, next & 1);
      }
    }
  }

  // Products of this block's outputs with all rows, added up over the warps, then the epilogue. own: which of the
  // block's parts of x this is.
  DEVICE void run(const Arguments& a, const Shared& s, const Projection& p, const u16* x, int group, int own,
                  int layer, bool last) {
    if (group >= GROUPS_N) return;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    NormSums sums;
    if (NORMED) sums.ask(a);
    float acc[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][n][i] = 0.0f;
    products(acc, p, x, group);
    constexpr int stride = RED_STRIDE(MT);
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
    if (NORMED) sums.leave(s);
    work_sync();
    if (NORMED) {
      join_norm(s);
      work_sync();
    }
    for (int e0 = warp * 32; e0 < R * MT * 16; e0 += WORKERS) finish(a, s, group, own, layer, last, e0 + lane);
  }

  // One output of one row. A warp's lanes come together.
  DEVICE void finish(const Arguments& a, const Shared& s, int group, int own, int layer, bool last, int e) {
    const int r = e / (MT * 16), o = e % (MT * 16), n = group * OUT + o;
    constexpr int stride = RED_STRIDE(MT);
    const float* vectors = s.vectors + SIDE * 144;
    const bool inside = r < R && o < OUT && n < N;
    float v = 0.0f;
    if (inside) {
#pragma unroll
      for (int w = 0; w < NW; w++) v += s.red[(w * R + r) * stride + o];
      if (FORMAT == 1) v *= vectors[o];
      if (NORMED) v = (v - s.norm[r].x * vectors[96 + o]) * s.norm[r].y;
      v += vectors[48 + o];
    }
    if (KIND == QKV) {
      if (inside) store_qkv(a, layer, s.alive[R + r], r, n, v);
    } else if (KIND == QUERY) {
      if (inside) a.query[r * D + n] = v;
    } else if (KIND == EXPAND) {
      if (inside) a.inner[r * F + n] = to_16(0.5f * v * (1.0f + erff(v * 0.70710678118654752f)));
    } else {
      if (inside) {
        float* own_x = s.own_x + (own * R + r) * OWN_WIDTH + o;
        v += *own_x;
        *own_x = v;
      }
      leave_x(a, v, inside, r, group, o, last);
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

// --- attention --------------------------------------------------------------------------------------------------------
//
// Lane (g, t) of a warp takes positions g and g + 8 of every 16, and 16 of a head's 64 numbers: 16 t .. of bytes, else
// 8 t .. and 32 + 8 t .. . Products with the query come from the matrix units, where every column of B holds the query:
// even columns its upper 11 bits, odd ones the rest, so that a score is as exact as in float32.

template <bool BYTES>
DEVICE int dim_of(int t, int i) { return BYTES ? 16 * t + i : 8 * t + (i < 8 ? i : 24 + i); }

struct Softmax {
  float top, total, acc[16];
  DEVICE void clear() {
    top = -1.0e30f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) acc[i] = 0.0f;
  }
};

struct Query {
  u32 part[8];  // two numbers each, in the order of dim_of
  float k_scale, v_scale;

  template <bool BYTES>
  DEVICE void read(const float (&q)[16]) {
    const bool rest = (threadIdx.x >> 2) & 1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u16 pair[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float v = q[2 * i + j];
        const u16 upper = to_16(v);
        pair[j] = rest ? to_16(v - from_16(upper)) : upper;
      }
      part[i] = pair[0] | ((u32)pair[1] << 16);
    }
  }
};

// Scores of positions g and g + 8. k: one uint4 a position for bytes, two for floats.
template <bool BYTES>
DEVICE void scores(float& low, float& high, const uint4* k, const Query& q) {
  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int s = 0; s < 4; s++) {
    if (BYTES) {
      const u32 a = word(k[0], s), b = word(k[1], s);
      mma(c, byte_halves(a, false), byte_halves(b, false), byte_halves(a, true), byte_halves(b, true), q.part[2 * s],
          q.part[2 * s + 1]);
    } else {
      const int w = 2 * (s & 1);
      mma(c, word(k[s / 2], w), word(k[2 + s / 2], w), word(k[s / 2], w + 1), word(k[2 + s / 2], w + 1), q.part[2 * s],
          q.part[2 * s + 1]);
    }
  }
  low = (c[0] + c[1]) * q.k_scale, high = (c[2] + c[3]) * q.k_scale;
}

// acc += the values of N positions times their weights. v: as k, position by position.
template <int N, bool BYTES>
DEVICE void add_values(float (&acc)[16], const uint4* v, const float (&weight)[N]) {
  u32 both[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    const u16 w = to_16(weight[n]);
    both[n] = w | ((u32)w << 16);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
#if BF16
#pragma unroll
    for (int n = 0; n < N; n++) {
      const u32 pair = word(v[2 * n + i / 4], i % 4);
      acc[2 * i] += weight[n] * low_float(pair), acc[2 * i + 1] += weight[n] * high_float(pair);
    }
#else
    u32 sum = 0;  // of few positions in 16 bits, as a weight is rounded to them anyway
#pragma unroll
    for (int n = 0; n < N; n++) {
      const u32 pair = BYTES ? byte_halves(word(v[n], i / 2), i & 1) : word(v[2 * n + i / 4], i % 4);
      sum = n == 0 ? multiply_half2(pair, both[n]) : fma_half2(pair, both[n], sum);
    }
    acc[2 * i] += half_to_float((u16)(sum & 0xffff)), acc[2 * i + 1] += half_to_float((u16)(sum >> 16));
#endif
  }
}

// Four uint4 of keys and of values: 16 positions of floats, 32 of bytes. seen: bit i = this lane's i-th position counts.
template <bool BYTES>
DEVICE void attend(Softmax& soft, const uint4 (&k)[4], const uint4 (&v)[4], const Query& q, u32 seen) {
  constexpr int N = BYTES ? 4 : 2;
  float score[N], top = soft.top;
#pragma unroll
  for (int n = 0; n < N; n += 2) scores<BYTES>(score[n], score[n + 1], k + (BYTES ? n : 0), q);
#pragma unroll
  for (int n = 0; n < N; n++) {
    score[n] = (seen >> n) & 1 ? score[n] : -1.0e30f;
    top = fmaxf(top, score[n]);
  }
  const float keep = exp2_fast(soft.top - top);
  soft.top = top;
  soft.total *= keep;
#pragma unroll
  for (int i = 0; i < 16; i++) soft.acc[i] *= keep;
#pragma unroll
  for (int n = 0; n < N; n++) {
    score[n] = (seen >> n) & 1 ? exp2_fast(score[n] - top) : 0.0f;
    soft.total += score[n];
  }
  add_values<N, BYTES>(soft.acc, v, score);
}

// Lanes MASK apart add up: each keeps N of its 2 N sums. Returns where those it keeps begin.
template <int MASK, int N>
DEVICE int halve(float (&acc)[16]) {
  const bool upper = threadIdx.x & MASK;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const float given = upper ? acc[i] : acc[i + N], kept = upper ? acc[i + N] : acc[i];
    acc[i] = kept + shuffle_xor(given, MASK);
  }
  return upper ? N : 0;
}

// Join the eight groups of a warp and leave the warp's part in out[PART]. Each step halves what a lane holds.
template <bool BYTES>
DEVICE void leave_part(Softmax& soft, float scale, float* out) {
  const int lane = threadIdx.x & 31, t = lane & 3;
  float top = soft.top;
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) top = fmaxf(top, shuffle_xor(top, mask));
  const float keep = exp2_fast(soft.top - top);
  float total = soft.total * keep;
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
#pragma unroll
  for (int i = 0; i < 16; i++) soft.acc[i] *= keep * scale;
  int first = halve<16, 8>(soft.acc);
  first += halve<8, 4>(soft.acc);
  first += halve<4, 2>(soft.acc);
  *(float2*)(out + 4 + dim_of<BYTES>(t, first)) = make_float2(soft.acc[0], soft.acc[1]);
  if (lane == 0) *(float2*)out = make_float2(top, total);
}

// Sum i (0 .. 63) of n_parts parts, and their total.
DEVICE void join(const float* parts, int n_parts, int i, float& top, float& total, float& sum) {
  top = -1.0e30f, total = 0.0f, sum = 0.0f;
  for (int p = 0; p < n_parts; p++) top = fmaxf(top, parts[p * PART]);
  for (int p = 0; p < n_parts; p++) {
    const float share = exp2_fast(parts[p * PART] - top);
    total += share * parts[p * PART + 1], sum += share * parts[p * PART + 4 + i];
  }
}

DEVICE float over(float sum, float total) { return total > 0.0f ? divide(sum, total) : 0.0f; }

// A cell is a head of a row that decodes.
DEVICE void find_cell(const Shared& s, int cell, int& row, int& head) { row = s.alive[cell / H], head = cell % H; }

struct SelfAttention {
  uint4 k[3][4], v[3][4];
  int row, head, position, warps, sub, slot;
  bool active;

  DEVICE int place(int round, int half) { return (round * warps + sub) * 16 + ((threadIdx.x & 31) >> 2) + 8 * half; }

  // Warps that have positions to look at.
  DEVICE int sharers(int warps, int position) { return position / 16 + 1 < warps ? position / 16 + 1 : warps; }

  DEVICE void choose(const Shared& s, int n_cells, int first) {
    const int warp = threadIdx.x >> 5, each = CEIL(n_cells, GRID);
    warps = each >= NW ? 1 : each < 2 ? NW : NW / each;
    slot = warp / warps, sub = warp % warps;
    const int cell = first + slot * GRID + blockIdx.x;
    row = head = position = 0;
    active = slot < NW / warps && cell < n_cells;
    if (active) {
      find_cell(s, cell, row, head);
      position = s.alive[R + row];
      active = sub * 16 <= position;
    }
  }

  // Positions of a round up to `last`; only_last: just that one.
  template <int B>
  DEVICE void ask(const Arguments& a, int layer, int round, int last, bool only_last) {
    const u64 base = layer * a.self_stride + ((u64)row * H + head) * T * 64 + (threadIdx.x & 3) * 8;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int p = place(round, half);
      const bool wanted = active && (only_last ? p == last : p <= last);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (wanted) {
          k[B][2 * half + i] = load_cached(a.self_keys + base + (u64)p * 64 + 32 * i);
          v[B][2 * half + i] = load_cached(a.self_values + base + (u64)p * 64 + 32 * i);
        } else if (!only_last) {
          k[B][2 * half + i] = v[B][2 * half + i] = make_uint4(0, 0, 0, 0);
        }
      }
    }
  }

  // Positions before the newest are in the cache already.
  DEVICE void ask_early(const Arguments& a, int layer) {
    ask<0>(a, layer, 0, position - 1, false);
    ask<1>(a, layer, 1, position - 1, false);
    ask<2>(a, layer, 2, position - 1, false);
  }

  template <int B>
  DEVICE void take(const Arguments& a, int layer, int round, Softmax& soft, const Query& q) {
    if ((round * warps + sub) * 16 > position) return;
    u32 seen = 0;
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (place(round, half) <= position) seen |= 1u << half;
    attend<false>(soft, k[B], v[B], q, seen);
    ask<B>(a, layer, round + 3, position, false);
  }

  DEVICE void run(const Arguments& a, const Shared& s, int layer) {
    if (active) {
      ask<0>(a, layer, 0, position, true);
      ask<1>(a, layer, 1, position, true);
      ask<2>(a, layer, 2, position, true);
      const float* query = a.query + row * D + head * 64;
      float numbers[16];
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const uint4 four = load_cached(query + dim_of<false>(threadIdx.x & 3, i));
#pragma unroll
        for (int j = 0; j < 4; j++) numbers[i + j] = as_float(word(four, j)) * LOG2E;
      }
      Query q;
      q.read<false>(numbers);
      q.k_scale = 1.0f;
      Softmax soft;
      soft.clear();
      for (int round = 0; (round * warps + sub) * 16 <= position; round += 3) {
        take<0>(a, layer, round, soft, q);
        take<1>(a, layer, round + 1, soft, q);
        take<2>(a, layer, round + 2, soft, q);
      }
      leave_part<false>(soft, 1.0f, s.red + (slot * warps + sub) * PART);
    }
    work_sync();
    // The warps of a cell share out its 64 sums.
    if (active)
      for (int i = sub * 32 + (threadIdx.x & 31); i < 64; i += sharers(warps, position) * 32) {
        float top, total, sum;
        join(s.red + slot * warps * PART, sharers(warps, position), i, top, total, sum);
        a.attended[row * D + head * 64 + i] = to_16(over(sum, total));
      }
  }
};

// Which cells and positions of the audio this block takes: the same in every layer.
struct Share {
  int splits, positions, chunks, n_items, n_chunks;
};

constexpr int CROSS_CHUNK = CROSS8 ? 32 : 16;  // positions that a warp takes at once

DEVICE Share share_out(int n_cells) {
  Share share;
  share.splits = 1;
  if (JOINED) {
    int best = CEIL(n_cells, GRID) * 60;
    for (int n = 2; n <= MAX_SPLITS; n++) {
      const int cost = CEIL(n_cells * n, GRID) * 60 / n;
      if (cost < best && CEIL(n_cells * n, GRID) <= ITEMS) best = cost, share.splits = n;
    }
  }
  const int n_items = n_cells * share.splits;
  share.positions = CEIL(S, share.splits);
  share.chunks = CEIL(share.positions, NW * CROSS_CHUNK);
  share.n_items = blockIdx.x < n_items ? CEIL(n_items - (int)blockIdx.x, GRID) : 0;
  share.n_chunks = share.n_items * share.chunks;
  return share;
}

struct CrossAttention {
  static constexpr bool BYTES = CROSS8;
  static constexpr int ROW = BYTES ? 64 : 128;  // bytes of a position
  uint4 k[2][4], v[2][4];
  // The chunks that are asked for and taken next: item, and chunk of it.
  int asked_item, asked_chunk, item, chunk;

  DEVICE int place(const Share& share, int split, int chunk, int i) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    return split * share.positions + (chunk * NW + warp) * CROSS_CHUNK + (lane >> 2) + 8 * i;
  }
  DEVICE int end_of(const Share& share, int split) {
    return (split + 1) * share.positions < S ? (split + 1) * share.positions : S;
  }
  DEVICE void start() { asked_item = asked_chunk = item = chunk = 0; }

  template <int B>
  DEVICE void ask(const Arguments& a, const Shared& s, const Share& share, int layer) {
    if (asked_item >= share.n_items) {
#pragma unroll
      for (int i = 0; i < 4; i++) k[B][i] = v[B][i] = make_uint4(0, 0, 0, 0);
      return;
    }
    const int index = blockIdx.x + asked_item * GRID, cell = JOINED ? index / share.splits : index;
    const int split = JOINED ? index % share.splits : 0, end = end_of(share, split);
    int row, head;
    find_cell(s, cell, row, head);
    const u64 base = layer * a.cross_stride + ((u64)row * H + head) * (S * ROW) + (threadIdx.x & 3) * 16;
    const int first = place(share, split, asked_chunk, 0);
    const unsigned char* keys = fresh(a.cross_keys + base + first * ROW);
    const unsigned char* values = fresh(a.cross_values + base + first * ROW);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int n = BYTES ? i : i / 2, at = 8 * n * ROW + (BYTES ? 0 : i % 2 * 64);
      k[B][i] = first + 8 * n < end ? load_stream(keys + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int n = BYTES ? i : i / 2, at = 8 * n * ROW + (BYTES ? 0 : i % 2 * 64);
      v[B][i] = first + 8 * n < end ? load_stream(values + at) : make_uint4(0, 0, 0, 0);
    }
    if (++asked_chunk == share.chunks) asked_chunk = 0, asked_item++;
  }

  template <int B>
  DEVICE void take(const Arguments& a, const Shared& s, const Share& share, int layer, Softmax& soft, Query& q) {
    if (item >= share.n_items) return;
    if (chunk == 0) {
      float numbers[16];
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const float4 four = *(const float4*)(s.queries + item * PART + dim_of<BYTES>(threadIdx.x & 3, i));
        numbers[i] = four.x, numbers[i + 1] = four.y, numbers[i + 2] = four.z, numbers[i + 3] = four.w;
      }
      q.read<BYTES>(numbers);
      q.k_scale = s.queries[item * PART + 64], q.v_scale = s.queries[item * PART + 65];
      soft.clear();
    }
    const int index = blockIdx.x + item * GRID, split = JOINED ? index % share.splits : 0;
    const int first = place(share, split, chunk, 0), end = end_of(share, split);
    u32 seen = 0;
#pragma unroll
    for (int n = 0; n < (BYTES ? 4 : 2); n++)
      if (first + 8 * n < end) seen |= 1u << n;
    attend<BYTES>(soft, k[B], v[B], q, seen);
    ask<B>(a, s, share, layer);
    if (++chunk == share.chunks) {
      leave_part<BYTES>(soft, q.v_scale, s.red + (item * NW + (threadIdx.x >> 5)) * PART);
      chunk = 0, item++;
    }
  }

  DEVICE void read_queries(const Arguments& a, const Shared& s, const Share& share, int layer) {
    for (int e = threadIdx.x; e < share.n_items * 64; e += WORKERS) {
      const int index = blockIdx.x + e / 64 * GRID;
      int row, head;
      find_cell(s, JOINED ? index / share.splits : index, row, head);
      s.queries[e / 64 * PART + e % 64] = load_float(a.query + row * D + head * 64 + e % 64) * LOG2E;
      if (e % 64 < 2) {
        const float* scales = a.cross_scale + layer * a.scale_stride + (row * H + head) * 2;
        s.queries[e / 64 * PART + 64 + e % 64] = CROSS8 ? scales[e % 64] : 1.0f;
      }
    }
    work_sync();
  }

  DEVICE void run(const Arguments& a, const Shared& s, const Share& share, int layer) {
    read_queries(a, s, share, layer);
    Softmax soft;
    soft.clear();
    Query q;
#pragma unroll
    for (int i = 0; i < 8; i++) q.part[i] = 0;
    q.k_scale = q.v_scale = 1.0f;
    while (item < share.n_items) {
      take<0>(a, s, share, layer, soft, q);
      take<1>(a, s, share, layer, soft, q);
    }
    work_sync();
    for (int e = threadIdx.x; e < share.n_items * 64; e += WORKERS) {
      const int index = blockIdx.x + e / 64 * GRID, i = e % 64;
      float top, total, sum;
      join(s.red + e / 64 * NW * PART, NW, i, top, total, sum);
      if (JOINED) {
        float* out = a.parts + (u64)index * PART;
        out[4 + i] = sum;
        if (i == 0) out[0] = top, out[1] = total;
      } else {
        int row, head;
        find_cell(s, index, row, head);
        a.attended[row * D + head * 64 + i] = to_16(over(sum, total));
      }
    }
  }
};

// Where blocks share heads, each warp joins the parts of the two heads that it takes as inputs: a barrier less.
DEVICE void join_attended(const Arguments& a, const Shared& s, const Share& share) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int chunk = warp; chunk < D / CHUNK; chunk += NW)
    for (int r = 0; r < R; r++) {
      if (s.alive[2 * R + r] < 0) continue;
      const int cell = s.alive[2 * R + r] * H + chunk * 2 + lane / 16;
      const float* parts = a.parts + (u64)cell * share.splits * PART;
      uint4 sums[MAX_SPLITS];
      float2 tops[MAX_SPLITS];
      float top = -1.0e30f, total = 0.0f, out[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int p = 0; p < MAX_SPLITS; p++) {
        tops[p] = make_float2(-1.0e30f, 0.0f), sums[p] = make_uint4(0, 0, 0, 0);
        if (p < share.splits) {
          tops[p] = load_float2((const float2*)(parts + p * PART));
          sums[p] = load_cached(parts + p * PART + 4 + lane % 16 * 4);
        }
      }
#pragma unroll
      for (int p = 0; p < MAX_SPLITS; p++) top = fmaxf(top, tops[p].x);
#pragma unroll
      for (int p = 0; p < MAX_SPLITS; p++) {
        const float share_of = exp2_fast(tops[p].x - top);
        total += share_of * tops[p].y;
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] += share_of * as_float(word(sums[p], i));
      }
      u16* at = s.attended + r * D + chunk * CHUNK + lane * 4;
#pragma unroll
      for (int i = 0; i < 4; i++) at[i] = to_16(over(out[i], total));
    }
  __syncwarp();
}

// --- the step ---------------------------------------------------------------------------------------------------------

// Rows that decode and where they are; this block's part of x, which is the embedding.
DEVICE int prepare(const Arguments& a, const Shared& s) {
  if (threadIdx.x < 32) fetch_projections(a, s, 0);
  if (threadIdx.x == 0) {
    int n = 0;
    for (int r = 0; r < R; r++) {
      s.alive[R + r] = a.position[r];
      s.alive[2 * R + r] = a.finished[r] == 0 ? n : -1;
      if (a.finished[r] == 0) s.alive[n++] = r;
    }
    s.alive[3 * R] = n;
  }
  if (JOINED)
    for (int e = threadIdx.x; e < R * D / 2; e += WORKERS) ((u32*)s.attended)[e] = 0;
  work_sync();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int own = 0; own < OWN; own++) {
    const int group = blockIdx.x + own * GRID;
    if (group >= GROUPS(D)) break;
    for (int e0 = warp * 32; e0 < R * OWN_WIDTH; e0 += WORKERS) {
      const int r = (e0 + lane) / OWN_WIDTH, o = (e0 + lane) % OWN_WIDTH, n = group * OUTS(D) + o;
      const bool inside = r < R && o < OUTS(D) && n < D;
      float v = 0.0f;
      if (inside) {
        const int position = s.alive[R + r], token = a.tokens[r * T + position];
        v = from_16(a.token_table[(u64)token * D + n]) + from_16(a.position_table[position * D + n]);
        s.own_x[(own * R + r) * OWN_WIDTH + o] = v;
      }
      leave_x(a, v, inside, r, group, o, false);
    }
  }
  return s.alive[3 * R] * H;
}

// A projection from the barrier in front of it on. Its groups may be more than the blocks: the first is asked for before
// the barrier, the rest as they come.
template <typename Linear>
DEVICE void project(Linear& linear, const Arguments& a, const Shared& s, const Projection& p, const u16* x, int layer,
                    bool last) {
  linear.run(a, s, p, x, blockIdx.x, 0, layer, last);
  for (int own = 1; own < CEIL(Linear::GROUPS_N, GRID); own++) {
    work_sync();
    linear.ask(p, s, blockIdx.x + own * GRID);
    work_sync();
    linear.run(a, s, p, x, blockIdx.x + own * GRID, own, layer, last);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decoder_layers(Arguments a) {
  const Shared s = carve(shared_memory);
  if (threadIdx.x >= WORKERS) {
    guard(a, s);
    return;
  }
  const int n_cells = prepare(a, s);
  const Share share = share_out(n_cells);
  leave();
#pragma unroll 1
  for (int layer = 0; layer < L; layer++) {
    const Projection* p = s.projections + (layer & 1) * 6;
    {
      Linear<D, 3 * D, QKV, 0> linear;
      linear.ask(p[0], s, blockIdx.x);
      enter();
      project(linear, a, s, p[0], a.x_copy, layer, false);
      leave();
    }
    {
      SelfAttention attention;
      attention.choose(s, n_cells, 0);
      attention.ask_early(a, layer);
      enter();
      for (int first = 0; first < n_cells; first += GRID * (NW / attention.warps)) {
        if (first > 0) {
          work_sync();
          attention.choose(s, n_cells, first);
          attention.ask_early(a, layer);
        }
        attention.run(a, s, layer);
      }
      leave();
    }
    {
      Linear<D, D, RESIDUAL, 1> linear;
      linear.ask(p[1], s, blockIdx.x);
      enter();
      project(linear, a, s, p[1], a.attended, layer, false);
      leave();
    }
    {
      Linear<D, D, QUERY, 0> linear;
      linear.ask(p[2], s, blockIdx.x);
      enter();
      project(linear, a, s, p[2], a.x_copy, layer, false);
      leave();
    }
    {
      CrossAttention cross;
      cross.start();
      cross.ask<0>(a, s, share, layer);
      cross.ask<1>(a, s, share, layer);
      enter();
      cross.run(a, s, share, layer);
      leave();
    }
    {
      Linear<D, D, RESIDUAL, 1, JOINED> linear;
      linear.ask(p[3], s, blockIdx.x);
      enter();
      if (JOINED) join_attended(a, s, share);
      project(linear, a, s, p[3], JOINED ? s.attended : a.attended, layer, false);
      leave();
    }
    {
      Linear<D, F, EXPAND, 0> linear;
      linear.ask(p[4], s, blockIdx.x);
      enter();
      project(linear, a, s, p[4], a.x_copy, layer, false);
      leave();
    }
    {
      Linear<F, D, RESIDUAL, 1> linear;
      linear.ask(p[5], s, blockIdx.x);
      enter();
      project(linear, a, s, p[5], a.inner, layer, layer == L - 1);
      if (layer < L - 1) leave();
    }
  }
}
