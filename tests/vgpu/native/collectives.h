/* Steps that a whole warp takes together.  Operands are numbered in the order of the handler's comment. */
#include "memory.h"
#include "numbers.h"

/* Lanes that the instruction names have to be here; those that exited are excused. */
INLINE void meet(Block *block, Warp *warp, u32 mask, u32 members, const Step *step) {
  if (UNLIKELY(members & warp->live & ~mask))
    fail(block, DIVERGED, warp->first_thread + __builtin_ctz(mask), step->index, members, mask);
}
#define FIRST(row) ((row)[__builtin_ctz(mask)])

/* result, whether in range, value, lane or distance, clamp and segments, members */
enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BUTTERFLY, SHUFFLE_INDEX };
SHARED_CODE void shuffle(Block *block, Warp *warp, u32 mask, const Step *step, int mode, int has_result, int has_range) {
  u32 result[32];
  u8 in_range[32];
  const u32 *value = ROW32(2), *distance = ROW32(3), *limits = ROW32(4);
  meet(block, warp, mask, FIRST(ROW32(5)), step);
  FOR_LANES(mask) {
    int by = distance[lane] & 31, clamp = limits[lane] & 31, segment = limits[lane] >> 8 & 31;
    int last = (lane & segment) | (clamp & ~segment), first = lane & segment, from;
    switch (mode) {
      case SHUFFLE_UP: from = lane - by; in_range[lane] = from >= last; break;
      case SHUFFLE_DOWN: from = lane + by; in_range[lane] = from <= last; break;
      case SHUFFLE_BUTTERFLY: from = lane ^ by; in_range[lane] = from <= last; break;
      default: from = first | (by & ~segment); in_range[lane] = from <= last; break;
    }
    if (!in_range[lane]) from = lane;
    result[lane] = mask >> from & 1 ? value[from] : ~0u; /* of a lane that isn't there: undefined, so poison */
  }
  FOR_LANES(mask) {
    if (has_result) ROW32(0)[lane] = result[lane];
    if (has_range) ROW8(1)[lane] = in_range[lane];
  }
}

/* result, predicate, members */
enum Vote { VOTE_BALLOT, VOTE_ANY, VOTE_ALL, VOTE_UNIFORM };
SHARED_CODE void vote(Block *block, Warp *warp, u32 mask, const Step *step, int mode) {
  u32 ballot = 0;
  meet(block, warp, mask, FIRST(ROW32(2)), step);
  FOR_LANES(mask) ballot |= (u32)(ROW8(1)[lane] & 1) << lane;
  u32 all = ballot == mask, result = mode == VOTE_ANY ? ballot != 0 : mode == VOTE_ALL ? all : all || ballot == 0;
  FOR_LANES(mask) {
    if (mode == VOTE_BALLOT) ROW32(0)[lane] = ballot;
    else ROW8(0)[lane] = result;
  }
}

/* result, value, members */
enum Reduction { REDUCE_ADD, REDUCE_MIN_U, REDUCE_MAX_U, REDUCE_MIN_S, REDUCE_MAX_S, REDUCE_AND, REDUCE_OR, REDUCE_XOR };
SHARED_CODE void reduce(Block *block, Warp *warp, u32 mask, const Step *step, int mode) {
  meet(block, warp, mask, FIRST(ROW32(2)), step);
  u32 r = FIRST(ROW32(1));
  FOR_LANES(mask & (mask - 1)) {
    u32 v = ROW32(1)[lane];
    switch (mode) {
      case REDUCE_ADD: r += v; break;
      case REDUCE_MIN_U: r = v < r ? v : r; break;
      case REDUCE_MAX_U: r = v > r ? v : r; break;
      case REDUCE_MIN_S: r = (s32)v < (s32)r ? v : r; break;
      case REDUCE_MAX_S: r = (s32)v > (s32)r ? v : r; break;
      case REDUCE_AND: r &= v; break;
      case REDUCE_OR: r |= v; break;
      case REDUCE_XOR: r ^= v; break;
    }
  }
  FOR_LANES(mask) ROW32(0)[lane] = r;
}

/* result, whether elected, members */
SHARED_CODE void elect(Block *block, Warp *warp, u32 mask, const Step *step, int has_result) {
  int elected = __builtin_ctz(mask);
  meet(block, warp, mask, FIRST(ROW32(2)), step);
  FOR_LANES(mask) {
    if (has_result) ROW32(0)[lane] = elected;
    ROW8(1)[lane] = lane == elected;
  }
}

/* n results, address, displacement: matrices of 8 x 8 values of 16 bits; lane 8 i + r has the address of row r of the
   i-th, and gets two neighbours of it. */
SHARED_CODE void load_matrices(Block *block, Warp *warp, u32 mask, const Step *step, int n, int transposed) {
  u16 matrix[4][8][8];
  u32 address[32];
  meet(block, warp, mask, ~0u, step);
  FOR_LANES(~0u) address[lane] = ROW32(n)[lane];
  if (block->launch->counters) count_shared(block, n == 4 ? ~0u : (1u << 8 * n) - 1, address, ROW64(n + 1)[0], 16);
  for (int lane = 0; lane < 8 * n; lane++)
    memcpy(matrix[lane / 8][lane % 8], shared_memory(block, THREAD, address[lane] + (u32)ROW64(n + 1)[lane], 16, step->index, READS), 16);
  FOR_LANES(~0u) for (int i = 0; i < n; i++) {
    int a = lane / 4, b = lane % 4 * 2;
    ROW32(i)[lane] = transposed ? pack16(matrix[i][b][a], matrix[i][b + 1][a]) : pack16(matrix[i][a][b], matrix[i][a][b + 1]);
  }
}
/* n values, address, displacement: the same the other way round */
SHARED_CODE void store_matrices(Block *block, Warp *warp, u32 mask, const Step *step, int n, int transposed) {
  u16 matrix[4][8][8];
  meet(block, warp, mask, ~0u, step);
  if (block->launch->counters) count_shared(block, n == 4 ? ~0u : (1u << 8 * n) - 1, ROW32(n), ROW64(n + 1)[0], 16);
  FOR_LANES(~0u) for (int i = 0; i < n; i++) {
    int a = lane / 4, b = lane % 4 * 2;
    u32 v = ROW32(i)[lane];
    *(transposed ? &matrix[i][b][a] : &matrix[i][a][b]) = low16(v);
    *(transposed ? &matrix[i][b + 1][a] : &matrix[i][a][b + 1]) = high16(v);
  }
  for (int lane = 0; lane < 8 * n; lane++)
    memcpy(shared_memory(block, THREAD, ROW32(n)[lane] + (u32)ROW64(n + 1)[lane], 16, step->index, WRITES), matrix[lane / 8][lane % 8], 16);
}
