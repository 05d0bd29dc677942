// All decoder layers of one step in one launch: a persistent kernel, one block a multiprocessor, that never gives the
// GPU back between operations. Compiled at run time for one checkpoint's sizes (one_launch.py gives the macros).
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

#include "attention.cuh"

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
