// Sizes, arguments and shared memory of layers.cu, and the barrier over the whole grid.
#pragma once
#include "gpu.cuh"

constexpr int D = SIZE_D, F = SIZE_F, H = SIZE_H, L = SIZE_L, T = SIZE_T, S = SIZE_S, R = SIZE_R;
constexpr int GRID = SIZE_GRID, NW = SIZE_NW;

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
