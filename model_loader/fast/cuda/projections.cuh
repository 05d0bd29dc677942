// Linear layers of a step on the matrix units, LayerNorm in front and epilogue behind them: see layers.cu.
#pragma once
#include "block.cuh"

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
