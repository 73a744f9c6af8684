/* The machine's records: a launch, its programs (blocks), their warps, and the steps that warps run through. */
#ifndef MACHINE_H
#define MACHINE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;

#define INLINE static inline __attribute__((always_inline, unused))
#define SHARED_CODE static __attribute__((noinline, unused))
#define UNLIKELY(condition) __builtin_expect(condition, 0)
#define FOR_LANES(mask) for (int lane = 0; lane < 32; lane++) if ((mask) >> lane & 1)

void *memset(void *, int, unsigned long);
void *memcpy(void *, const void *, unsigned long);

/* Numbered as in steps.py. */
enum Kind { K_LANES, K_LABEL, K_BRANCH, K_EXIT, K_BARRIER, K_WARP, K_WARP_GROUP, K_BRANCH_TABLE };
/* Numbered as in launch.py. */
enum Error {
  NO_ERROR, OUT_OF_BOUNDS, MISALIGNED, SHARED_OUT_OF_BOUNDS, LOCAL_OUT_OF_BOUNDS, TRAP, ASSERTION, DIVERGED, DEADLOCK,
  ENDLESS, UNSUPPORTED, RACE
};

typedef struct Block Block;
typedef struct Warp Warp;
typedef struct Step Step;
typedef void (*Handler)(Block *, Warp *, u32 mask, const Step *);

typedef struct { u64 low, high; } Range;

struct Step {
  Handler handler;
  const u32 *rows;      /* where the operands' rows are in the warp's register file */
  s32 predicate;        /* row of the predicate, or -1 */
  u32 target;           /* of a branch; of a step of the whole warp, who has to be there: see `members` */
  u32 index;            /* of the instruction in the kernel's body */
  u32 kind;
  u32 negated;
  u32 class;            /* of the instruction, for counters */
};

/* What Python fills in, and reads back. */
typedef struct {
  const u8 *parameters;
  const Step *program;
  const Range *ranges;  /* global memory that the launch may reach */
  u64 *counters;        /* by class of instruction, then of memory; or null */
  u8 *registers;        /* register files, one a warp */
  const u32 *specials;  /* (which, row) pairs of special registers, closed by ~0 */
  u64 instruction_limit;/* for one warp of one program between two barriers */
  u64 head, tail;       /* programs at the grid's start and end that run; 0 and 0: all */
  u64 address, detail;  /* of an error */
  u32 register_bytes, threads, grid[3], shared_bytes, local_bytes, n_ranges;
  u32 order, seed;      /* of programs and warps: 0 forward, 1 reversed, 2 shuffled */
  u32 copies;           /* whether there are asynchronous copies */
  u32 nudge;            /* whether approximate instructions are off by up to their documented bounds */
  u32 error, index, thread, program_id[3];
} Launch;

typedef struct { u64 source; u32 target, size, source_size, index, group; } Copy;
enum { MAX_COPIES = 512 };
typedef struct { u32 count, open; Copy copies[MAX_COPIES]; } CopyQueue;

enum State { RUNNING, AT_BARRIER, AT_WARP_GROUP, DONE };
struct Warp {
  u8 *registers;
  u8 *local;
  CopyQueue *copies;    /* one a lane */
  u32 first_thread, state, barrier;
  u32 at;               /* the next step of the lanes in `mask` */
  u32 mask, live;       /* lanes that are being run; that haven't exited */
  u32 diverged;         /* whether lanes in `live` are at several steps: `lane_at` */
  u32 waiting;          /* lanes that have come to a meeting before others */
  u32 lane_at[32];
};
struct Block {
  Launch *launch;
  u64 low, high;        /* the range that was accessed last */
  u8 *shared;
  u32 *written, *read;  /* of each byte of shared memory, who did so last: see memory.h */
  u32 epoch;            /* barriers passed, of all programs */
  Warp *warps;
  u32 n_warps, id[3];
  void *escape[8];
};

/* Ends the launch. */
SHARED_CODE __attribute__((noreturn)) void fail(Block *block, u32 error, u32 thread, u32 index, u64 address, u64 detail) {
  Launch *launch = block->launch;
  launch->error = error;
  launch->thread = thread;
  launch->index = index;
  launch->address = address;
  launch->detail = detail;
  memcpy(launch->program_id, block->id, sizeof block->id);
  __builtin_longjmp(block->escape, 1);
}

/* Operands are rows of 32 values. */
#define ROW8(i) ((u8 *)(warp->registers + step->rows[i]))
#define ROW16(i) ((u16 *)(warp->registers + step->rows[i]))
#define ROW32(i) ((u32 *)(warp->registers + step->rows[i]))
#define ROW64(i) ((u64 *)(warp->registers + step->rows[i]))
#define THREAD (warp->first_thread + lane)
#define NUDGE (block->launch->nudge)

#endif
