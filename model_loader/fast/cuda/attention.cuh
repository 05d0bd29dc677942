// Attention of a step, over the text so far and over the audio: see layers.cu.
#pragma once
#include "projections.cuh"

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
