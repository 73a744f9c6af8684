/* Runs a launch: its programs one after another, each program's warps in turns until they come to a barrier, and a warp's
   lanes together as long as they agree.

   Where lanes part, each has a place of its own; those that are furthest behind go on, so that they catch up with the
   others.  A meeting (barrier, shuffle, product) waits until the lanes that it names are there. */
#include "machine.h"

void *aligned_alloc(unsigned long, unsigned long);
void free(void *);

enum Special {
  TID, CTAID_X, CTAID_Y, CTAID_Z, NCTAID_X, NCTAID_Y, NCTAID_Z, NTID, LANEID, WARPID, NWARPID, ONE, ZERO,
  MASK_EQ, MASK_LT, MASK_LE, MASK_GT, MASK_GE, SHARED_SIZE
};
static u32 special(const Block *block, const Warp *warp, u32 which, u32 lane) {
  const Launch *launch = block->launch;
  switch (which) {
    case TID: return THREAD;
    case CTAID_X: case CTAID_Y: case CTAID_Z: return block->id[which - CTAID_X];
    case NCTAID_X: case NCTAID_Y: case NCTAID_Z: return launch->grid[which - NCTAID_X];
    case NTID: return launch->threads;
    case LANEID: return lane;
    case WARPID: return warp->first_thread / 32;
    case NWARPID: return block->n_warps;
    case ONE: return 1;
    case MASK_EQ: return 1u << lane;
    case MASK_LT: return (1u << lane) - 1;
    case MASK_LE: return (2u << lane) - 1;
    case MASK_GT: return ~((2u << lane) - 1);
    case MASK_GE: return ~((1u << lane) - 1);
    case SHARED_SIZE: return launch->shared_bytes;
    default: return 0;
  }
}

/* --- Lanes that part and meet --------------------------------------------------------------------------------------- */

/* A predicate's 32 bytes as bits. */
INLINE u32 lanes_where(const u8 *predicate) {
  u32 mask = 0;
  for (int i = 0; i < 4; i++) {
    u64 bytes;
    memcpy(&bytes, predicate + 8 * i, 8);
    mask |= (u32)((bytes & 0x0101010101010101ull) * 0x0102040810204080ull >> 56) << 8 * i;
  }
  return mask;
}
static void place(Warp *warp, u32 mask, u32 at) { FOR_LANES(mask) warp->lane_at[lane] = at; }
/* Go on with the lanes that are furthest behind, those apart that wait for others. */
static void select_lanes(Warp *warp) {
  u32 candidates = warp->live & ~warp->waiting;
  warp->at = ~0u;
  FOR_LANES(candidates) if (warp->lane_at[lane] < warp->at) warp->at = warp->lane_at[lane];
  warp->mask = 0;
  FOR_LANES(candidates) if (warp->lane_at[lane] == warp->at) warp->mask |= 1u << lane;
  warp->diverged = warp->mask != warp->live;
}
static void go_on(Warp *warp, u32 at) {
  warp->at = at;
  if (warp->diverged) {
    place(warp, warp->mask, at);
    select_lanes(warp);
  }
}
/* Which lanes a meeting names: all, those that happen to be here, or those in an operand. */
static u32 members(const Warp *warp, const Step *step, u32 here) {
  if (step->kind != K_WARP || step->target == 0) return ~0u;
  return step->target == 1 ? here : ROW32(step->target - 2)[__builtin_ctz(here)];
}
/* Lanes have come to a meeting: whether all are there that have to be.  If so they go on together, else others do. */
static int gathered(Block *block, Warp *warp, const Step *step) {
  u32 here = warp->mask;
  FOR_LANES(warp->waiting) if (warp->lane_at[lane] == warp->at) here |= 1u << lane;
  u32 missing = members(warp, step, warp->mask) & warp->live & ~here;
  if (!missing) {
    warp->waiting &= ~here;
    warp->mask = here;
    warp->diverged = here != warp->live;
    return 1;
  }
  place(warp, warp->mask, warp->at);
  warp->waiting |= here;
  if (!(warp->live & ~warp->waiting))
    fail(block, DIVERGED, warp->first_thread + __builtin_ctz(warp->mask), step->index, warp->live, here);
  select_lanes(warp);
  return 0;
}

/* --- A warp, until it comes to a barrier or ends --------------------------------------------------------------------- */

static enum State run_warp(Block *block, Warp *warp) {
  const Launch *launch = block->launch;
  for (u64 n = 0;; n++) {
    const Step *step = launch->program + warp->at;
    u32 mask = warp->mask;
    if (UNLIKELY(n > launch->instruction_limit)) fail(block, ENDLESS, warp->first_thread, step->index, 0, n);
    if (step->predicate >= 0) {
      u32 chosen = lanes_where(warp->registers + step->predicate);
      mask &= step->negated ? ~chosen : chosen;
    }
    if (launch->counters && step->kind != K_LABEL) launch->counters[step->class] += mask != 0;
    switch (step->kind) {
      case K_LANES:
        if (mask) step->handler(block, warp, mask, step);
        warp->at++;
        break;
      case K_LABEL:
        go_on(warp, warp->at + 1);
        break;
      case K_BRANCH:
        if (mask == warp->mask) go_on(warp, step->target);
        else if (!mask) go_on(warp, warp->at + 1);
        else {
          warp->diverged = 1;
          place(warp, mask, step->target);
          place(warp, warp->mask & ~mask, warp->at + 1);
          select_lanes(warp);
        }
        break;
      case K_BRANCH_TABLE: {
        u32 n_targets = step->rows[1];
        const u32 *targets = step->rows + 2;
        FOR_LANES(mask) {
          u32 which = ROW32(0)[lane];
          if (which >= n_targets) fail(block, TRAP, THREAD, step->index, which, n_targets);
          warp->lane_at[lane] = targets[which];
        }
        warp->diverged = 1;
        select_lanes(warp);
        break;
      }
      case K_EXIT:
        warp->live &= ~mask;
        if (!warp->live) return DONE;
        if (warp->mask & ~mask) {
          warp->mask &= ~mask;
          go_on(warp, warp->at + 1);
        } else if (mask) {
          if (!(warp->live & ~warp->waiting)) warp->waiting = 0; /* perhaps nobody is missing at their meeting now */
          select_lanes(warp);
        } else warp->at++;
        break;
      case K_WARP:
        if (mask && mask != warp->live) {
          if (mask != warp->mask && members(warp, step, mask) & warp->live & ~mask)
            fail(block, DIVERGED, warp->first_thread + __builtin_ctz(mask), step->index, warp->live, mask);
          if (mask == warp->mask) {
            if (!gathered(block, warp, step)) break;
            mask = warp->mask;
          }
        }
        if (mask) step->handler(block, warp, mask, step);
        warp->at++;
        break;
      case K_BARRIER: case K_WARP_GROUP:
        if (!mask) { warp->at++; break; }
        if (mask != warp->live) {
          if (mask != warp->mask)
            fail(block, DIVERGED, warp->first_thread + __builtin_ctz(mask), step->index, warp->live, mask);
          if (!gathered(block, warp, step)) break;
          mask = warp->mask;
        }
        if (step->kind == K_WARP_GROUP) return AT_WARP_GROUP;
        int first = __builtin_ctz(mask);
        warp->barrier = ROW32(0)[first] | ROW32(1)[first] << 8; /* its number, and how many threads it waits for */
        warp->at++;
        return AT_BARRIER;
    }
  }
}

/* --- A program ------------------------------------------------------------------------------------------------------- */

static u32 greatest_common_divisor(u32 a, u32 b) {
  while (b) { u32 rest = a % b; a = b; b = rest; }
  return a;
}
/* The i-th of n in the launch's order.  Shuffled: i * m + seed with an m that has no divisor in common with n. */
static u64 in_order(const Launch *launch, u64 i, u64 n) {
  if (launch->order == 0 || n < 2) return i;
  if (launch->order == 1) return n - 1 - i;
  u64 m = (2654435761ull + 2 * launch->seed) % n;
  while (greatest_common_divisor((u32)m, (u32)n) != 1) m++;
  return (i * m + launch->seed) % n;
}
/* Let those go on that are all at the same barrier. */
static int pass_barriers(Block *block) {
  int passed = 0;
  for (u32 i = 0; i < block->n_warps; i++) {
    if (block->warps[i].state != AT_BARRIER) continue;
    u32 barrier = block->warps[i].barrier, wanted = barrier >> 8, here = 0, live = 0;
    for (u32 k = 0; k < block->n_warps; k++) {
      Warp *warp = &block->warps[k];
      live += warp->state != DONE;
      here += warp->state == AT_BARRIER && warp->barrier == barrier;
    }
    if (wanted ? here * 32 < wanted : here < live) continue;
    for (u32 k = 0; k < block->n_warps; k++)
      if (block->warps[k].state == AT_BARRIER && block->warps[k].barrier == barrier) block->warps[k].state = RUNNING;
    passed = 1;
    block->epoch++;
  }
  return passed;
}
/* Steps of four warps, once all of them are there. */
static int run_warp_groups(Block *block) {
  int ran = 0;
  for (u32 first = 0; first + 4 <= block->n_warps; first += 4) {
    Warp *warps = block->warps + first;
    int ready = 1;
    for (int k = 0; k < 4; k++) ready &= warps[k].state == AT_WARP_GROUP && warps[k].at == warps[0].at;
    if (!ready) continue;
    const Step *step = block->launch->program + warps[0].at;
    step->handler(block, warps, ~0u, step);
    for (int k = 0; k < 4; k++) {
      warps[k].at++;
      warps[k].state = RUNNING;
    }
    ran = 1;
  }
  return ran;
}
static void run_warps(Block *block) {
  for (u32 done = 0;;) {
    int progress = 0;
    for (u32 i = 0; i < block->n_warps; i++) {
      Warp *warp = &block->warps[in_order(block->launch, i, block->n_warps)];
      if (warp->state != RUNNING) continue;
      warp->state = run_warp(block, warp);
      done += warp->state == DONE;
      progress = 1;
    }
    if (done == block->n_warps) return;
    progress |= run_warp_groups(block) | pass_barriers(block);
    for (u32 i = 0; !progress && i < block->n_warps; i++) {
      Warp *warp = &block->warps[i];
      u32 at = warp->state == AT_BARRIER ? warp->at - 1 : warp->at;
      if (warp->state != DONE)
        fail(block, DEADLOCK, warp->first_thread, block->launch->program[at].index, warp->barrier, warp->state);
    }
  }
}
static __attribute__((noinline)) void run_program(Block *block, u64 index) {
  const Launch *launch = block->launch;
  block->id[0] = (u32)(index % launch->grid[0]);
  block->id[1] = (u32)(index / launch->grid[0] % launch->grid[1]);
  block->id[2] = (u32)(index / launch->grid[0] / launch->grid[1]);
  memset(block->shared, 0xff, launch->shared_bytes); /* what nobody wrote is NaN, or -1 */
  block->epoch++;
  for (u32 k = 0; k < block->n_warps; k++) {
    Warp *warp = &block->warps[k];
    warp->at = warp->diverged = warp->waiting = warp->barrier = 0;
    warp->mask = warp->live = ~0u;
    warp->state = RUNNING;
    for (int lane = 0; warp->copies && lane < 32; lane++) warp->copies[lane].count = warp->copies[lane].open = 0;
    for (const u32 *pair = launch->specials; *pair != ~0u; pair += 2)
      for (u32 lane = 0; lane < 32; lane++) ((u32 *)(warp->registers + pair[1]))[lane] = special(block, warp, pair[0], lane);
  }
  run_warps(block);
}

/* --- A launch: 0, or what went wrong --------------------------------------------------------------------------------- */

static void *allocate(u64 bytes) { return aligned_alloc(1024, (bytes + 1024) / 1024 * 1024); }

int run_launch(Launch *launch) {
  Block block = {.launch = launch, .low = 1, .n_warps = launch->threads / 32};
  block.shared = allocate(launch->shared_bytes);
  block.written = allocate(2 * sizeof(u32) * launch->shared_bytes);
  block.read = block.written + launch->shared_bytes;
  memset(block.written, 0, 2 * sizeof(u32) * launch->shared_bytes);
  block.warps = allocate(sizeof(Warp) * block.n_warps);
  u8 *local = launch->local_bytes ? allocate((u64)launch->local_bytes * launch->threads) : 0;
  CopyQueue *copies = launch->copies ? allocate(sizeof(CopyQueue) * launch->threads) : 0;
  for (u32 k = 0; k < block.n_warps; k++) {
    Warp *warp = &block.warps[k];
    warp->registers = launch->registers + (u64)k * launch->register_bytes;
    warp->first_thread = 32 * k;
    warp->local = local ? local + (u64)32 * k * launch->local_bytes : 0;
    warp->copies = copies ? copies + 32 * k : 0;
  }
  u64 n = (u64)launch->grid[0] * launch->grid[1] * launch->grid[2], middle = n;
  if (launch->head + launch->tail && n > launch->head + launch->tail) middle = launch->head;
  if (!__builtin_setjmp(block.escape)) {
    for (u64 i = 0; i < n; i++) {
      if (i == middle) i = n - launch->tail;
      if (i < n) run_program(&block, in_order(launch, i, n));
    }
  }
  free(block.shared);
  free(block.written);
  free(block.warps);
  free(local);
  free(copies);
  return (int)launch->error;
}
u64 size_of_launch(void) { return sizeof(Launch); }
