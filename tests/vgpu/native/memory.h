/* Memory: every access is checked for bounds and alignment; asynchronous copies happen as late as they may. */
#include "machine.h"

/* --- Global memory: the tensors of the launch --------------------------------------------------------------------- */

SHARED_CODE void find_range(Block *block, u32 thread, u64 address, u32 bytes, u32 index) {
  const Launch *launch = block->launch;
  for (u32 i = 0; i < launch->n_ranges; i++) {
    Range range = launch->ranges[i];
    if (address >= range.low && address + bytes <= range.high) {
      block->low = range.low;
      block->high = range.high;
      return;
    }
  }
  fail(block, OUT_OF_BOUNDS, thread, index, address, bytes);
}
INLINE void *global_memory(Block *block, u32 thread, u64 address, u32 bytes, u32 index) {
  if (UNLIKELY(address & (bytes - 1))) fail(block, MISALIGNED, thread, index, address, bytes);
  if (UNLIKELY(address < block->low || address + bytes > block->high)) find_range(block, thread, address, bytes, index);
  return (void *)address;
}

/* --- Shared and local memory -------------------------------------------------------------------------------------- */

/* Between two barriers no warp may read what another writes, nor write what another reads; several may write the same
   (layouts have copies of values).  A note says when, `epoch`, and which warp, or that several did. */
enum Access { READS, WRITES, UPDATES };
enum { NOTE_BITS = 6, SEVERAL = 63 };
/* Whether a note is of this epoch, and of another warp: the upper bits are the same, the lower aren't. */
INLINE int of_another(u32 note, u32 own) { return (note ^ own) - 1 < SEVERAL; }
INLINE void *shared_memory(Block *block, u32 thread, u32 address, u32 bytes, u32 index, enum Access access) {
  if (UNLIKELY(address & (bytes - 1))) fail(block, MISALIGNED, thread, index, address, bytes);
  if (UNLIKELY((u64)address + bytes > block->launch->shared_bytes))
    fail(block, SHARED_OUT_OF_BOUNDS, thread, index, address, bytes);
  u32 own = block->epoch << NOTE_BITS | thread / 32, *written = block->written + address, *read = block->read + address;
  for (u32 i = 0; i < bytes && access != UPDATES; i++) {
    u32 note = access == READS ? written[i] : read[i];
    if (UNLIKELY(of_another(note, own))) fail(block, RACE, thread, index, address + i, note & SEVERAL);
    if (access == WRITES) written[i] = own;
    else read[i] = of_another(read[i], own) ? own | SEVERAL : own;
  }
  return block->shared + address;
}
INLINE void *local_memory(Block *block, Warp *warp, int lane, u64 address, u32 bytes, u32 index) {
  u32 size = block->launch->local_bytes;
  if (UNLIKELY(address + bytes > size)) fail(block, LOCAL_OUT_OF_BOUNDS, THREAD, index, address, bytes);
  return warp->local + (u64)lane * size + address;
}

#define ACCESS(bits) \
  INLINE u##bits load##bits(const void *p) { u##bits v; __builtin_memcpy(&v, p, bits / 8); return v; } \
  INLINE void store##bits(void *p, u##bits v) { __builtin_memcpy(p, &v, bits / 8); }
ACCESS(8) ACCESS(16) ACCESS(32) ACCESS(64)

/* --- Asynchronous copies: queued, and done when they are waited for ----------------------------------------------- */

SHARED_CODE void copy_now(Block *block, u32 thread, const Copy *copy) {
  u8 *target = shared_memory(block, thread, copy->target, copy->size, copy->index, WRITES);
  if (copy->source_size) {
    if (copy->source & (copy->size - 1)) fail(block, MISALIGNED, thread, copy->index, copy->source, copy->size);
    if (copy->source < block->low || copy->source + copy->source_size > block->high)
      find_range(block, thread, copy->source, copy->source_size, copy->index);
    memcpy(target, (void *)copy->source, copy->source_size);
  }
  memset(target + copy->source_size, 0, copy->size - copy->source_size);
}
SHARED_CODE void copy_later(Block *block, Warp *warp, int lane, u32 target, u64 source, u32 size, u32 source_size, u32 index) {
  CopyQueue *queue = &warp->copies[lane];
  shared_memory(block, THREAD, target, size, index, WRITES);
  if (queue->count == MAX_COPIES) fail(block, UNSUPPORTED, THREAD, index, 0, queue->count);
  Copy copy = {source, target, size, source_size < size ? source_size : size, index, queue->open};
  queue->copies[queue->count++] = copy;
}
/* Do the copies of all groups but the newest `pending` ones, the open one not counted; with ~0 of every group. */
SHARED_CODE void wait_for_copies(Block *block, Warp *warp, int lane, u32 pending) {
  CopyQueue *queue = &warp->copies[lane];
  u32 end = pending == ~0u ? ~0u : queue->open > pending ? queue->open - pending : 0, kept = 0;
  for (u32 i = 0; i < queue->count; i++) {
    if (queue->copies[i].group < end) copy_now(block, THREAD, &queue->copies[i]);
    else queue->copies[kept++] = queue->copies[i];
  }
  queue->count = kept;
}

/* --- Counters of memory, behind those of instructions: see counters.py -------------------------------------------- */

enum { FIRST_MEMORY_COUNTER = 24, LOADS = FIRST_MEMORY_COUNTER, STORES = LOADS + 3, SHARED_ACCESSES = STORES + 3 };

/* Requests of a warp, sectors of 32 bytes that they touch, and bytes of those that some lane uses.  An access is aligned,
   and so lies in one sector. */
SHARED_CODE void count_global(Block *block, u32 mask, const u64 *base, u64 displacement, u32 bytes, int first) {
  u64 sectors[32];
  u32 used[32], count = 0;
  u64 *counters = block->launch->counters + first;
  FOR_LANES(mask) {
    u64 address = base[lane] + displacement;
    u32 i = 0;
    while (i < count && sectors[i] != address / 32) i++;
    if (i == count) {
      sectors[count] = address / 32;
      used[count++] = 0;
    }
    used[i] |= (u32)((1ull << bytes) - 1) << address % 32;
  }
  counters[0]++;
  counters[1] += count;
  for (u32 i = 0; i < count; i++) counters[2] += (u32)__builtin_popcount(used[i]);
}
/* Requests of a warp, the waves that the 32 banks of 4 bytes take for them, and the waves that they'd take without
   conflicts.  Lanes that access the same word share it; accesses of 8 bytes go by half warps, of 16 by quarters. */
SHARED_CODE void count_shared(Block *block, u32 mask, const u32 *base, u32 displacement, u32 bytes) {
  u32 lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, width = (bytes + 3) / 4, waves = 0, least = 0;
  for (u32 start = 0; start < 32; start += lanes) {
    u32 words[32], count = 0, most = 0, of_bank[32] = {0};
    for (u32 lane = start; lane < start + lanes; lane++)
      for (u32 j = 0; (mask >> lane & 1) && j < width; j++) {
        u32 word = (base[lane] + displacement) / 4 + j, i = 0;
        while (i < count && words[i] != word) i++;
        if (i < count) continue;
        words[count++] = word;
        u32 n = ++of_bank[word % 32];
        if (n > most) most = n;
      }
    waves += most;
    least += (count + 31) / 32;
  }
  u64 *counters = block->launch->counters + SHARED_ACCESSES;
  counters[0]++;
  counters[1] += waves;
  counters[2] += least;
}
