/* Products of the tensor cores: exact products, summed in double with the accumulator, rounded once.  The hardware adds a
   few at a time and truncates: its errors are larger, within those that the accuracy rule allows a float32 sum. */
#include "collectives.h"

enum Element { E_F16, E_BF16, E_TF32 };
INLINE float element16(int element, u16 bits) { return element == E_F16 ? h2f(bits) : bf2f(bits); }
INLINE float tf32(u32 bits) { return F(bits & 0xffffe000u); } /* the hardware reads the upper 19 bits */

/* Lane 4 g + t holds rows g and g + 8 of A, and column g of B; of an accumulator rows g, g + 8 and columns 2 t, 2 t + 1. */
#define OUTPUT_ROW(i) (lane / 4 + (i) / 2 * 8)
#define OUTPUT_COLUMN(i) (lane % 4 * 2 + (i) % 2)

/* D, A, B, C: m16n8kK of 16-bit values */
SHARED_CODE void product_16(Block *block, Warp *warp, u32 mask, const Step *step, int element, int k, int half_sum) {
  int n_d = half_sum ? 2 : 4, n_a = k / 4, n_b = k / 8, first_b = n_d + n_a, first_c = first_b + n_b;
  float a[16][16], b[8][16];
  u32 out[4][32];
  meet(block, warp, mask, ~0u, step);
  FOR_LANES(~0u) {
    for (int i = 0; i < n_a; i++) {
      u32 v = ROW32(n_d + i)[lane];
      int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
      a[row][column] = element16(element, low16(v));
      a[row][column + 1] = element16(element, high16(v));
    }
    for (int i = 0; i < n_b; i++) {
      u32 v = ROW32(first_b + i)[lane];
      b[lane / 4][lane % 4 * 2 + i * 8] = element16(element, low16(v));
      b[lane / 4][lane % 4 * 2 + i * 8 + 1] = element16(element, high16(v));
    }
  }
  FOR_LANES(~0u) for (int i = 0; i < 4; i++) {
    u32 c = ROW32(first_c + (half_sum ? i / 2 : i))[lane];
    double sum = half_sum ? (double)h2f(i & 1 ? high16(c) : low16(c)) : (double)F(c);
    for (int j = 0; j < k; j++) sum += (double)a[OUTPUT_ROW(i)][j] * (double)b[OUTPUT_COLUMN(i)][j];
    out[i][lane] = half_sum ? d2h(sum) : result32((float)sum);
  }
  FOR_LANES(~0u) for (int i = 0; i < n_d; i++)
    ROW32(i)[lane] = half_sum ? pack16(out[2 * i][lane], out[2 * i + 1][lane]) : out[i][lane];
}
/* D, A, B, C: m16n8kK of TF32 */
SHARED_CODE void product_tf32(Block *block, Warp *warp, u32 mask, const Step *step, int k) {
  int n_a = k / 2, n_b = k / 4, first_b = 4 + n_a, first_c = first_b + n_b;
  float a[16][8], b[8][8];
  u32 out[4][32];
  meet(block, warp, mask, ~0u, step);
  FOR_LANES(~0u) {
    for (int i = 0; i < n_a; i++) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = tf32(ROW32(4 + i)[lane]);
    for (int i = 0; i < n_b; i++) b[lane / 4][lane % 4 + i * 4] = tf32(ROW32(first_b + i)[lane]);
  }
  FOR_LANES(~0u) for (int i = 0; i < 4; i++) {
    double sum = (double)F(ROW32(first_c + i)[lane]);
    for (int j = 0; j < k; j++) sum += (double)a[OUTPUT_ROW(i)][j] * (double)b[OUTPUT_COLUMN(i)][j];
    out[i][lane] = result32((float)sum);
  }
  FOR_LANES(~0u) for (int i = 0; i < 4; i++) ROW32(i)[lane] = out[i][lane];
}
/* D, A, B, C: mMn8kK of float64, one fused multiplication and addition after the other */
SHARED_CODE void product_f64(Block *block, Warp *warp, u32 mask, const Step *step, int m, int k) {
  int n_d = m / 4, n_a = m * k / 32, n_b = k / 4, first_b = n_d + n_a, first_c = first_b + n_b, blocks = m / 8;
  double a[16][16], b[8][16];
  u64 out[4][32];
  meet(block, warp, mask, ~0u, step);
  FOR_LANES(~0u) {
    for (int i = 0; i < n_a; i++) a[lane / 4 + i % blocks * 8][lane % 4 + i / blocks * 4] = D(ROW64(n_d + i)[lane]);
    for (int i = 0; i < n_b; i++) b[lane / 4][lane % 4 + i * 4] = D(ROW64(first_b + i)[lane]);
  }
  FOR_LANES(~0u) for (int i = 0; i < n_d; i++) {
    double sum = D(ROW64(first_c + i)[lane]);
    for (int j = 0; j < k; j++) sum = fma(a[OUTPUT_ROW(i)][j], b[OUTPUT_COLUMN(i)][j], sum);
    out[i][lane] = bits64(sum);
  }
  FOR_LANES(~0u) for (int i = 0; i < n_d; i++) ROW64(i)[lane] = out[i][lane];
}

/* --- wgmma: four warps multiply matrices in shared memory ----------------------------------------------------------- */

/* Where a descriptor's matrix has the element (mn, k).  Bytes of the start, of the leading and of the stride dimension
   stand in it in units of 16; bits 62 and 63 say in which pattern of 128, 64 or 32 bytes rows are swizzled. */
INLINE u32 matrix_address(u64 descriptor, int mn_major, u32 size, u32 mn, u32 k) {
  u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  u32 swizzle = descriptor >> 62, width = swizzle == 1 ? 128 : swizzle == 2 ? 64 : swizzle == 3 ? 32 : 16, address;
  if (!mn_major) {
    u32 byte = k * size;
    address = start + mn / 8 * stride + mn % 8 * width + (swizzle ? byte : byte / 16 * leading + byte % 16);
  } else {
    u32 byte = mn * size;
    u32 columns = swizzle ? byte / width * leading + k / 8 * stride : byte / 16 * stride + k / 8 * leading;
    address = start + columns + k % 8 * width + byte % width;
  }
  return address ^ (swizzle ? address >> 3 & (width - 16) : 0);
}
INLINE float matrix_element(Block *block, u32 thread, u32 index, u32 address, int element) {
  if (element == E_TF32) return tf32(load32(shared_memory(block, thread, address, 4, index, READS)));
  return element16(element, load16(shared_memory(block, thread, address, 2, index, READS)));
}
SHARED_CODE void read_matrix(Block *block, Warp *warp, const Step *step, u64 descriptor, int element, int mn_major, int n, int k,
                             float (*out)[16]) {
  u32 size = element == E_TF32 ? 4 : 2;
  if (descriptor >> 49 & 7) fail(block, UNSUPPORTED, warp->first_thread, step->index, descriptor, 0); /* a base offset */
  for (int i = 0; i < n; i++)
    for (int j = 0; j < k; j++)
      out[i][j] = matrix_element(block, warp->first_thread, step->index, matrix_address(descriptor, mn_major, size, i, j), element);
}

/* Runs at once, not when it is waited for: PTX may copy an accumulator's registers in between, which the assembler makes
   one and the same. */
typedef struct { int element, n, k, a_in_registers, a_mn_major, b_mn_major, half_sum; } Product;
/* accumulators (n / 2, or n / 4 of pairs), A (a descriptor or 4 registers), descriptor of B, whether to add to the
   accumulators, signs of A and B */
SHARED_CODE void group_product(Block *block, Warp *warp, const Step *step, Product p) {
  static __thread float a[64][16], b[256][16];
  int first_a = p.half_sum ? p.n / 4 : p.n / 2, first_b = first_a + (p.a_in_registers ? 4 : 1);
  Warp *first = warp;
  if (p.a_in_registers) {
    for (int w = 0; w < 4; w++) {
      warp = first + w;
      FOR_LANES(~0u) for (int i = 0; i < 4; i++) {
        u32 v = ROW32(first_a + i)[lane];
        float *row = a[w * 16 + lane / 4 + i % 2 * 8];
        if (p.element == E_TF32) row[lane % 4 + i / 2 * 4] = tf32(v);
        else {
          row[lane % 4 * 2 + i / 2 * 8] = element16(p.element, low16(v));
          row[lane % 4 * 2 + i / 2 * 8 + 1] = element16(p.element, high16(v));
        }
      }
    }
    warp = first;
  } else {
    read_matrix(block, warp, step, ROW64(first_a)[0], p.element, p.a_mn_major, 64, p.k, a);
  }
  read_matrix(block, warp, step, ROW64(first_b)[0], p.element, p.b_mn_major, p.n, p.k, b);
  int add = ROW8(first_b + 1)[0];
  double sign = ((s32)ROW32(first_b + 2)[0] < 0) == ((s32)ROW32(first_b + 3)[0] < 0) ? 1 : -1;
  for (int w = 0; w < 4; w++) {
    warp = first + w;
    FOR_LANES(~0u) for (int j = 0; j < p.n / 8; j++) for (int i = 0; i < 4; i++) {
      u32 *place = &ROW32(p.half_sum ? j * 2 + i / 2 : j * 4 + i)[lane];
      u16 half = i & 1 ? high16(*place) : low16(*place);
      double sum = !add ? 0 : p.half_sum ? (double)h2f(half) : (double)F(*place);
      const float *row = a[w * 16 + OUTPUT_ROW(i)], *column = b[j * 8 + OUTPUT_COLUMN(i)];
      for (int m = 0; m < p.k; m++) sum += sign * (double)row[m] * (double)column[m];
      if (!p.half_sum) *place = result32((float)sum);
      else *place = i & 1 ? pack16(low16(*place), d2h(sum)) : pack16(d2h(sum), high16(*place));
    }
  }
}
