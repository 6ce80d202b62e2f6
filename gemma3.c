/* gemma3.c - Google's Gemma 3, forward pass and all, in one C file for the CPU.
 *
 * What this is: a reference to read, to port and to check other engines against. It computes the
 * same bits on every machine (the numeric contract, README.md) and it is fast.
 * What this is not: a framework. There is one architecture, one forward pass and no dependency but
 * libc and threads.
 *
 * The model in 20 lines. x is the residual stream, one vector of d_model numbers for each token.
 *
 *     x = embedding[id] * sqrt(d_model)
 *     for each layer l:
 *         h = rms(x) * attn_norm
 *         q, k, v = Wq h, Wk h, Wv h             n_heads queries, n_kv_heads keys and values
 *         q, k = rms(q) * q_norm, rms(k) * k_norm      each head for itself
 *         q, k = rope(q), rope(k)                turn pairs (j, j + head_dim/2) by p * theta^(-2j/head_dim)
 *         a = softmax(q . k * query_scale) v     over the past, itself included: all of it in every 6th
 *                                                layer (global), the last `window` tokens in the others (local)
 *         x = x + rms(Wo a) * post_attention_norm
 *         h = rms(x) * ffn_norm
 *         f = Wdown (gelu(Wgate h) * Wup h)
 *         x = x + rms(f) * post_ffw_norm
 *     logits = embedding . (rms(x) * output_norm)
 *
 * where rms(x) = x / sqrt(mean(x^2) + eps), W h is a matrix times a vector, and * between vectors is
 * element by element. query_scale is 1/sqrt(head_dim), in 27B 1/sqrt(168). Query head h uses key-value
 * head h / (n_heads / n_kv_heads): several queries share one K and V (grouped-query attention). K and V
 * of earlier tokens never change, so they are kept: the KV cache. A program repeats: ids -> logits after
 * the last token -> choose an id -> append it. Source: Gemma 3 Technical Report (arXiv 2503.19786),
 * and transformers' modeling_gemma3.py, with which exact mode agrees to float32 rounding.
 *
 * Names. One vocabulary everywhere:
 *     ours            paper / transformers           GGUF
 *     d_model         hidden_size                    gemma3.embedding_length
 *     d_ff            intermediate_size              gemma3.feed_forward_length
 *     attn_norm       input_layernorm                blk.N.attn_norm.weight
 *     attn_q, _k, _v  self_attn.{q,k,v}_proj         blk.N.attn_{q,k,v}.weight
 *     attn_q_norm     self_attn.q_norm               blk.N.attn_q_norm.weight
 *     attn_output     self_attn.o_proj               blk.N.attn_output.weight
 *     post_attention_norm  post_attention_layernorm  blk.N.post_attention_norm.weight
 *     ffn_norm        pre_feedforward_layernorm      blk.N.ffn_norm.weight
 *     ffn_gate, _up, _down  mlp.{gate,up,down}_proj  blk.N.ffn_{gate,up,down}.weight
 *     post_ffw_norm   post_feedforward_layernorm     blk.N.post_ffw_norm.weight
 *     output_norm     model.norm                     output_norm.weight
 * and n_layers, n_heads, n_kv_heads, head_dim, n_vocab, window: gemma3_config in gemma3.h.
 * Indices: l layer, i token of this call, p position in the text, h query head, g key-value head, r row,
 * b block of 32 elements (256 in a file's K formats: a super-block), j element or lane. In formats and
 * kernels g counts groups of elements and h registers of rows. n is the number of tokens in this call.
 *
 * Contents
 *      1  Arithmetic that is the same everywhere
 *      2  Number formats
 *      3  Activations
 *      4  Dot products: the definition
 *      5  Dot products: AVX2, AVX-512, NEON
 *      6  Element-wise pieces: norm, rope, gelu, softmax
 *      7  The model and the state
 *      8  Matrix times vectors
 *      9  Attention, the KV cache, feed-forward
 *     10  The forward pass
 *     11  Reading GGUF
 *     12  Opening a model
 *     13  Sizes and states
 *     14  Scores, sampling, SHA-256
 *     15  Threads and files of the host
 *     16  The command line
 */

/* The contract forbids the compiler to fuse a*b+c on its own (we say fma where we mean it), and to treat
 * floats as real numbers, whatever its command line allows; open() tests that it was heard. The two last
 * lines for gcc change speed, never bits. */
#if defined(__clang__)
#if __clang_major__ >= 12
#pragma float_control(precise, on)
#pragma clang fp reassociate(off)
#endif
#pragma STDC FP_CONTRACT OFF /* after the others: "precise" would allow it again */
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#pragma GCC optimize("no-associative-math", "no-reciprocal-math", "no-unsafe-math-optimizations", "signed-zeros")
#pragma GCC optimize("no-trapping-math", "no-math-errno", "tree-vectorize", "vect-cost-model=dynamic")
#pragma GCC optimize("no-tree-ter") /* with it every sum waits for its last use: registers run out */
#endif
#if defined(__FAST_MATH__)
#error "gemma3.c computes the same bits everywhere: build it without -ffast-math"
#endif

#if !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* mmap, pthreads, sigaction under -std=c11 */
#endif
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1           /* madvise, sched_getaffinity */
#endif
#include "gemma3.h"

#include <float.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float arithmetic is wider than float here: on 32-bit x86 build with -msse2 -mfpmath=sse"
#endif

#if defined(__x86_64__) || (defined(__i386__) && defined(__SSE2__))
#include <immintrin.h>
#define HAVE_X86 1
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#define HAVE_NEON 1
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
enum { BIG_ENDIAN_CPU = 1 };
#else
enum { BIG_ENDIAN_CPU = 0 };
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

/* ==== 1. Arithmetic that is the same everywhere =================================================
 *
 * IEEE 754 rounds + - * / and sqrt correctly on every machine. A fused multiply-add is the other
 * operation we build on; exp, sin, cos, pow and log are made of these, because every C library
 * rounds its own a little differently. */

INLINE uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

INLINE float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* a*b+c rounded once, without the instruction: the product of two floats is exact in double; the
 * sum and its error (Knuth's TwoSum) are rounded to odd (a double whose last bit says "there was more"),
 * so that rounding it again, to float, cannot go wrong (Boldo and Melquiond, "Emulation of FMA and
 * correctly rounded sums"). */
static float soft_fmaf(float a, float b, float c)
{
    double product = (double)a * b, sum = product + c;
    double c_in_sum = sum - product, error = (product - (sum - c_in_sum)) + (c - c_in_sum);
    uint64_t u;
    memcpy(&u, &sum, 8);
    if (error != 0 && (u & 1) == 0 && sum - sum == 0) { /* inexact, even and finite */
        u += (error > 0) == (sum > 0) ? 1 : (uint64_t)-1;
        memcpy(&sum, &u, 8);
    }
    return (float)sum;
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__riscv_f) || defined(__s390x__) || \
    defined(__powerpc64__)
enum { HARD_FMA = 1 };
#else
enum { HARD_FMA = 0 };
#endif

/* hard is a constant wherever this is called: 1 only where the instruction exists. */
INLINE float fma_of(int hard, float a, float b, float c)
{
    return hard ? __builtin_fmaf(a, b, c) : soft_fmaf(a, b, c);
}

INLINE float sqrt_of(float x)
{
    return __builtin_sqrtf(x);
}

/* Round half to even for |x| < 2^22: in this range a float's last bit is 1 once 1.5 * 2^23 is added,
 * so the addition itself rounds; the integer stands in the low bits. */
#define ROUNDER 12582912.0f
INLINE int32_t round_to_int(float x)
{
    return (int32_t)(bits_of(x + ROUNDER) - bits_of(ROUNDER));
}

/* exp of a float, at most 0.92 ulp wrong: x = n ln2 + r, |r| <= ln2 / 2; Taylor's polynomial of
 * degree 7 in r; then n goes into the exponent. */
INLINE float exp_of(int hard, float x)
{
    float shifted = fma_of(hard, x, 0x1.715476p+0f, ROUNDER); /* 1/ln2 */
    float n = shifted - ROUNDER;
    float r = fma_of(hard, n, -0x1.62e430p-1f, x);            /* ln2, leading part */
    r = fma_of(hard, n, 0x1.05c610p-29f, r);                  /* and the rest */
    float e = 1.0f / 5040;
    e = fma_of(hard, e, r, 1.0f / 720);
    e = fma_of(hard, e, r, 1.0f / 120);
    e = fma_of(hard, e, r, 1.0f / 24);
    e = fma_of(hard, e, r, 1.0f / 6);
    e = fma_of(hard, e, r, 0.5f);
    e = fma_of(hard, e, r, 1.0f);
    e = fma_of(hard, e, r, 1.0f);
    e = float_of(bits_of(e) + (bits_of(shifted) << 23));      /* ROUNDER's own low 9 bits are 0 */
    e = x < -87.0f ? 0.0f : e;
    e = x > 88.7f ? float_of(0x7f800000) : e;
    return x != x ? x : e;
}

/* The rounding mode and the flush-to-zero bits belong to the thread, and the caller may have changed
 * them: every public call and every worker sets IEEE's defaults and puts the caller's back. */
#if defined(HAVE_X86)
typedef unsigned fp_state;
static fp_state fp_enter(void)
{
    unsigned old = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return old;
}
static void fp_leave(fp_state old) { _mm_setcsr(old); }
#elif defined(__aarch64__)
typedef uint64_t fp_state;
static fp_state fp_enter(void)
{
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return old;
}
static void fp_leave(fp_state old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#else
#include <fenv.h>
typedef int fp_state;
static fp_state fp_enter(void)
{
    int old = fegetround();
    fesetround(FE_TONEAREST);
    return old;
}
static void fp_leave(fp_state old) { fesetround(old); }
#endif

#define LN2_HIGH 0x1.62e42fee00000p-1 /* 21 zero bits at the end: times an exponent it is exact */
#define LN2_LOW 0x1.a39ef35793c76p-33

/* The same three steps in double, to degree 13; a large n is applied in parts. */
static double exp_double(double x)
{
    if (x != x) return x;
    if (x < -745.2) return 0;
    if (x > 709.78) return (double)float_of(0x7f800000);
    double n = (x * 0x1.71547652b82fep+0 + 0x1.8p52) - 0x1.8p52;
    double r = (x - n * LN2_HIGH) - n * LN2_LOW;
    static const double taylor[14] = {1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                                      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800,
                                      1.0 / 479001600, 1.0 / 6227020800};
    double e = 0;
    for (int k = 13; k >= 0; k--) e = taylor[k] + e * r;
    for (; n > 1000; n -= 512) e *= 0x1p512;
    for (; n < -1000; n += 512) e *= 0x1p-512;
    uint64_t u = (uint64_t)(int64_t)(n + 1023) << 52;
    double scale;
    memcpy(&scale, &u, 8);
    return e * scale;
}

static double log_double(double x)
{
    if (!(x > 0)) return x == 0 ? -(double)float_of(0x7f800000) : (double)float_of(0x7fc00000);
    if (x - x != 0) return x;
    int n = 0;
    for (; x < 0x1p-500; x *= 0x1p500) n -= 500;
    uint64_t u;
    memcpy(&u, &x, 8);
    n += (int)(u >> 52) - 1023;
    u = (u & 0xfffffffffffff) | 0x3ff0000000000000;
    memcpy(&x, &u, 8);                          /* 1 <= x < 2 */
    if (x > 0x1.6a09e667f3bcdp+0) x /= 2, n++;  /* around 1 */
    double s = (x - 1) / (x + 1), s2 = s * s, sum = 0; /* log x = 2 artanh s */
    for (int k = 25; k >= 1; k -= 2) sum = sum * s2 + 1.0 / k;
    return n * LN2_HIGH + (2 * s * sum + n * LN2_LOW);
}

double gemma3_exp(double x)
{
    fp_state fp = fp_enter();
    double e = exp_double(x);
    fp_leave(fp);
    return e;
}

double gemma3_log(double x)
{
    fp_state fp = fp_enter();
    double l = log_double(x);
    fp_leave(fp);
    return l;
}

static double power(double base, double exponent) /* base > 0 */
{
    return exp_double(exponent * log_double(base));
}

/* cos and sin of a rotary angle, 0 <= angle < 2^31: less k quarter turns in three steps, then Taylor's
 * series on [-pi/4, pi/4]. pi/2 is cut into parts of 33 bits and k into its low 20 bits and the rest, so
 * that all products with the first two parts are exact. A model is refused whose angles could reach
 * 2^31 (configure_rope); NaN for them here, because casts of such numbers differ between CPUs. */
static void cos_sin(float angle, float *c, float *s)
{
    if (!(angle >= 0 && angle < 0x1p31f)) {
        *c = *s = float_of(0x7fc00000);
        return;
    }
    double x = angle;
    double k = (x * 0x1.45f306dc9c883p-1 + 0x1.8p52) - 0x1.8p52; /* 2/pi */
    double low = (double)((uint32_t)k & 0xfffff), high = k - low;
    double r = (x - high * 0x1.921fb54400000p+0) - low * 0x1.921fb54400000p+0;
    r = (r - high * 0x1.0b4611a600000p-34) - low * 0x1.0b4611a600000p-34;
    r -= k * 0x1.3198a2e037073p-69;
    static const double even_term[9] = {1, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800,
                                        1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};
    static const double odd_term[9] = {1, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880,
                                       -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000,
                                       1.0 / 355687428096000};
    double r2 = r * r, even = 0, odd = 0;
    for (int j = 8; j >= 0; j--) {
        even = even_term[j] + even * r2;
        odd = odd_term[j] + odd * r2;
    }
    odd *= r;
    int quarter = (int)((uint32_t)k & 3);
    double cosine = quarter & 1 ? odd : even, sine = quarter & 1 ? even : odd;
    *c = (float)(quarter == 1 || quarter == 2 ? -cosine : cosine);
    *s = (float)(quarter >= 2 ? -sine : sine);
}

/* Says whether this build on this machine computes as the contract needs it; run by every open. */
static const char *arithmetic_fault(void)
{
    volatile float one = 1, tiny = 0x1p-126f, a = 0x1.000002p0f, b = 0x1.fffffep-1f, big = 16777216;
    float five = 5 * one, huge = big, unit = one; /* read once, so that a compiler may be tempted */
    if (tiny / 2 == 0) return "subnormal numbers are flushed to zero";
    if (big + one != big || big + 3 * one != big + 4 * one) return "sums are not rounded to nearest, ties to even";
    if ((huge + unit) - huge != 0) return "sums are reordered as if floats were real numbers";
    if (five / 3.0f != 0x1.aaaaaap+0f) return "a division became a multiplication by the reciprocal";
    if (a * b - one != 0) return "a product and a sum were fused into one operation";
    if (soft_fmaf(a, b, -one) != 0x1.fffffcp-25f) return "the emulated fused multiply-add is wrong";
    if (fma_of(HARD_FMA, a, b, -one) != 0x1.fffffcp-25f) return "the fused multiply-add rounds twice";
    if (one / 3 != 0x1.555556p-2f || sqrt_of(2 * one) != 0x1.6a09e6p0f)
        return "division or square root is not correctly rounded";
    if (bits_of(exp_of(HARD_FMA, one)) != 0x402df854) return "exp(1) is wrong";
    return NULL;
}

/* ==== 2. Number formats =========================================================================
 *
 * Weights lie in blocks of 32 or 256 elements that share a scale. Each integer format has one function
 * that unpacks 32 elements to int8 codes and scales: it is the definition of the format. Dequantisation
 * and dot products use it; only Q4_0's dot products, the hottest, take the nibbles themselves. All
 * numbers in a file are little-endian.
 *
 * The functions unpack R rows at once. R is 1 for a row as it lies in the file, or 32 for a tile: 32
 * rows whose bytes are interleaved, so that each 32-bit lane of a vector register holds 4 bytes of one
 * row: a lane's sum is that row's, and none is needed across lanes. What lies at byte `at` of a block
 * lies at R * at in the tile: codes in units of 4 bytes, scales in units of one number. With R = 1 both
 * are the same, and the drawings below hold. A block of Q4_0 in a tile (d scale, q bytes of nibbles):
 *
 *     0                   64                                                 192            576
 *     | d0 | d1 | .. | d31 | row 0 q0-3 | row 1 q0-3 | .. | row 31 q0-3 | row 0 q4-7 | .. | */

INLINE uint16_t load_u16_le(const uint8_t *p)
{
    uint16_t u;
    memcpy(&u, p, 2);
    return BIG_ENDIAN_CPU ? __builtin_bswap16(u) : u;
}
INLINE uint32_t load_u32_le(const uint8_t *p)
{
    uint32_t u;
    memcpy(&u, p, 4);
    return BIG_ENDIAN_CPU ? __builtin_bswap32(u) : u;
}
INLINE uint64_t load_u64_le(const uint8_t *p)
{
    return load_u32_le(p) | (uint64_t)load_u32_le(p + 4) << 32;
}
INLINE void store_u16_le(uint8_t *p, uint16_t u)
{
    u = BIG_ENDIAN_CPU ? __builtin_bswap16(u) : u;
    memcpy(p, &u, 2);
}
INLINE void store_u32_le(uint8_t *p, uint32_t u)
{
    u = BIG_ENDIAN_CPU ? __builtin_bswap32(u) : u;
    memcpy(p, &u, 4);
}

/* IEEE half precision:  s eeeee mmmmmmmmmm   value = (-1)^s * 2^(e-15) * 1.m, subnormal when e = 0:
 * then it is m * 2^-24, made from the integer, because arithmetic on subnormal floats can be slow. */
INLINE float f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x & 0x7c00, rest = (uint32_t)(x & 0x7fff) << 13;
    uint32_t normal = rest + (exponent == 0x7c00 ? 0x70000000 : 0x38000000); /* exponent 15 -> 127, 31 -> 255 */
    uint32_t subnormal = bits_of((float)(int32_t)(x & 0x3ff) * 0x1p-24f);
    return float_of((exponent ? normal : subnormal) | sign);
}

/* To nearest, ties to even; too large becomes infinity, as IEEE says. */
INLINE uint16_t f32_to_f16(float x)
{
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    uint32_t normal = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;       /* exponent 127 -> 15 */
    uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000;           /* the sum rounds */
    uint32_t half = a < 0x38800000 ? subnormal : normal;
    half = a >= 0x477ff000 ? 0x7c00 : half;
    half = a > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(sign | half);
}

/* bfloat16 is the upper half of a float. */
INLINE float bf16_to_f32(uint16_t x) { return float_of((uint32_t)x << 16); }

enum { TILE_ROWS = 32 };

/* A panel: 32 elements of each of R rows, made ready for the kernels; the one shape that all formats but
 * Q4_0 take there. With half = j / 16 the value of element j of row r is
 *     d[r] * scale[half][r] * (code - bias)  +  m[r] * min[half][r]
 * Formats whose halves share a scale leave scale and min alone: both count as 1. */
struct panel {
    const int8_t *code;               /* element 4g + k of row r at (g * R + r) * 4 + k */
    uint8_t unpacked[32 * TILE_ROWS]; /* where code points, unless the file's bytes are the codes */
    int32_t scale[2][TILE_ROWS], min[2][TILE_ROWS];
    float d[TILE_ROWS], m[TILE_ROWS];
};

INLINE void load_f16s(float *restrict out, const uint8_t *restrict p, int R)
{
    for (int r = 0; r < R; r++) out[r] = f16_to_f32(load_u16_le(p + 2 * r));
}

/* out[j] = (in[j] >> shift) & mask for n bytes, four at a time: what a shift moves from one byte into
 * the next is masked away, in either byte order. mask is one byte's, shift at most 7. */
INLINE void take_bits(uint8_t *restrict out, const uint8_t *restrict in, int n, int shift, uint32_t mask)
{
    for (int j = 0; j < n; j += 4) {
        uint32_t four;
        memcpy(&four, in + j, 4);
        four = four >> shift & mask * 0x01010101;
        memcpy(out + j, &four, 4);
    }
}

/* The same with more bits on top: out[j] = ((in[j] >> shift) & mask) | ((top[j] >> top_shift) & top_mask) << up */
INLINE void join_bits(uint8_t *restrict out, const uint8_t *restrict in, int n, int shift, uint32_t mask,
                      const uint8_t *restrict top, int top_shift, uint32_t top_mask, int up)
{
    for (int j = 0; j < n; j += 4) {
        uint32_t low, high;
        memcpy(&low, in + j, 4);
        memcpy(&high, top + j, 4);
        low = (low >> shift & mask * 0x01010101) | (high >> top_shift & top_mask * 0x01010101) << up;
        memcpy(out + j, &low, 4);
    }
}

/* 16 bytes of nibbles for each row: the low one element j, the high one element j + 16. */
INLINE void unpack_nibbles(struct panel *restrict o, const uint8_t *restrict qs, int R)
{
    take_bits(o->unpacked, qs, 16 * R, 0, 15);
    take_bits(o->unpacked + 16 * R, qs, 16 * R, 4, 15);
}

/* high: one u32 for each row; its bit j is the fifth bit of element j. The product copies bit k of
 * four to the lowest bit of byte k. */
INLINE void add_fifth_bits(struct panel *restrict o, const uint8_t *restrict high, int R)
{
    for (int g = 0; g < 8; g++)
        for (int r = 0; r < R; r++) {
            uint8_t *four = o->unpacked + 4 * (g * R + r);
            uint32_t bits = load_u32_le(high + 4 * r) >> 4 * g & 15;
            store_u32_le(four, load_u32_le(four) | (bits * 0x00204081 & 0x01010101) << 4);
        }
}

/* Q4_0, 18 bytes for 32 elements: value = d * (q - 8)
 *     0      2                                       18
 *     | d f16 | 16 bytes: low nibble element j,      |
 *     |       |           high nibble element j + 16 |   Q4_1, Q5_0, Q5_1, IQ4_NL pair them alike */
INLINE void unpack_q4_0(const uint8_t *restrict p, int R, struct panel *restrict o)
{
    load_f16s(o->d, p, R);
    unpack_nibbles(o, p + 2 * R, R);
}

/* Q4_1, 20 bytes for 32:  | d f16 | m f16 | 16 bytes of nibbles |   value = d * q + m */
INLINE void unpack_q4_1(const uint8_t *restrict p, int R, struct panel *restrict o)
{
    load_f16s(o->d, p, R);
    load_f16s(o->m, p + 2 * R, R);
    unpack_nibbles(o, p + 4 * R, R);
}

/* Q5_0, 22 bytes for 32:  | d f16 | h u32: bit j is the fifth bit of element j | 16 bytes of nibbles |
 * value = d * (q - 16) */
INLINE void unpack_q5_0(const uint8_t *restrict p, int R, struct panel *restrict o)
{
    load_f16s(o->d, p, R);
    unpack_nibbles(o, p + 6 * R, R);
    add_fifth_bits(o, p + 2 * R, R);
}

/* Q5_1, 24 bytes for 32:  | d f16 | m f16 | h u32 | 16 bytes of nibbles |   value = d * q + m */
INLINE void unpack_q5_1(const uint8_t *restrict p, int R, struct panel *restrict o)
{
    load_f16s(o->d, p, R);
    load_f16s(o->m, p + 2 * R, R);
    unpack_nibbles(o, p + 8 * R, R);
    add_fifth_bits(o, p + 4 * R, R);
}

/* Q8_0, 34 bytes for 32:  | d f16 | 32 x int8 |   value = d * q */
INLINE void unpack_q8_0(const uint8_t *restrict p, int R, struct panel *restrict o)
{
    load_f16s(o->d, p, R);
    o->code = (const int8_t *)p + 2 * R;
}

/* IQ4_NL, 18 bytes for 32, laid out as Q4_0; a nibble is an index into 16 unevenly spaced levels. */
INLINE void unpack_iq4_nl(const uint8_t *restrict p, int R, struct panel *restrict o)
{
    static const int8_t level[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1,    13,   25,  38,  53,  69,  89,  113};
    unpack_q4_0(p, R, o);
    for (int j = 0; j < 32 * R; j++) o->unpacked[j] = (uint8_t)level[o->unpacked[j]];
}

/* The K formats: blocks of 256 elements = 8 groups of 32 with sub-scales; g is the group wanted.
 *
 * Q2_K, 84 bytes:  | scales[16] | qs[64] | d f16 | dmin f16 |
 *     scales[i]: low nibble scale, high nibble min of elements 16i .. 16i+15
 *     qs: bytes 0-31 hold groups 0-3, bytes 32-63 groups 4-7, two bits each, lowest first
 *     value = d * scale * q - dmin * min */
INLINE void unpack_q2_k(const uint8_t *restrict p, int R, int g, struct panel *restrict o)
{
    const uint8_t *qs = p + (16 + 32 * (g / 4)) * R, *scales = p + 2 * g * R;
    take_bits(o->unpacked, qs, 32 * R, 2 * (g % 4), 3);
    for (int k = 0; k < 2; k++)
        for (int r = 0; r < R; r++) {
            o->scale[k][r] = scales[k * R + r] & 15;
            o->min[k][r] = scales[k * R + r] >> 4;
        }
    load_f16s(o->d, p + 80 * R, R);
    load_f16s(o->m, p + 82 * R, R);
    for (int r = 0; r < R; r++) o->m[r] = -o->m[r];
}

/* Q3_K, 110 bytes:  | hmask[32] | qs[64] | scales[12] | d f16 |
 *     qs as in Q2_K; bit g of hmask[j] is the third bit of element j of group g
 *     scales: 16 x 6 bits; low four bits of scale i: nibble i/8 of byte i%8; high two bits: bits
 *     2(i/4) of byte 8 + i%4
 *     value = d * (scale - 32) * (q - 4) */
INLINE void unpack_q3_k(const uint8_t *restrict p, int R, int g, struct panel *restrict o)
{
    const uint8_t *qs = p + (32 + 32 * (g / 4)) * R, *scales = p + 96 * R;
    join_bits(o->unpacked, qs, 32 * R, 2 * (g % 4), 3, p, g, 1, 2);
    for (int i = 2 * g; i < 2 * g + 2; i++)
        for (int r = 0; r < R; r++) {
            int low = scales[i % 8 * R + r] >> 4 * (i / 8) & 15;
            int top = scales[(8 + i % 4) * R + r] >> 2 * (i / 4) & 3;
            o->scale[i % 2][r] = (low | top << 4) - 32;
        }
    load_f16s(o->d, p + 108 * R, R);
}

/* Q4_K and Q5_K keep 8 scales and 8 mins of 6 bits in 12 bytes:
 *     byte 0-3    scale 0-3 in bits 0-5, bits 6-7: the top of scale 4-7
 *     byte 4-7    min 0-3 likewise,      bits 6-7: the top of min 4-7
 *     byte 8-11   low nibble scale 4-7, high nibble min 4-7
 * value = d * scale * q - dmin * min; both products are exact, so they become d and m. */
INLINE void unpack_k_scales(const uint8_t *restrict p, int R, int g, struct panel *restrict o)
{
    const uint8_t *s = p + 4 * R;
    load_f16s(o->d, p, R);
    load_f16s(o->m, p + 2 * R, R);
    for (int r = 0; r < R; r++) {
        int first = s[g % 4 * R + r], second = s[(g % 4 + 4) * R + r], third = s[(g % 4 + 8) * R + r];
        int scale = g < 4 ? first & 63 : (third & 15) | first >> 6 << 4;
        int min = g < 4 ? second & 63 : third >> 4 | second >> 6 << 4;
        o->d[r] *= (float)scale;
        o->m[r] *= -(float)min;
    }
}

/* Q4_K, 144 bytes:  | d f16 | dmin f16 | scales[12] | qs[128] |
 *     32 bytes of qs hold two groups: the even one in the low nibbles */
INLINE void unpack_q4_k(const uint8_t *restrict p, int R, int g, struct panel *restrict o)
{
    const uint8_t *qs = p + (16 + 32 * (g / 2)) * R;
    take_bits(o->unpacked, qs, 32 * R, 4 * (g % 2), 15);
    unpack_k_scales(p, R, g, o);
}

/* Q5_K, 176 bytes:  | d f16 | dmin f16 | scales[12] | qh[32] | qs[128] |
 *     bit g of qh[j] is the fifth bit of element j of group g */
INLINE void unpack_q5_k(const uint8_t *restrict p, int R, int g, struct panel *restrict o)
{
    const uint8_t *qs = p + (48 + 32 * (g / 2)) * R, *qh = p + 16 * R;
    join_bits(o->unpacked, qs, 32 * R, 4 * (g % 2), 15, qh, g, 1, 4);
    unpack_k_scales(p, R, g, o);
}

/* Q6_K, 210 bytes:  | ql[128] | qh[64] | scales[16] int8 | d f16 |
 *     in each half of 128 elements (64 bytes of ql, 32 of qh) group k = 0..3 has its low four bits in
 *     nibble k/2 of ql[32 (k%2) + j] and its high two in bits 2k of qh[j]
 *     value = d * scale * (q - 32) */
INLINE void unpack_q6_k(const uint8_t *restrict p, int R, int g, struct panel *restrict o)
{
    int half = g / 4, k = g % 4;
    const uint8_t *ql = p + (64 * half + 32 * (k % 2)) * R, *qh = p + (128 + 32 * half) * R;
    const uint8_t *scales = p + (192 + 2 * g) * R;
    join_bits(o->unpacked, ql, 32 * R, 4 * (k / 2), 15, qh, 2 * k, 3, 4);
    for (int h = 0; h < 2; h++)
        for (int r = 0; r < R; r++) o->scale[h][r] = (int8_t)scales[h * R + r];
    load_f16s(o->d, p + 208 * R, R);
}

/* Tensor types by their number in GGUF. */
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11,
       Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, BF16 = 30 };

/* Group g of the block at p in R interleaved rows. R is a constant in every call. */
INLINE void unpack(int type, const uint8_t *restrict p, int R, int g, struct panel *restrict o)
{
    o->code = (const int8_t *)o->unpacked;
    switch (type) {
    case Q4_0: unpack_q4_0(p, R, o); break;
    case Q4_1: unpack_q4_1(p, R, o); break;
    case Q5_0: unpack_q5_0(p, R, o); break;
    case Q5_1: unpack_q5_1(p, R, o); break;
    case Q8_0: unpack_q8_0(p, R, o); break;
    case Q2_K: unpack_q2_k(p, R, g, o); break;
    case Q3_K: unpack_q3_k(p, R, g, o); break;
    case Q4_K: unpack_q4_k(p, R, g, o); break;
    case Q5_K: unpack_q5_k(p, R, g, o); break;
    case Q6_K: unpack_q6_k(p, R, g, o); break;
    case IQ4_NL: unpack_iq4_nl(p, R, o); break;
    }
}

struct format {
    int type;
    const char *name;
    int elements, bytes;              /* of a block */
    int bias;                         /* what codes are too large by */
    int has_min, has_halves;          /* m and min; scales that differ between the halves */
    int is_wide;                      /* codes use all 8 bits and are signed; others are 0 .. 63 */
    struct { int at, bytes, unit; } field[3]; /* how a tile interleaves a block's bytes */
};

static const struct format formats[] = {
    /* type, name, elements, bytes, bias, min, halves, wide, fields {at, bytes, unit} */
    {F32, "F32", 1, 4, 0, 0, 0, 0, {{0}}},
    {F16, "F16", 1, 2, 0, 0, 0, 0, {{0}}},
    {BF16, "BF16", 1, 2, 0, 0, 0, 0, {{0}}},
    {Q4_0, "Q4_0", 32, 18, 8, 0, 0, 0, {{0, 2, 2}, {2, 16, 4}}},
    {Q4_1, "Q4_1", 32, 20, 0, 1, 0, 0, {{0, 4, 2}, {4, 16, 4}}},
    {Q5_0, "Q5_0", 32, 22, 16, 0, 0, 0, {{0, 2, 2}, {2, 20, 4}}},
    {Q5_1, "Q5_1", 32, 24, 0, 1, 0, 0, {{0, 4, 2}, {4, 20, 4}}},
    {Q8_0, "Q8_0", 32, 34, 0, 0, 0, 1, {{0, 2, 2}, {2, 32, 4}}},
    {Q2_K, "Q2_K", 256, 84, 0, 1, 1, 0, {{0, 16, 1}, {16, 64, 4}, {80, 4, 2}}},
    {Q3_K, "Q3_K", 256, 110, 4, 0, 1, 0, {{0, 96, 4}, {96, 12, 1}, {108, 2, 2}}},
    {Q4_K, "Q4_K", 256, 144, 0, 1, 0, 0, {{0, 4, 2}, {4, 12, 1}, {16, 128, 4}}},
    {Q5_K, "Q5_K", 256, 176, 0, 1, 0, 0, {{0, 4, 2}, {4, 12, 1}, {16, 160, 4}}},
    {Q6_K, "Q6_K", 256, 210, 32, 0, 1, 0, {{0, 192, 4}, {192, 16, 1}, {208, 2, 2}}},
    {IQ4_NL, "IQ4_NL", 32, 18, 0, 0, 0, 1, {{0, 2, 2}, {2, 16, 4}}},
};

enum { MAX_BLOCK_BYTES = 210, MAX_BYTES_OF_32 = 34 }; /* Q6_K; Q8_0 */

static const struct format *find_format(uint32_t type)
{
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if ((uint32_t)formats[i].type == type) return &formats[i];
    return NULL;
}

INLINE int is_float(const struct format *f) { return f->elements == 1; }

/* A weight matrix: y = W x for x [cols], y [rows]. Rows lie one after the other as in the file, or in
 * tiles of 32 interleaved rows, block after block. The last tile is filled up with zero rows. */
struct matrix {
    const struct format *format;
    int rows, cols, tiled;
    size_t row_bytes;
    const uint8_t *data;
};

INLINE int n_tiles(const struct matrix *w) { return (w->rows + TILE_ROWS - 1) / TILE_ROWS; }

/* n units of each row, side by side. */
INLINE void interleave(uint8_t *to, const uint8_t *from, size_t row_bytes, int n_rows, int n, int unit)
{
    for (int k = 0; k < n; k++)
        for (int r = 0; r < n_rows; r++)
            memcpy(to + (k * TILE_ROWS + r) * unit, from + r * row_bytes + k * unit, unit);
}

/* The same for all rows of a tile and units of 4 bytes, two rows and two units at a time: most of what
 * opening a model does. first and second are in memory's order, whatever the CPU's. */
INLINE void interleave_words(uint8_t *to, const uint8_t *from, size_t row_bytes, int n)
{
    int k = 0;
    for (; k + 2 <= n; k += 2)
        for (int r = 0; r < TILE_ROWS; r += 2) {
            uint64_t a, b, first, second;
            memcpy(&a, from + r * row_bytes + 4 * k, 8);
            memcpy(&b, from + (r + 1) * row_bytes + 4 * k, 8);
            first = BIG_ENDIAN_CPU ? a >> 32 << 32 | b >> 32 : (uint32_t)a | b << 32;
            second = BIG_ENDIAN_CPU ? a << 32 | (uint32_t)b : a >> 32 | b >> 32 << 32;
            memcpy(to + (k * TILE_ROWS + r) * 4, &first, 8);
            memcpy(to + ((k + 1) * TILE_ROWS + r) * 4, &second, 8);
        }
    interleave(to + k * TILE_ROWS * 4, from + 4 * k, row_bytes, TILE_ROWS, n - k, 4);
}

/* n_blocks blocks of n_rows rows as tiles; rows that are missing become zeros. */
static void make_tile(uint8_t *tile, const uint8_t *rows, size_t row_bytes, int n_rows, int n_blocks,
                      const struct format *f)
{
    if (n_rows < TILE_ROWS) memset(tile, 0, (size_t)n_blocks * TILE_ROWS * f->bytes);
    for (int b = 0; b < n_blocks; b++, tile += TILE_ROWS * f->bytes, rows += f->bytes)
        for (int k = 0; k < 3 && f->field[k].unit; k++) {
            int at = f->field[k].at, unit = f->field[k].unit, n = f->field[k].bytes / unit;
            uint8_t *to = tile + TILE_ROWS * at;
            /* the same thing thrice: with constants a memcpy is one instruction */
            if (unit == 4 && n_rows == TILE_ROWS) interleave_words(to, rows + at, row_bytes, n);
            else if (unit == 2) interleave(to, rows + at, row_bytes, n_rows, n, 2);
            else interleave(to, rows + at, row_bytes, n_rows, n, unit);
        }
}

/* Block number k (of 32 or 256 elements) of row r, as it lay in the file. */
static const uint8_t *block_of_row(const struct matrix *w, int r, int k, uint8_t buffer[MAX_BLOCK_BYTES])
{
    const struct format *f = w->format;
    if (!w->tiled) return w->data + r * w->row_bytes + (size_t)k * f->bytes;
    size_t blocks = (size_t)w->cols / f->elements, tile = (size_t)(r / TILE_ROWS) * blocks + k;
    const uint8_t *from = w->data + tile * TILE_ROWS * f->bytes;
    for (int j = 0; j < 3 && f->field[j].unit; j++)
        for (int at = f->field[j].at, u = f->field[j].unit, end = at + f->field[j].bytes; at < end; at += u)
            memcpy(buffer + at, from + TILE_ROWS * at + u * (r % TILE_ROWS), u);
    return buffer;
}

/* 32 elements, unpacked from one row, as float32: the values of the `gguf` package, bit for bit. An
 * f16 times a sub-scale of at most 8 bits is exact, so each value is rounded at most twice, as there. */
INLINE void dequantize_group(const struct format *f, const struct panel *o, float *out)
{
    for (int half = 0; half < 2; half++, out += 16) {
        const int8_t *code = o->code + 16 * half;
        float d = o->d[0] * (float)(f->has_halves ? o->scale[half][0] : 1);
        float m = f->has_min ? o->m[0] * (float)(f->has_halves ? o->min[half][0] : 1) : 0;
        for (int j = 0; j < 16; j++) out[j] = d * (float)(code[j] - f->bias);
        for (int j = 0; f->has_min && j < 16; j++) out[j] += m;
    }
}

INLINE void dequantize_plain(const struct matrix *w, int r, float *out)
{
    const struct format *f = w->format;
    const uint8_t *p = w->data + r * w->row_bytes;
    uint8_t buffer[MAX_BLOCK_BYTES];
    struct panel o;
    if (f->type == F32)
        for (int j = 0; j < w->cols; j++) out[j] = float_of(load_u32_le(p + 4 * (size_t)j));
    if (f->type == F16)
        for (int j = 0; j < w->cols; j++) out[j] = f16_to_f32(load_u16_le(p + 2 * (size_t)j));
    if (f->type == BF16)
        for (int j = 0; j < w->cols; j++) out[j] = bf16_to_f32(load_u16_le(p + 2 * (size_t)j));
    for (int k = 0; !is_float(f) && k < w->cols / f->elements; k++) {
        const uint8_t *block = block_of_row(w, r, k, buffer);
        for (int g = 0; g < f->elements / 32; g++, out += 32) {
            unpack(f->type, block, 1, g, &o);
            dequantize_group(f, &o, out);
        }
    }
}

/* ==== 3. Activations ============================================================================
 *
 * In the default mode a matrix meets its input as int8: blocks of 32 with one float scale (README,
 * rule 1), so that the dot product inside a block is exact in int32 and any order gives it. */
struct xblock {
    float d;               /* value of element j: d * code[j] */
    float d_sum;           /* d times the sum of the codes, for formats with a minimum */
    int32_t sum[2];        /* of the codes in each half */
    int32_t minus_8_sums;  /* -8 times both: what unsigned Q4_0 nibbles are too large by */
    int32_t unused[3];     /* 64 bytes: a cache line */
    int8_t code[32];
};

INLINE void quantize_plain(struct xblock *out, const float *x, int n)
{
    for (; n > 0; n -= 32, x += 32, out++) {
        uint32_t amax_bits = 0; /* as integers, so that NaN is larger than everything */
        for (int j = 0; j < 32; j++) {
            uint32_t a = bits_of(x[j]) & 0x7fffffff;
            amax_bits = a > amax_bits ? a : amax_bits;
        }
        float amax = float_of(amax_bits), to_code = 127.0f / amax;
        out->d = amax / 127.0f;
        if (amax_bits >= 0x7f800000) out->d = float_of(0x7fc00000);
        if (amax_bits >= 0x7f800000 || amax < 0x1p-100f) to_code = 0; /* d alone carries the NaN */
        if (amax < 0x1p-100f) out->d = 0;
        int32_t code[32], sum[2] = {0, 0}, mask = to_code == 0 ? 0 : -1;
        for (int j = 0; j < 32; j++) code[j] = round_to_int(x[j] * to_code) & mask;
        for (int j = 0; j < 32; j++) out->code[j] = (int8_t)code[j];
        for (int j = 0; j < 16; j++) sum[0] += code[j], sum[1] += code[j + 16];
        out->sum[0] = sum[0];
        out->sum[1] = sum[1];
        out->minus_8_sums = -8 * (sum[0] + sum[1]);
        out->d_sum = (float)(sum[0] + sum[1]) * out->d;
    }
}

/* ==== 4. Dot products: the definition ===========================================================
 *
 * There are two kernels for int8 activations (Q4_0 tiles, and panels for every other format): they
 * multiply TILE_ROWS rows by n vectors and add to acc [n][TILE_ROWS]. The one for floats takes at most
 * as many rows and sets acc. The fourth is attention's weighted sum. Every twin in section 5 has the
 * signature of its definition here and the same numbered steps; tests compare them with memcmp. */

enum {
    Q4_0_TILE_BLOCK = TILE_ROWS * 18,   /* bytes of 32 rows x 32 columns: 9 cache lines */
    Q4_0_CODES = TILE_ROWS * 2,   /* where the nibbles begin: 4 groups of 4 bytes for each row */
    Q4_0_QUAD = TILE_ROWS * 4,
};

/* Asks for memory before it is needed, a little with each block, because a burst stalls. FETCH_FROM: with
 * that many vectors a Q4_0 tile is multiplied again and again, and meanwhile the next tile comes; left to
 * itself the machine notices too late where a tile ends (prompt x1.2). One vector is a stream that needs
 * no help. FETCH_AHEAD: bytes ahead of panels, which are unpacked field by field, as no machine foresees
 * (Q6_K 9 -> 27 GB/s on one core, Q4_K 7 -> 21). FETCH_STREAM: bytes ahead in attention's values. */
enum { FETCH_FROM = 4, FETCH_AHEAD = 8192, FETCH_STREAM = 2048 };

INLINE void fetch(const uint8_t *p, size_t n_bytes)
{
    for (size_t at = 0; at < n_bytes; at += 64) __builtin_prefetch(p + at);
}

typedef void mul_q4_0(const uint8_t *tile, int n_blocks, const struct xblock *x, size_t x_stride,
                      int n, float (*acc)[TILE_ROWS]);

static void mul_q4_0_scalar(const uint8_t *tile, int n_blocks, const struct xblock *x,
                            size_t x_stride, int n, float (*acc)[TILE_ROWS])
{
    for (int b = 0; b < n_blocks; b++, tile += Q4_0_TILE_BLOCK)
        for (int i = 0; i < n; i++)
            for (int r = 0; r < TILE_ROWS; r++) {
                const struct xblock *xb = x + i * x_stride + b;
                int32_t isum = xb->minus_8_sums;                       /* 1. nibbles are code + 8 */
                for (int j = 0; j < 16; j++) {                         /* 2. exact integer dot */
                    int byte = tile[Q4_0_CODES + Q4_0_QUAD * (j / 4) + 4 * r + j % 4];
                    isum += (byte & 15) * xb->code[j] + (byte >> 4) * xb->code[j + 16];
                }
                float d = f16_to_f32(load_u16_le(tile + 2 * r));       /* 3. scale, accumulate */
                acc[i][r] = fma_of(HARD_FMA, (float)isum, d * xb->d, acc[i][r]);
            }
}

/* Every other integer format: panels. */
enum { PANELS = 8 }; /* unpacked at a time: 256 columns, one super-block */

typedef void mul_panel(const struct panel *p, int n_blocks, const struct format *f,
                       const struct xblock *x, size_t x_stride, int n, float (*acc)[TILE_ROWS]);

static void mul_panel_scalar(const struct panel *p, int n_blocks, const struct format *f,
                             const struct xblock *x, size_t x_stride, int n,
                             float (*acc)[TILE_ROWS])
{
    for (int b = 0; b < n_blocks; b++, p++)
        for (int i = 0; i < n; i++)
            for (int r = 0; r < TILE_ROWS; r++) {
                const struct xblock *xb = x + i * x_stride + b;
                int32_t half[2] = {0, 0};
                for (int j = 0; j < 32; j++)                           /* 1. exact integer dots */
                    half[j / 16] += (p->code[(j / 4 * TILE_ROWS + r) * 4 + j % 4] - f->bias) * xb->code[j];
                int32_t isum = half[0] + half[1], msum = xb->sum[0] + xb->sum[1];
                if (f->has_halves) isum = half[0] * p->scale[0][r] + half[1] * p->scale[1][r]; /* 2. */
                acc[i][r] = fma_of(HARD_FMA, (float)isum, p->d[r] * xb->d, acc[i][r]); /* 3. scale */
                if (!f->has_min) continue;
                if (f->has_halves) msum = xb->sum[0] * p->min[0][r] + xb->sum[1] * p->min[1][r];
                acc[i][r] = fma_of(HARD_FMA, p->m[r], (float)msum * xb->d, acc[i][r]); /* 4. minimum */
            }
}

/* Element j of a row of floats as a file or the KV cache stores them. */
INLINE float load_float(int type, const uint8_t *row, size_t j)
{
    if (type == F16) return f16_to_f32(load_u16_le(row + 2 * j));
    if (type == BF16) return bf16_to_f32(load_u16_le(row + 2 * j));
    return float_of(load_u32_le(row + 4 * j));
}

/* Floats (README, rule 4): element j goes to lane j mod 16 by fma, then the lanes join as a tree. A row of
 * floats stays as it is, so a register holds 16 columns of one row here, not 16 rows: that is why the
 * contract's order has 16 lanes. n_rows <= 32. */
typedef void mul_floats(int type, const uint8_t *rows, size_t row_bytes, int n_rows, const float *x,
                        size_t x_stride, int n, int cols, float (*acc)[TILE_ROWS]);

INLINE float join_lanes(float lane[16])
{
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}

static void mul_floats_scalar(int type, const uint8_t *rows, size_t row_bytes, int n_rows,
                              const float *x, size_t x_stride, int n, int cols,
                              float (*acc)[TILE_ROWS])
{
    for (int i = 0; i < n; i++, x += x_stride)
        for (int r = 0; r < n_rows; r++) {
            float lane[16] = {0};
            for (int j = 0; j < cols; j++)                             /* 1. into 16 lanes */
                lane[j % 16] = fma_of(HARD_FMA, load_float(type, rows + r * row_bytes, j), x[j],
                                      lane[j % 16]);
            acc[i][r] = join_lanes(lane);                              /* 2. the tree */
        }
}

/* Attention's weighted sum of values: out[i][j] = fma(e[i][p], v[p][j], out[i][j]) over positions p
 * in order, for n queries and a slice of a head: width elements, MIX_WIDTH of them but at a head's end. */
enum { MIX_WIDTH = 32 };

struct mix {
    int type;
    const uint8_t *v;        /* [n_pos][width], v_bytes apart */
    size_t v_bytes;
    int n_pos;
    const float *e;          /* [n][n_pos], e_stride apart */
    size_t e_stride;
    float *out;              /* [n][width], out_stride apart */
    size_t out_stride;
    int n, width;
};
typedef void mix_values(const struct mix *m);

static void mix_values_scalar(const struct mix *m)
{
    for (int i = 0; i < m->n; i++)
        for (int j = 0; j < m->width; j++) {
            float sum = m->out[i * m->out_stride + j];
            for (int p = 0; p < m->n_pos; p++)
                sum = fma_of(HARD_FMA, m->e[i * m->e_stride + p],
                             load_float(m->type, m->v + p * m->v_bytes, j), sum);
            m->out[i * m->out_stride + j] = sum;
        }
}

/* ==== 5. Dot products: AVX2, AVX-512, NEON ======================================================
 *
 * The twins: the same numbered steps (step 1 may come after step 2: integer sums have no order), and a
 * reader may pass over this section, because each function computes what its namesake above does.
 *
 * A vector register holds 4, 8 or 16 numbers (lanes); one instruction does the same to all. On x86: set1
 * copies a number to all lanes, loadu and storeu move memory, maddubs multiplies unsigned by signed bytes
 * and adds neighbours to int16, madd adds int16 neighbours to int32, dpbusd (VNNI) does both at once, cvtph
 * widens F16, fmadd is fma in each lane. On ARM: vdup, vld1, vst1, vmull and vpadal, vdot, vmmla.
 *
 * NT is the number of vectors taken at once: a constant in each call, so that INLINE makes a copy of the
 * code for it and sums stay in registers; what is left over is taken one by one. Suffixes: _nt the inner
 * kernel, _of the loop over vectors for one kind of format. */

#if defined(HAVE_X86)
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")))
#define VNNI __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE_AVX2 static inline AVX2 __attribute__((always_inline))
#define INLINE_AVX512 static inline AVX512 __attribute__((always_inline))
#define INLINE_VNNI static inline VNNI __attribute__((always_inline))

INLINE int32_t load_4_bytes(const int8_t *p)
{
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

/* A 256-bit register holds 8 rows x 4 bytes: rows 8h .. 8h+7 of the tile for h in h0 .. h0+NH-1. */
INLINE_AVX2 void mul_q4_0_avx2_nt(const uint8_t *tile, int n_blocks, const struct xblock *x,
                                  size_t x_stride, float (*acc)[TILE_ROWS], int NT, int h0, int NH,
                                  size_t ahead)
{
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256 sum[8][4];
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++) sum[i][h] = _mm256_loadu_ps(acc[i] + 8 * (h0 + h));
    for (int b = 0; b < n_blocks; b++, tile += Q4_0_TILE_BLOCK, x++) {
        const uint8_t *codes = tile + Q4_0_CODES + 32 * h0;
        if (ahead) fetch(tile + ahead, Q4_0_TILE_BLOCK);
        __m256i dot[8][4];
        UNROLL for (int i = 0; i < NT; i++)
            UNROLL for (int h = 0; h < NH; h++) dot[i][h] = _mm256_setzero_si256();
        UNROLL for (int g = 0; g < 4; g++)                             /* 2. exact integer dot: */
            UNROLL for (int h = 0; h < NH; h++) {                      /* 16 * 15 * 127 fits int16 */
                __m256i w = _mm256_loadu_si256((const __m256i *)(codes + Q4_0_QUAD * g + 32 * h));
                __m256i low = _mm256_and_si256(w, nibble);
                __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
                UNROLL for (int i = 0; i < NT; i++) {
                    const int8_t *c = x[i * x_stride].code + 4 * g;
                    __m256i a = _mm256_maddubs_epi16(low, _mm256_set1_epi32(load_4_bytes(c)));
                    __m256i z = _mm256_maddubs_epi16(high, _mm256_set1_epi32(load_4_bytes(c + 16)));
                    dot[i][h] = _mm256_add_epi16(_mm256_add_epi16(dot[i][h], a), z);
                }
            }
        UNROLL for (int h = 0; h < NH; h++) {                          /* 3. scale, accumulate */
            __m256 d = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(tile + 16 * (h0 + h))));
            UNROLL for (int i = 0; i < NT; i++) {
                const struct xblock *xb = x + i * x_stride;
                __m256i isum = _mm256_add_epi32(_mm256_madd_epi16(dot[i][h], ones), /* 1. */
                                                _mm256_set1_epi32(xb->minus_8_sums));
                sum[i][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(isum),
                                            _mm256_mul_ps(d, _mm256_set1_ps(xb->d)), sum[i][h]);
            }
        }
    }
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++) _mm256_storeu_ps(acc[i] + 8 * (h0 + h), sum[i][h]);
}

AVX2 static void mul_q4_0_avx2(const uint8_t *tile, int n_blocks, const struct xblock *x,
                               size_t x_stride, int n, float (*acc)[TILE_ROWS])
{
    size_t ahead = n >= FETCH_FROM ? (size_t)n_blocks * Q4_0_TILE_BLOCK : 0;
    for (; n >= 8; n -= 8, x += 8 * x_stride, acc += 8)
        for (int h = 0; h < 4; h++, ahead = 0)
            mul_q4_0_avx2_nt(tile, n_blocks, x, x_stride, acc, 8, h, 1, ahead);
    for (; n >= 2; n -= 2, x += 2 * x_stride, acc += 2)
        for (int h = 0; h < 4; h += 2, ahead = 0)
            mul_q4_0_avx2_nt(tile, n_blocks, x, x_stride, acc, 2, h, 2, ahead);
    if (n) mul_q4_0_avx2_nt(tile, n_blocks, x, x_stride, acc, 1, 0, 4, 0);
}

/* Steps 2 to 4 for rows 8h .. 8h+7. A half's sum times its scale stays below 2^24 (Q6_K: 16 * 32 * 127 *
 * 128, and the two together), so that their float products and sum are exact. */
INLINE_AVX2 __m256 finish_panel_avx2(const struct panel *p, const struct format *f, const struct xblock *x,
                                     const __m256i half[2], __m256 sum, int h, int HALVES)
{
    __m256 isum, msum, xd = _mm256_set1_ps(x->d);
    if (HALVES) {                                                      /* 2. halves */
        __m256 s0 = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(p->scale[0] + 8 * h)));
        __m256 s1 = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(p->scale[1] + 8 * h)));
        isum = _mm256_fmadd_ps(s1, _mm256_cvtepi32_ps(half[1]), _mm256_mul_ps(s0, _mm256_cvtepi32_ps(half[0])));
    } else isum = _mm256_cvtepi32_ps(half[0]);
    sum = _mm256_fmadd_ps(isum, _mm256_mul_ps(_mm256_loadu_ps(p->d + 8 * h), xd), sum); /* 3. scale */
    if (!f->has_min) return sum;                                       /* 4. minimum */
    msum = _mm256_set1_ps(x->d_sum);
    if (HALVES) {
        __m256 m0 = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(p->min[0] + 8 * h)));
        __m256 m1 = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(p->min[1] + 8 * h)));
        msum = _mm256_mul_ps(_mm256_set1_ps((float)x->sum[0]), m0);
        msum = _mm256_mul_ps(_mm256_fmadd_ps(_mm256_set1_ps((float)x->sum[1]), m1, msum), xd);
    }
    return _mm256_fmadd_ps(_mm256_loadu_ps(p->m + 8 * h), msum, sum);
}

/* maddubs wants one unsigned side. Codes of 0 .. 63 are unsigned, and two of their pairs fit int16:
 * 4 * 63 * 127. A wide code goes as |code| * (x with code's sign): 2 * 128 * 127 just fits. */
INLINE_AVX2 void mul_panel_avx2_nt(const struct panel *p, int n_blocks, const struct format *f,
                                   const struct xblock *x, size_t x_stride, float (*acc)[TILE_ROWS],
                                   int h, int NT, int HALVES, int WIDE)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 sum[4];
    UNROLL for (int i = 0; i < NT; i++) sum[i] = _mm256_loadu_ps(acc[i] + 8 * h);
    for (int b = 0; b < n_blocks; b++, p++, x++) {
        __m256i half[4][2];
        UNROLL for (int i = 0; i < NT; i++) {
            const struct xblock *xb = x + i * x_stride;
            half[i][0] = _mm256_set1_epi32(-f->bias * (HALVES ? xb->sum[0] : xb->sum[0] + xb->sum[1]));
            half[i][1] = _mm256_set1_epi32(-f->bias * xb->sum[1]);
        }
        UNROLL for (int g = 0; g < 8; g += 2) {                        /* 1. exact integer dots */
            __m256i w0 = _mm256_loadu_si256((const __m256i *)(p->code + 4 * TILE_ROWS * g + 32 * h));
            __m256i w1 = _mm256_loadu_si256((const __m256i *)(p->code + 4 * TILE_ROWS * (g + 1) + 32 * h));
            UNROLL for (int i = 0; i < NT; i++) {
                const int8_t *c = x[i * x_stride].code + 4 * g;
                __m256i x0 = _mm256_set1_epi32(load_4_bytes(c)), x1 = _mm256_set1_epi32(load_4_bytes(c + 4));
                __m256i *to = &half[i][HALVES ? g / 4 : 0];
                if (WIDE) {
                    x0 = _mm256_maddubs_epi16(_mm256_abs_epi8(w0), _mm256_sign_epi8(x0, w0));
                    x1 = _mm256_maddubs_epi16(_mm256_abs_epi8(w1), _mm256_sign_epi8(x1, w1));
                    *to = _mm256_add_epi32(*to, _mm256_add_epi32(_mm256_madd_epi16(x0, ones),
                                                                 _mm256_madd_epi16(x1, ones)));
                } else {
                    x0 = _mm256_add_epi16(_mm256_maddubs_epi16(w0, x0), _mm256_maddubs_epi16(w1, x1));
                    *to = _mm256_add_epi32(*to, _mm256_madd_epi16(x0, ones));
                }
            }
        }
        UNROLL for (int i = 0; i < NT; i++)
            sum[i] = finish_panel_avx2(p, f, x + i * x_stride, half[i], sum[i], h, HALVES);
    }
    UNROLL for (int i = 0; i < NT; i++) _mm256_storeu_ps(acc[i] + 8 * h, sum[i]);
}

INLINE_AVX2 void mul_panel_avx2_of(const struct panel *p, int n_blocks, const struct format *f,
                                   const struct xblock *x, size_t x_stride, int n,
                                   float (*acc)[TILE_ROWS], int HALVES, int WIDE)
{
    for (; n >= 4; n -= 4, x += 4 * x_stride, acc += 4)
        for (int h = 0; h < 4; h++) mul_panel_avx2_nt(p, n_blocks, f, x, x_stride, acc, h, 4, HALVES, WIDE);
    for (; n >= 1; n--, x += x_stride, acc++)
        for (int h = 0; h < 4; h++) mul_panel_avx2_nt(p, n_blocks, f, x, x_stride, acc, h, 1, HALVES, WIDE);
}

AVX2 static void mul_panel_avx2(const struct panel *p, int n_blocks, const struct format *f,
                                const struct xblock *x, size_t x_stride, int n,
                                float (*acc)[TILE_ROWS])
{
    if (f->is_wide) mul_panel_avx2_of(p, n_blocks, f, x, x_stride, n, acc, 0, 1);
    else if (f->has_halves) mul_panel_avx2_of(p, n_blocks, f, x, x_stride, n, acc, 1, 0);
    else mul_panel_avx2_of(p, n_blocks, f, x, x_stride, n, acc, 0, 0);
}

INLINE_AVX2 __m256 load_8_avx2(int type, const uint8_t *row, size_t j)
{
    if (type == F32) return _mm256_loadu_ps((const float *)(const void *)(row + 4 * j));
    __m128i half = _mm_loadu_si128((const __m128i *)(const void *)(row + 2 * j));
    if (type == F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* low: lanes 0-7, high: lanes 8-15 */
INLINE_AVX2 float join_avx2(__m256 low, __m256 high)
{
    __m256 eight = _mm256_add_ps(low, high);                           /* lane j + lane j+8 */
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* Elements past the last multiple of 16 reach their lanes through memory. */
INLINE_AVX2 float finish_avx2(int type, const uint8_t *row, const float *x, int j, int cols,
                              const __m256 sum[2])
{
    if (j == cols) return join_avx2(sum[0], sum[1]);
    float lane[16];
    _mm256_storeu_ps(lane, sum[0]);
    _mm256_storeu_ps(lane + 8, sum[1]);
    for (; j < cols; j++) lane[j % 16] = fma_of(1, load_float(type, row, j), x[j], lane[j % 16]);
    return join_lanes(lane);
}

INLINE_AVX2 void mul_floats_avx2_nt(int type, const uint8_t *rows, size_t row_bytes, const float *x,
                                    size_t x_stride, int cols, float (*acc)[TILE_ROWS], int r0,
                                    int RT, int NT)
{
    __m256 sum[4][4][2];
    UNROLL for (int r = 0; r < RT; r++)
        UNROLL for (int i = 0; i < NT; i++) sum[r][i][0] = sum[r][i][1] = _mm256_setzero_ps();
    int j = 0;
    for (; j + 16 <= cols; j += 16)                                    /* 1. into 16 lanes */
        UNROLL for (int k = 0; k < 2; k++)
            UNROLL for (int r = 0; r < RT; r++) {
                __m256 w = load_8_avx2(type, rows + (r0 + r) * row_bytes, j + 8 * k);
                UNROLL for (int i = 0; i < NT; i++)
                    sum[r][i][k] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i * x_stride + j + 8 * k),
                                                   sum[r][i][k]);
            }
    UNROLL for (int r = 0; r < RT; r++)                                /* 2. the tree */
        UNROLL for (int i = 0; i < NT; i++)
            acc[i][r0 + r] = finish_avx2(type, rows + (r0 + r) * row_bytes, x + i * x_stride, j, cols,
                                         sum[r][i]);
}

INLINE_AVX2 void mul_floats_avx2_of(int type, const uint8_t *rows, size_t row_bytes, int n_rows,
                                    const float *x, size_t x_stride, int n, int cols,
                                    float (*acc)[TILE_ROWS])
{
    for (int i = 0; i < n;) {
        int r = 0, nt = n - i >= 2 ? 2 : 1;
        const float *xi = x + i * x_stride;
        if (nt == 2) {
            for (; r + 2 <= n_rows; r += 2)
                mul_floats_avx2_nt(type, rows, row_bytes, xi, x_stride, cols, acc + i, r, 2, 2);
            for (; r < n_rows; r++)
                mul_floats_avx2_nt(type, rows, row_bytes, xi, x_stride, cols, acc + i, r, 1, 2);
        } else {
            for (; r < n_rows; r++)
                mul_floats_avx2_nt(type, rows, row_bytes, xi, x_stride, cols, acc + i, r, 1, 1);
        }
        i += nt;
    }
}

AVX2 static void mul_floats_avx2(int type, const uint8_t *rows, size_t row_bytes, int n_rows,
                                 const float *x, size_t x_stride, int n, int cols,
                                 float (*acc)[TILE_ROWS])
{
    switch (type) { /* the type becomes a constant of the loop */
    case F32: mul_floats_avx2_of(F32, rows, row_bytes, n_rows, x, x_stride, n, cols, acc); break;
    case F16: mul_floats_avx2_of(F16, rows, row_bytes, n_rows, x, x_stride, n, cols, acc); break;
    default: mul_floats_avx2_of(BF16, rows, row_bytes, n_rows, x, x_stride, n, cols, acc);
    }
}

/* Queries i0 .. i0+NT-1, all MIX_WIDTH elements. */
INLINE_AVX2 void mix_avx2_nt(const struct mix *m, int type, int i0, int NT)
{
    __m256 sum[2][4];
    float *out = m->out + i0 * m->out_stride;
    const float *e = m->e + i0 * m->e_stride;
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int k = 0; k < 4; k++) sum[i][k] = _mm256_loadu_ps(out + i * m->out_stride + 8 * k);
    for (int p = 0; p < m->n_pos; p++) {
        __m256 v[4];
        __builtin_prefetch(m->v + p * m->v_bytes + FETCH_STREAM);
        UNROLL for (int k = 0; k < 4; k++) v[k] = load_8_avx2(type, m->v + p * m->v_bytes, 8 * k);
        UNROLL for (int i = 0; i < NT; i++) {
            __m256 ep = _mm256_set1_ps(e[i * m->e_stride + p]);
            UNROLL for (int k = 0; k < 4; k++) sum[i][k] = _mm256_fmadd_ps(ep, v[k], sum[i][k]);
        }
    }
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int k = 0; k < 4; k++) _mm256_storeu_ps(out + i * m->out_stride + 8 * k, sum[i][k]);
}

INLINE_AVX2 void mix_avx2_of(const struct mix *m, int type)
{
    int i = 0;
    for (; i + 2 <= m->n; i += 2) mix_avx2_nt(m, type, i, 2);
    if (i < m->n) mix_avx2_nt(m, type, i, 1);
}

AVX2 static void mix_values_avx2(const struct mix *m)
{
    if (m->width < MIX_WIDTH) mix_values_scalar(m);
    else if (m->type == F16) mix_avx2_of(m, F16);
    else mix_avx2_of(m, F32);
}

/* ---- AVX-512: a register holds 16 rows x 4 bytes, two of them the tile ---- */

/* Macros, because a function compiled for VNNI cannot be inlined into one compiled without it. This is
 * the kernel for one way of adding up products of nibbles: START with what step 1 adds or with nothing,
 * ADD(dot, u, x), FINISH to int32. Six vectors times two registers of rows: each broadcast of four of
 * x's codes serves two products, and all sums stay in registers. */
#define MUL_Q4_0_512(target, suffix, START, ADD, FINISH)                                            \
    static inline target __attribute__((always_inline)) void mul_q4_0_##suffix##_nt(               \
        const uint8_t *tile, int n_blocks, const struct xblock *x, size_t x_stride,                \
        float (*acc)[TILE_ROWS], int NT, size_t ahead)                                             \
    {                                                                                              \
        const __m512i nibble = _mm512_set1_epi8(15);                                               \
        __m512 sum[6][2];                                                                          \
        UNROLL for (int i = 0; i < NT; i++)                                                        \
            UNROLL for (int h = 0; h < 2; h++) sum[i][h] = _mm512_loadu_ps(acc[i] + 16 * h);       \
        for (int b = 0; b < n_blocks; b++, tile += Q4_0_TILE_BLOCK, x++) {                               \
            if (ahead) fetch(tile + ahead, Q4_0_TILE_BLOCK);                                             \
            __m512i dot[6][2];                                                                     \
            UNROLL for (int i = 0; i < NT; i++) dot[i][0] = dot[i][1] = START(x[i * x_stride].minus_8_sums); \
            UNROLL for (int g = 0; g < 4; g++) {                       /* 2. exact integer dot */  \
                __m512i low[2], high[2];                                                           \
                UNROLL for (int h = 0; h < 2; h++) {                                               \
                    __m512i w = _mm512_loadu_si512(tile + Q4_0_CODES + Q4_0_QUAD * g + 64 * h);   \
                    low[h] = _mm512_and_si512(w, nibble);                                          \
                    high[h] = _mm512_and_si512(_mm512_srli_epi16(w, 4), nibble);                   \
                }                                                                                  \
                UNROLL for (int i = 0; i < NT; i++) {                                              \
                    const int8_t *c = x[i * x_stride].code + 4 * g;                                \
                    __m512i c0 = _mm512_set1_epi32(load_4_bytes(c));                               \
                    __m512i c1 = _mm512_set1_epi32(load_4_bytes(c + 16));                          \
                    UNROLL for (int h = 0; h < 2; h++) dot[i][h] = ADD(dot[i][h], low[h], c0);     \
                    UNROLL for (int h = 0; h < 2; h++) dot[i][h] = ADD(dot[i][h], high[h], c1);    \
                }                                                                                  \
            }                                                                                      \
            UNROLL for (int h = 0; h < 2; h++) {                       /* 3. scale, accumulate */  \
                __m512 d = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(tile + 32 * h)));  \
                UNROLL for (int i = 0; i < NT; i++) {                                              \
                    const struct xblock *xb = x + i * x_stride;                                    \
                    __m512i isum = FINISH(dot[i][h], xb->minus_8_sums);     /* 1. code = nibble - 8 */ \
                    sum[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(isum),                          \
                                                _mm512_mul_ps(d, _mm512_set1_ps(xb->d)), sum[i][h]); \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int i = 0; i < NT; i++)                                                        \
            UNROLL for (int h = 0; h < 2; h++) _mm512_storeu_ps(acc[i] + 16 * h, sum[i][h]);       \
    }                                                                                              \
    target static void mul_q4_0_##suffix(const uint8_t *tile, int n_blocks, const struct xblock *x, \
                                         size_t x_stride, int n, float (*acc)[TILE_ROWS])          \
    {                                                                                              \
        size_t ahead = n >= FETCH_FROM ? (size_t)n_blocks * Q4_0_TILE_BLOCK : 0;                         \
        for (; n >= 6; n -= 6, x += 6 * x_stride, acc += 6, ahead = 0)                             \
            mul_q4_0_##suffix##_nt(tile, n_blocks, x, x_stride, acc, 6, ahead);                    \
        for (; n >= 4; n -= 4, x += 4 * x_stride, acc += 4, ahead = 0)                             \
            mul_q4_0_##suffix##_nt(tile, n_blocks, x, x_stride, acc, 4, ahead);                    \
        for (; n >= 1; n--, x += x_stride, acc++)                                                  \
            mul_q4_0_##suffix##_nt(tile, n_blocks, x, x_stride, acc, 1, 0);                        \
    }

INLINE_VNNI __m512i dot4_vnni(__m512i isum, __m512i u, __m512i x) { return _mm512_dpbusd_epi32(isum, u, x); }
INLINE_VNNI __m512i start_vnni(int32_t minus_8_sums) { return _mm512_set1_epi32(minus_8_sums); }
INLINE_VNNI __m512i finish_vnni(__m512i dot, int32_t minus_8_sums) { (void)minus_8_sums; return dot; }
INLINE_AVX512 __m512i start_pairs(int32_t minus_8_sums) { (void)minus_8_sums; return _mm512_setzero_si512(); }
INLINE_AVX512 __m512i add_pairs(__m512i dot, __m512i u, __m512i x) /* 16 * 15 * 127 fits int16 */
{
    return _mm512_add_epi16(dot, _mm512_maddubs_epi16(u, x));
}
INLINE_AVX512 __m512i finish_pairs(__m512i dot, int32_t minus_8_sums)
{
    return _mm512_add_epi32(_mm512_madd_epi16(dot, _mm512_set1_epi16(1)), _mm512_set1_epi32(minus_8_sums));
}
MUL_Q4_0_512(VNNI, avx512vnni, start_vnni, dot4_vnni, finish_vnni)
MUL_Q4_0_512(AVX512, avx512, start_pairs, add_pairs, finish_pairs)

/* Steps 2 to 4 of the panel kernel, as in AVX2, for rows 16h .. 16h+15. */
INLINE_AVX512 __m512 finish_panel_avx512(const struct panel *p, const struct format *f,
                                         const struct xblock *x, const __m512i half[2], __m512 sum,
                                         int h, int HALVES)
{
    __m512 isum, msum, xd = _mm512_set1_ps(x->d);
    if (HALVES) {                                                      /* 2. halves */
        __m512 s0 = _mm512_cvtepi32_ps(_mm512_loadu_si512(p->scale[0] + 16 * h));
        __m512 s1 = _mm512_cvtepi32_ps(_mm512_loadu_si512(p->scale[1] + 16 * h));
        isum = _mm512_fmadd_ps(s1, _mm512_cvtepi32_ps(half[1]), _mm512_mul_ps(s0, _mm512_cvtepi32_ps(half[0])));
    } else isum = _mm512_cvtepi32_ps(half[0]);
    sum = _mm512_fmadd_ps(isum, _mm512_mul_ps(_mm512_loadu_ps(p->d + 16 * h), xd), sum); /* 3. scale */
    if (!f->has_min) return sum;                                       /* 4. minimum */
    msum = _mm512_set1_ps(x->d_sum);
    if (HALVES) {
        __m512 m0 = _mm512_cvtepi32_ps(_mm512_loadu_si512(p->min[0] + 16 * h));
        __m512 m1 = _mm512_cvtepi32_ps(_mm512_loadu_si512(p->min[1] + 16 * h));
        msum = _mm512_mul_ps(_mm512_set1_ps((float)x->sum[0]), m0);
        msum = _mm512_mul_ps(_mm512_fmadd_ps(_mm512_set1_ps((float)x->sum[1]), m1, msum), xd);
    }
    return _mm512_fmadd_ps(_mm512_loadu_ps(p->m + 16 * h), msum, sum);
}

/* VNNI multiplies unsigned by signed in one step. Without it: two steps through int16, where codes of
 * 0 .. 63 fit; a wide code goes as |code| * (x with code's sign). */
INLINE_AVX512 __m512i dot4_avx512(__m512i isum, __m512i u, __m512i x)
{
    __m512i pairs = _mm512_maddubs_epi16(u, x);
    return _mm512_add_epi32(isum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
INLINE_AVX512 __m512i dot4_wide_avx512(__m512i isum, __m512i w, __m512i x)
{
    __m512i signed_x = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x);
    return dot4_avx512(isum, _mm512_abs_epi8(w), signed_x);
}

/* The panel kernel for one way DOT of multiplying; wide codes of value c come as c + FLIP. */
#define MUL_PANEL_512(target, suffix, DOT, DOT_WIDE, FLIP)                                          \
    static inline target __attribute__((always_inline)) void mul_panel_##suffix##_nt(              \
        const struct panel *p, int n_blocks, const struct format *f, const struct xblock *x,       \
        size_t x_stride, float (*acc)[TILE_ROWS], int NT, int HALVES, int WIDE)                    \
    {                                                                                              \
        const int bias = WIDE ? FLIP : f->bias;                                                    \
        __m512 sum[6][2];                                                                          \
        UNROLL for (int i = 0; i < NT; i++)                                                        \
            UNROLL for (int h = 0; h < 2; h++) sum[i][h] = _mm512_loadu_ps(acc[i] + 16 * h);       \
        for (int b = 0; b < n_blocks; b++, p++, x++) {                                             \
            __m512i half[6][2][2];                                                                 \
            UNROLL for (int i = 0; i < NT; i++) {                                                  \
                const int32_t *s = x[i * x_stride].sum;                                            \
                half[i][0][0] = half[i][1][0] = _mm512_set1_epi32(-bias * (HALVES ? s[0] : s[0] + s[1])); \
                half[i][0][1] = half[i][1][1] = _mm512_set1_epi32(-bias * s[1]);                   \
            }                                                                                      \
            UNROLL for (int g = 0; g < 8; g++) {                       /* 1. exact integer dots */ \
                __m512i w[2];                                                                      \
                UNROLL for (int h = 0; h < 2; h++) {                                               \
                    w[h] = _mm512_loadu_si512(p->code + 4 * TILE_ROWS * g + 64 * h);               \
                    if (WIDE && FLIP) w[h] = _mm512_xor_si512(w[h], _mm512_set1_epi8((char)FLIP)); \
                }                                                                                  \
                UNROLL for (int i = 0; i < NT; i++) {                                              \
                    __m512i c = _mm512_set1_epi32(load_4_bytes(x[i * x_stride].code + 4 * g));     \
                    UNROLL for (int h = 0; h < 2; h++) {                                           \
                        __m512i *to = &half[i][h][HALVES ? g / 4 : 0];                             \
                        *to = WIDE ? DOT_WIDE(*to, w[h], c) : DOT(*to, w[h], c);                   \
                    }                                                                              \
                }                                                                                  \
            }                                                                                      \
            UNROLL for (int i = 0; i < NT; i++)                                                    \
                UNROLL for (int h = 0; h < 2; h++)                                                 \
                    sum[i][h] = finish_panel_avx512(p, f, x + i * x_stride, half[i][h], sum[i][h], \
                                                    h, HALVES);                                    \
        }                                                                                          \
        UNROLL for (int i = 0; i < NT; i++)                                                        \
            UNROLL for (int h = 0; h < 2; h++) _mm512_storeu_ps(acc[i] + 16 * h, sum[i][h]);       \
    }                                                                                              \
    static inline target __attribute__((always_inline)) void mul_panel_##suffix##_of(              \
        const struct panel *p, int n_blocks, const struct format *f, const struct xblock *x,       \
        size_t x_stride, int n, float (*acc)[TILE_ROWS], int HALVES, int WIDE)                     \
    {                                                                                              \
        const int NT = HALVES ? 4 : 6;                                                             \
        for (; n >= NT; n -= NT, x += NT * x_stride, acc += NT)                                    \
            mul_panel_##suffix##_nt(p, n_blocks, f, x, x_stride, acc, NT, HALVES, WIDE);           \
        for (; n >= 1; n--, x += x_stride, acc++)                                                  \
            mul_panel_##suffix##_nt(p, n_blocks, f, x, x_stride, acc, 1, HALVES, WIDE);            \
    }                                                                                              \
    target static void mul_panel_##suffix(const struct panel *p, int n_blocks,                     \
                                          const struct format *f, const struct xblock *x,          \
                                          size_t x_stride, int n, float (*acc)[TILE_ROWS])         \
    {                                                                                              \
        if (f->is_wide) mul_panel_##suffix##_of(p, n_blocks, f, x, x_stride, n, acc, 0, 1);        \
        else if (f->has_halves) mul_panel_##suffix##_of(p, n_blocks, f, x, x_stride, n, acc, 1, 0); \
        else mul_panel_##suffix##_of(p, n_blocks, f, x, x_stride, n, acc, 0, 0);                   \
    }
MUL_PANEL_512(AVX512, avx512, dot4_avx512, dot4_wide_avx512, 0)
MUL_PANEL_512(VNNI, avx512vnni, dot4_vnni, dot4_vnni, 128)

INLINE_AVX512 __m512 load_16_avx512(int type, const uint8_t *row, size_t j)
{
    if (type == F32) return _mm512_loadu_ps(row + 4 * j);
    __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)(row + 2 * j));
    if (type == F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Sixteen sums of 16 lanes joined at once: every step adds the halves of two registers and leaves the
 * results side by side in one. sum[r][i] becomes element 4i + r. */
INLINE_AVX512 __m512 join_16_avx512(__m512 sum[4][4])
{
    __m512 eight[8], four[4], two[2];
    UNROLL for (int k = 0; k < 8; k++) {                               /* lane j + lane j+8 */
        __m512 a = sum[k / 2][2 * (k % 2)], b = sum[k / 2][2 * (k % 2) + 1];
        eight[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    UNROLL for (int k = 0; k < 4; k++) {                               /* + 4 */
        __m512 a = eight[2 * k], b = eight[2 * k + 1];
        four[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    UNROLL for (int k = 0; k < 2; k++)                                 /* + 2 */
        two[k] = _mm512_add_ps(_mm512_shuffle_ps(four[2 * k], four[2 * k + 1], 0x44),
                               _mm512_shuffle_ps(four[2 * k], four[2 * k + 1], 0xee));
    return _mm512_add_ps(_mm512_shuffle_ps(two[0], two[1], 0x88),      /* + 1 */
                         _mm512_shuffle_ps(two[0], two[1], 0xdd));
}

INLINE_AVX512 float join_avx512(__m512 sum)
{
    return join_avx2(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
}

/* RT rows times NT vectors: 4 times 4, or 1 times 1. Columns past the last multiple of 16 are masked,
 * so that they leave their lanes untouched. */
INLINE_AVX512 void mul_floats_avx512_nt(int type, const uint8_t *rows, size_t row_bytes,
                                        const float *x, size_t x_stride, int cols,
                                        float (*acc)[TILE_ROWS], int r0, int RT, int NT)
{
    __m512 sum[4][4];
    const __mmask16 rest = (__mmask16)((1 << cols % 16) - 1);
    UNROLL for (int r = 0; r < RT; r++)
        UNROLL for (int i = 0; i < NT; i++) sum[r][i] = _mm512_setzero_ps();
    int j = 0;
    for (; j + 16 <= cols; j += 16)                                    /* 1. into 16 lanes */
        UNROLL for (int r = 0; r < RT; r++) {
            __m512 w = load_16_avx512(type, rows + (r0 + r) * row_bytes, j);
            UNROLL for (int i = 0; i < NT; i++)
                sum[r][i] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + i * x_stride + j), sum[r][i]);
        }
    for (int r = 0; r < RT && rest; r++)
        for (int i = 0; i < NT; i++) {
            float w[16] = {0};
            for (int k = 0; j + k < cols; k++) w[k] = load_float(type, rows + (r0 + r) * row_bytes, j + k);
            sum[r][i] = _mm512_mask3_fmadd_ps(_mm512_loadu_ps(w), _mm512_maskz_loadu_ps(rest, x + i * x_stride + j),
                                              sum[r][i], rest);
        }
    if (RT == 4) {                                                     /* 2. the tree */
        __m512 joined = join_16_avx512(sum);
        _mm_storeu_ps(acc[0] + r0, _mm512_castps512_ps128(joined));
        _mm_storeu_ps(acc[1] + r0, _mm512_extractf32x4_ps(joined, 1));
        _mm_storeu_ps(acc[2] + r0, _mm512_extractf32x4_ps(joined, 2));
        _mm_storeu_ps(acc[3] + r0, _mm512_extractf32x4_ps(joined, 3));
    } else
        UNROLL for (int i = 0; i < NT; i++) acc[i][r0] = join_avx512(sum[0][i]);
}

INLINE_AVX512 void mul_floats_avx512_of(int type, const uint8_t *rows, size_t row_bytes, int n_rows,
                                        const float *x, size_t x_stride, int n, int cols,
                                        float (*acc)[TILE_ROWS])
{
    for (int first = 1; n >= 4; n -= 4, x += 4 * x_stride, acc += 4, first = 0) {
        int r = 0;
        for (; r + 4 <= n_rows; r += 4) {
            if (first) fetch(rows + (r + 8) * row_bytes, 4 * row_bytes); /* four short rows end too soon */
            mul_floats_avx512_nt(type, rows, row_bytes, x, x_stride, cols, acc, r, 4, 4);
        }
        for (; r < n_rows; r++)
            for (int i = 0; i < 4; i++)
                mul_floats_avx512_nt(type, rows, row_bytes, x + i * x_stride, x_stride, cols, acc + i, r, 1, 1);
    }
    for (; n > 0; n--, x += x_stride, acc++) /* in one stream: four at once read 24 GB/s where this reads 32 */
        for (int r = 0; r < n_rows; r++)
            mul_floats_avx512_nt(type, rows, row_bytes, x, x_stride, cols, acc, r, 1, 1);
}

AVX512 static void mul_floats_avx512(int type, const uint8_t *rows, size_t row_bytes, int n_rows,
                                     const float *x, size_t x_stride, int n, int cols,
                                     float (*acc)[TILE_ROWS])
{
    switch (type) {
    case F32: mul_floats_avx512_of(F32, rows, row_bytes, n_rows, x, x_stride, n, cols, acc); break;
    case F16: mul_floats_avx512_of(F16, rows, row_bytes, n_rows, x, x_stride, n, cols, acc); break;
    default: mul_floats_avx512_of(BF16, rows, row_bytes, n_rows, x, x_stride, n, cols, acc);
    }
}

/* Queries i0 .. i0+NT-1, all MIX_WIDTH elements. */
INLINE_AVX512 void mix_avx512_nt(const struct mix *m, int type, int i0, int NT)
{
    __m512 sum[8][2];
    float *out = m->out + i0 * m->out_stride;
    const float *e = m->e + i0 * m->e_stride;
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int k = 0; k < 2; k++) sum[i][k] = _mm512_loadu_ps(out + i * m->out_stride + 16 * k);
    for (int p = 0; p < m->n_pos; p++) {
        __builtin_prefetch(m->v + p * m->v_bytes + FETCH_STREAM);
        __m512 v0 = load_16_avx512(type, m->v + p * m->v_bytes, 0);
        __m512 v1 = load_16_avx512(type, m->v + p * m->v_bytes, 16);
        UNROLL for (int i = 0; i < NT; i++) {
            __m512 ep = _mm512_set1_ps(e[i * m->e_stride + p]);
            sum[i][0] = _mm512_fmadd_ps(ep, v0, sum[i][0]);
            sum[i][1] = _mm512_fmadd_ps(ep, v1, sum[i][1]);
        }
    }
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int k = 0; k < 2; k++) _mm512_storeu_ps(out + i * m->out_stride + 16 * k, sum[i][k]);
}

INLINE_AVX512 void mix_avx512_of(const struct mix *m, int type)
{
    int i = 0;
    for (; i + 8 <= m->n; i += 8) mix_avx512_nt(m, type, i, 8);
    for (; i + 4 <= m->n; i += 4) mix_avx512_nt(m, type, i, 4);
    for (; i < m->n; i++) mix_avx512_nt(m, type, i, 1);
}

AVX512 static void mix_values_avx512(const struct mix *m)
{
    if (m->width < MIX_WIDTH) mix_values_scalar(m);
    else if (m->type == F16) mix_avx512_of(m, F16);
    else mix_avx512_of(m, F32);
}
#endif /* HAVE_X86 */

#if defined(HAVE_NEON)
/* ---- NEON: a register holds 4 rows x 4 bytes, rows 4q .. 4q+3; eight of them the tile ---- */
#if !defined(__clang__) || __clang_major__ >= 16
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif

INLINE int8x16_t repeat_4_bytes(const int8_t *p)
{
    int32_t x;
    memcpy(&x, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}

/* pairs of products fit int16: 2 * 128 * 127 */
INLINE int32x4_t dot4_neon(int32x4_t isum, int8x16_t w, int8x16_t x)
{
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vpadalq_s16(isum, vpaddq_s16(low, high));
}

INLINE float32x4_t load_4_f16(const uint8_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

static void mul_q4_0_neon(const uint8_t *tile, int n_blocks, const struct xblock *x, size_t x_stride,
                          int n, float (*acc)[TILE_ROWS])
{
    for (int b = 0; b < n_blocks; b++, tile += Q4_0_TILE_BLOCK)
        for (int i = 0; i < n; i++)
            for (int q = 0; q < TILE_ROWS / 4; q++) {
                const struct xblock *xb = x + i * x_stride + b;
                int32x4_t isum = vdupq_n_s32(xb->minus_8_sums);        /* 1. nibbles are code + 8 */
                for (int g = 0; g < 4; g++) {                          /* 2. exact integer dot */
                    uint8x16_t w = vld1q_u8(tile + Q4_0_CODES + Q4_0_QUAD * g + 16 * q);
                    int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
                    int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
                    isum = dot4_neon(isum, low, repeat_4_bytes(xb->code + 4 * g));
                    isum = dot4_neon(isum, high, repeat_4_bytes(xb->code + 16 + 4 * g));
                }
                float32x4_t d = vmulq_n_f32(load_4_f16(tile + 8 * q), xb->d); /* 3. scale */
                vst1q_f32(acc[i] + 4 * q, vfmaq_f32(vld1q_f32(acc[i] + 4 * q), vcvtq_f32_s32(isum), d));
            }
}

/* Steps 2 to 4 of the panel kernel for rows 4q .. 4q+3. */
INLINE void finish_panel_neon(const struct panel *p, const struct format *f, const struct xblock *x,
                              const int32x4_t half[2], float *acc, int q)
{
    int32x4_t isum = vaddq_s32(half[0], half[1]), msum = vdupq_n_s32(x->sum[0] + x->sum[1]);
    if (f->has_halves) {                                                           /* 2. halves */
        isum = vmulq_s32(half[0], vld1q_s32(p->scale[0] + 4 * q));
        isum = vmlaq_s32(isum, half[1], vld1q_s32(p->scale[1] + 4 * q));
    }
    float32x4_t sum = vld1q_f32(acc + 4 * q), d = vmulq_n_f32(vld1q_f32(p->d + 4 * q), x->d);
    sum = vfmaq_f32(sum, vcvtq_f32_s32(isum), d);                                  /* 3. scale */
    if (f->has_min && f->has_halves) {                                             /* 4. minimum */
        msum = vmulq_n_s32(vld1q_s32(p->min[0] + 4 * q), x->sum[0]);
        msum = vmlaq_n_s32(msum, vld1q_s32(p->min[1] + 4 * q), x->sum[1]);
    }
    if (f->has_min)
        sum = vfmaq_f32(sum, vld1q_f32(p->m + 4 * q), vmulq_n_f32(vcvtq_f32_s32(msum), x->d));
    vst1q_f32(acc + 4 * q, sum);
}

INLINE void start_panel_neon(const struct format *f, const struct xblock *x, int32x4_t half[2])
{
    for (int k = 0; k < 2; k++) half[k] = vdupq_n_s32(-f->bias * x->sum[k]);
}

static void mul_panel_neon(const struct panel *p, int n_blocks, const struct format *f,
                           const struct xblock *x, size_t x_stride, int n, float (*acc)[TILE_ROWS])
{
    for (int b = 0; b < n_blocks; b++, p++)
        for (int i = 0; i < n; i++)
            for (int q = 0; q < TILE_ROWS / 4; q++) {
                const struct xblock *xb = x + i * x_stride + b;
                int32x4_t half[2];
                start_panel_neon(f, xb, half);
                for (int g = 0; g < 8; g++)                            /* 1. exact integer dots */
                    half[g / 4] = dot4_neon(half[g / 4], vld1q_s8(p->code + 4 * TILE_ROWS * g + 16 * q),
                                            repeat_4_bytes(xb->code + 4 * g));
                finish_panel_neon(p, f, xb, half, acc[i], q);
            }
}

INLINE float32x4_t load_4_neon(int type, const uint8_t *row, size_t j)
{
    if (type == F32) return vreinterpretq_f32_u8(vld1q_u8(row + 4 * j));
    if (type == F16) return load_4_f16(row + 2 * j);
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(row + 2 * j)), 16));
}

static void mul_floats_neon(int type, const uint8_t *rows, size_t row_bytes, int n_rows,
                            const float *x, size_t x_stride, int n, int cols,
                            float (*acc)[TILE_ROWS])
{
    for (int i = 0; i < n; i++, x += x_stride)
        for (int r = 0; r < n_rows; r++) {
            const uint8_t *row = rows + r * row_bytes;
            float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
            int j = 0;
            for (; j + 16 <= cols; j += 16)                            /* 1. into 16 lanes */
                for (int k = 0; k < 4; k++)
                    sum[k] = vfmaq_f32(sum[k], load_4_neon(type, row, j + 4 * k),
                                       vld1q_f32(x + j + 4 * k));
            float lane[16];
            for (int k = 0; k < 4; k++) vst1q_f32(lane + 4 * k, sum[k]);
            for (; j < cols; j++)
                lane[j % 16] = fma_of(1, load_float(type, row, j), x[j], lane[j % 16]);
            acc[i][r] = join_lanes(lane);                              /* 2. the tree */
        }
}

/* Queries i0 .. i0+NT-1, all MIX_WIDTH elements. */
INLINE void mix_neon_nt(const struct mix *m, int type, int i0, int NT)
{
    float32x4_t sum[2][8];
    float *out = m->out + i0 * m->out_stride;
    const float *e = m->e + i0 * m->e_stride;
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int k = 0; k < 8; k++) sum[i][k] = vld1q_f32(out + i * m->out_stride + 4 * k);
    for (int p = 0; p < m->n_pos; p++)
        UNROLL for (int k = 0; k < 8; k++) {
            float32x4_t v = load_4_neon(type, m->v + p * m->v_bytes, 4 * k);
            UNROLL for (int i = 0; i < NT; i++)
                sum[i][k] = vfmaq_n_f32(sum[i][k], v, e[i * m->e_stride + p]);
        }
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int k = 0; k < 8; k++) vst1q_f32(out + i * m->out_stride + 4 * k, sum[i][k]);
}

INLINE void mix_neon_of(const struct mix *m, int type)
{
    int i = 0;
    for (; i + 2 <= m->n; i += 2) mix_neon_nt(m, type, i, 2);
    if (i < m->n) mix_neon_nt(m, type, i, 1);
}

static void mix_values_neon(const struct mix *m)
{
    if (m->width < MIX_WIDTH) mix_values_scalar(m);
    else if (m->type == F16) mix_neon_of(m, F16);
    else mix_neon_of(m, F32);
}

#if defined(DOTPROD)
DOTPROD static void mul_q4_0_dotprod(const uint8_t *tile, int n_blocks, const struct xblock *x,
                                     size_t x_stride, int n, float (*acc)[TILE_ROWS])
{
    for (int b = 0; b < n_blocks; b++, tile += Q4_0_TILE_BLOCK)
        for (int q = 0; q < TILE_ROWS / 4; q++) {
            int8x16_t low[4], high[4];
            for (int g = 0; g < 4; g++) {
                uint8x16_t w = vld1q_u8(tile + Q4_0_CODES + Q4_0_QUAD * g + 16 * q);
                low[g] = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
                high[g] = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
            }
            float32x4_t d = load_4_f16(tile + 8 * q);
            for (int i = 0; i < n; i++) {
                const struct xblock *xb = x + i * x_stride + b;
                int8x16_t x0 = vld1q_s8(xb->code), x1 = vld1q_s8(xb->code + 16);
                int32x4_t isum = vdupq_n_s32(xb->minus_8_sums);        /* 1. nibbles are code + 8 */
                isum = vdotq_laneq_s32(isum, low[0], x0, 0);           /* 2. exact integer dot */
                isum = vdotq_laneq_s32(isum, low[1], x0, 1);
                isum = vdotq_laneq_s32(isum, low[2], x0, 2);
                isum = vdotq_laneq_s32(isum, low[3], x0, 3);
                isum = vdotq_laneq_s32(isum, high[0], x1, 0);
                isum = vdotq_laneq_s32(isum, high[1], x1, 1);
                isum = vdotq_laneq_s32(isum, high[2], x1, 2);
                isum = vdotq_laneq_s32(isum, high[3], x1, 3);
                float32x4_t sum = vld1q_f32(acc[i] + 4 * q);           /* 3. scale, accumulate */
                vst1q_f32(acc[i] + 4 * q, vfmaq_f32(sum, vcvtq_f32_s32(isum), vmulq_n_f32(d, xb->d)));
            }
        }
}

DOTPROD static void mul_panel_dotprod(const struct panel *p, int n_blocks, const struct format *f,
                                      const struct xblock *x, size_t x_stride, int n,
                                      float (*acc)[TILE_ROWS])
{
    for (int b = 0; b < n_blocks; b++, p++)
        for (int i = 0; i < n; i++)
            for (int q = 0; q < TILE_ROWS / 4; q++) {
                const struct xblock *xb = x + i * x_stride + b;
                int32x4_t half[2];
                start_panel_neon(f, xb, half);
                for (int g = 0; g < 8; g++)                            /* 1. exact integer dots */
                    half[g / 4] = vdotq_s32(half[g / 4], vld1q_s8(p->code + 4 * TILE_ROWS * g + 16 * q),
                                            repeat_4_bytes(xb->code + 4 * g));
                finish_panel_neon(p, f, xb, half, acc[i], q);
            }
}

/* smmla multiplies 2 rows x 8 bytes by 2 vectors x 8 bytes: {r0 x0, r0 x1, r1 x0, r1 x1}. Two groups
 * of a tile zipped give 8 bytes of a row; the results are unzipped to a register for each vector. */
I8MM static void mul_q4_0_pair_i8mm(const uint8_t *tile, const struct xblock *x0,
                                    const struct xblock *x1, float *acc0, float *acc1, int q)
{
    int32x4_t pair[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};              /* rows 4q, 4q+1 | 4q+2, 4q+3 */
    for (int g = 0; g < 4; g += 2) {                                   /* 2. exact integer dot */
        uint8x16_t w0 = vld1q_u8(tile + Q4_0_CODES + Q4_0_QUAD * g + 16 * q);
        uint8x16_t w1 = vld1q_u8(tile + Q4_0_CODES + Q4_0_QUAD * (g + 1) + 16 * q);
        for (int high = 0; high < 2; high++) {
            uint32x4_t a = vreinterpretq_u32_u8(high ? vshrq_n_u8(w0, 4) : vandq_u8(w0, vdupq_n_u8(15)));
            uint32x4_t z = vreinterpretq_u32_u8(high ? vshrq_n_u8(w1, 4) : vandq_u8(w1, vdupq_n_u8(15)));
            int8x16_t v = vcombine_s8(vld1_s8(x0->code + 16 * high + 4 * g),
                                      vld1_s8(x1->code + 16 * high + 4 * g));
            pair[0] = vmmlaq_s32(pair[0], vreinterpretq_s8_u32(vzip1q_u32(a, z)), v);
            pair[1] = vmmlaq_s32(pair[1], vreinterpretq_s8_u32(vzip2q_u32(a, z)), v);
        }
    }
    int32x4_t isum0 = vaddq_s32(vuzp1q_s32(pair[0], pair[1]), vdupq_n_s32(x0->minus_8_sums)); /* 1. */
    int32x4_t isum1 = vaddq_s32(vuzp2q_s32(pair[0], pair[1]), vdupq_n_s32(x1->minus_8_sums));
    float32x4_t d = load_4_f16(tile + 8 * q);                          /* 3. scale, accumulate */
    vst1q_f32(acc0, vfmaq_f32(vld1q_f32(acc0), vcvtq_f32_s32(isum0), vmulq_n_f32(d, x0->d)));
    vst1q_f32(acc1, vfmaq_f32(vld1q_f32(acc1), vcvtq_f32_s32(isum1), vmulq_n_f32(d, x1->d)));
}

I8MM static void mul_q4_0_i8mm(const uint8_t *tile, int n_blocks, const struct xblock *x,
                               size_t x_stride, int n, float (*acc)[TILE_ROWS])
{
    int even = n & ~1;
    for (int b = 0; b < n_blocks; b++)
        for (int i = 0; i < even; i += 2)
            for (int q = 0; q < TILE_ROWS / 4; q++)
                mul_q4_0_pair_i8mm(tile + (size_t)b * Q4_0_TILE_BLOCK, x + i * x_stride + b,
                                   x + (i + 1) * x_stride + b, acc[i] + 4 * q, acc[i + 1] + 4 * q, q);
    if (n > even) mul_q4_0_dotprod(tile, n_blocks, x + even * x_stride, x_stride, 1, acc + even);
}
#endif /* DOTPROD */
#endif /* HAVE_NEON */

/* ==== 6. Element-wise pieces: norm, rope, gelu, softmax =========================================
 *
 * Written once, in plain C. `hard` is a constant: with it the compiler turns each fma into the
 * instruction and each loop over 16 lanes into vectors; without it the same lines run on soft_fmaf.
 * Every operation is one IEEE rounding, so both give the same bits. */

/* y = x / sqrt(mean(x^2) + eps) * w (RMSNorm, arXiv 1910.07467). Gemma's formula has (1 + w): the
 * converters to GGUF have already added the 1. */
INLINE void rmsnorm_plain(int hard, float *y, const float *x, const float *w, int n, float eps)
{
    float lane[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lane[j] = fma_of(hard, x[i + j], x[i + j], lane[j]);
    for (; i < n; i++) lane[i % 16] = fma_of(hard, x[i], x[i], lane[i % 16]);
    float r = 1.0f / sqrt_of(join_lanes(lane) / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = (x[i] * r) * w[i];
}

/* Rotary position embedding (arXiv 2104.09864). The pairs are (j, j + D/2), as in GPT-NeoX and
 * transformers, not neighbours (2j, 2j+1) as in the paper. */
INLINE void rope_plain(int hard, float *v, const float *cosine, const float *sine, int head_dim)
{
    int half = head_dim / 2;
    for (int j = 0; j < half; j++) {
        float a = v[j], b = v[j + half], c = cosine[j], s = sine[j];
        v[j] = fma_of(hard, a, c, -(b * s));
        v[j + half] = fma_of(hard, b, c, a * s);
    }
}

/* gate = gelu(gate) * up, with the tanh form of GELU: tanh(y) = 2 / (1 + exp(-2y)) - 1, so
 * 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3). */
INLINE void gelu_plain(int hard, float *gate, const float *up, int n)
{
    const float c0 = float_of(0x3f4c422a), c1 = float_of(0x3d122279); /* sqrt(2/pi), 0.044715 c0 */
    for (int j = 0; j < n; j++) {
        float x = gate[j], u = x * fma_of(hard, c1, x * x, c0);
        gate[j] = x / (1.0f + exp_of(hard, -2.0f * u)) * up[j];
    }
}

/* Rounds n floats into the cache, little-endian like a file's tensors, so that one kernel reads both. */
INLINE void store_plain(uint8_t *restrict to, const float *restrict x, int n, int is_f16)
{
    for (int j = 0; is_f16 && j < n; j++) store_u16_le(to + 2 * j, f32_to_f16(x[j]));
    for (int j = 0; !is_f16 && j < n; j++) store_u32_le(to + 4 * j, bits_of(x[j]));
}

/* s[k] = exp(s[k] - max), for scores of positions first .. first+n-1; returns their sum, added up in
 * the lane of the absolute position, so that it does not matter where the window begins. */
INLINE float exp_scores_plain(int hard, float *s, int n, int first)
{
    float top[16], lane[16] = {0};
    for (int j = 0; j < 16; j++) top[j] = s[0];
    int k = 0;
    for (; k + 16 <= n; k += 16)
        for (int j = 0; j < 16; j++) top[j] = s[k + j] > top[j] ? s[k + j] : top[j];
    for (; k < n; k++) top[0] = s[k] > top[0] ? s[k] : top[0];
    float max = top[0];
    for (int j = 1; j < 16; j++) max = top[j] > max ? top[j] : max;
    for (k = 0; k < n; k++) s[k] = exp_of(hard, s[k] - max);
    for (k = 0; k < n && (first + k) % 16; k++) lane[(first + k) % 16] += s[k];
    for (; k + 16 <= n; k += 16)
        for (int j = 0; j < 16; j++) lane[j] += s[k + j];
    for (int j = 0; k < n; k++, j++) lane[j] += s[k];
    return join_lanes(lane);
}

/* ---- The kernels of one instruction set ---- */

struct kernels {
    const char *name;
    mul_q4_0 *mul_q4_0;
    mul_panel *mul_panel;
    mul_floats *mul_floats;
    mix_values *mix_values;
    void (*unpack)(int type, const uint8_t *tile, int g, struct panel *out); /* 32 rows */
    void (*dequantize)(const struct matrix *w, int r, float *out);           /* one row */
    void (*quantize)(struct xblock *out, const float *x, int n);
    void (*rmsnorm)(float *y, const float *x, const float *w, int n, float eps);
    void (*rope)(float *v, const float *cosine, const float *sine, int head_dim);
    void (*gelu)(float *gate, const float *up, int n);
    void (*store)(uint8_t *to, const float *x, int n, int is_f16);
    float (*exp_scores)(float *s, int n, int first);                         /* the numerator of softmax */
};

/* The element-wise pieces, compiled for one target. */
#define FOR_TARGET(target, suffix, hard)                                                                \
    target static void unpack_##suffix(int type, const uint8_t *tile, int g, struct panel *out)    \
    { unpack(type, tile, TILE_ROWS, g, out); }                                                     \
    target static void dequantize_##suffix(const struct matrix *w, int r, float *out)              \
    { dequantize_plain(w, r, out); }                                                               \
    target static void quantize_##suffix(struct xblock *out, const float *x, int n)                \
    { quantize_plain(out, x, n); }                                                                 \
    target static void rmsnorm_##suffix(float *y, const float *x, const float *w, int n, float eps) \
    { rmsnorm_plain(hard, y, x, w, n, eps); }                                                      \
    target static void rope_##suffix(float *v, const float *cosine, const float *sine, int head_dim) \
    { rope_plain(hard, v, cosine, sine, head_dim); }                                               \
    target static void gelu_##suffix(float *gate, const float *up, int n)                          \
    { gelu_plain(hard, gate, up, n); }                                                             \
    target static void store_##suffix(uint8_t *to, const float *x, int n, int is_f16)              \
    { store_plain(to, x, n, is_f16); }                                                             \
    target static float exp_scores_##suffix(float *s, int n, int first)                               \
    { return exp_scores_plain(hard, s, n, first); }

#define PLAIN
FOR_TARGET(PLAIN, scalar, HARD_FMA)
#if defined(HAVE_X86)
FOR_TARGET(AVX2, avx2, 1)
FOR_TARGET(AVX512, avx512, 1)
#endif

#define PLAIN_NAMES(suffix)                                                                         \
    unpack_##suffix, dequantize_##suffix, quantize_##suffix, rmsnorm_##suffix, rope_##suffix, gelu_##suffix,        \
    store_##suffix, exp_scores_##suffix

/* Best first. The last is the definition, which runs everywhere. */
static const struct kernels all_kernels[] = {
#if defined(HAVE_X86)
    {"avx512vnni", mul_q4_0_avx512vnni, mul_panel_avx512vnni, mul_floats_avx512, mix_values_avx512,
     PLAIN_NAMES(avx512)},
    {"avx512", mul_q4_0_avx512, mul_panel_avx512, mul_floats_avx512, mix_values_avx512,
     PLAIN_NAMES(avx512)},
    {"avx2", mul_q4_0_avx2, mul_panel_avx2, mul_floats_avx2, mix_values_avx2, PLAIN_NAMES(avx2)},
#endif
#if defined(HAVE_NEON)
#if defined(DOTPROD)
    {"i8mm", mul_q4_0_i8mm, mul_panel_dotprod, mul_floats_neon, mix_values_neon, PLAIN_NAMES(scalar)},
    {"dotprod", mul_q4_0_dotprod, mul_panel_dotprod, mul_floats_neon, mix_values_neon, PLAIN_NAMES(scalar)},
#endif
    {"neon", mul_q4_0_neon, mul_panel_neon, mul_floats_neon, mix_values_neon, PLAIN_NAMES(scalar)},
#endif
    {"scalar", mul_q4_0_scalar, mul_panel_scalar, mul_floats_scalar, mix_values_scalar,
     PLAIN_NAMES(scalar)},
};
enum { N_KERNELS = sizeof all_kernels / sizeof *all_kernels };

#if defined(HAVE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

static int cpu_has(const char *isa)
{
#if defined(HAVE_X86)
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(isa, "avx2")) return avx2; /* every CPU with AVX2 and FMA has F16C */
    if (!strcmp(isa, "avx512")) return avx512;
    if (!strcmp(isa, "avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
#elif defined(HAVE_NEON) && defined(__linux__)
    if (!strcmp(isa, "dotprod")) return (getauxval(AT_HWCAP) >> 20 & 1) != 0;   /* HWCAP_ASIMDDP */
    if (!strcmp(isa, "i8mm")) return cpu_has("dotprod") && (getauxval(AT_HWCAP2) >> 13 & 1) != 0;
#elif defined(HAVE_NEON) && defined(__ARM_FEATURE_DOTPROD)
    if (!strcmp(isa, "i8mm")) return 0; /* Apple: known at compile time only */
#elif defined(HAVE_NEON)
    if (!strcmp(isa, "dotprod") || !strcmp(isa, "i8mm")) return 0;
#endif
    return !strcmp(isa, "scalar") || !strcmp(isa, "neon") || !strcmp(isa, "dotprod");
}

const char *gemma3_isa_name(int index)
{
    for (int i = 0; i < N_KERNELS; i++)
        if (cpu_has(all_kernels[i].name) && index-- == 0) return all_kernels[i].name;
    return NULL;
}

/* ==== 7. The model and the state ================================================================ */

/* Weights of one layer. Norms are float32 vectors, the rest matrices [rows][cols]. */
struct layer {
    const float *attn_norm;           /* [d_model] */
    struct matrix attn_q;             /* [n_heads * head_dim][d_model] */
    struct matrix attn_k, attn_v;     /* [n_kv_heads * head_dim][d_model] */
    struct matrix attn_output;        /* [d_model][n_heads * head_dim] */
    const float *attn_q_norm, *attn_k_norm; /* [head_dim] */
    const float *post_attention_norm; /* [d_model] */
    const float *ffn_norm;            /* [d_model] */
    struct matrix ffn_gate, ffn_up;   /* [d_ff][d_model] */
    struct matrix ffn_down;           /* [d_model][d_ff] */
    const float *post_ffw_norm;       /* [d_model] */
};

/* Read-only once it is open. */
struct gemma3_model {
    gemma3_config config;
    int exact;                        /* float activations, dequantised weights */
    const struct kernels *kernels;
    struct matrix token_embd;         /* [n_vocab][d_model] */
    struct matrix output;             /* the head: token_embd itself in every public Gemma 3 */
    int tied;                         /* there is no output.weight */
    const float *output_norm;         /* [d_model] */
    struct layer layer[GEMMA3_MAX_LAYERS];

    gemma3_tokenizer *tokenizer;
    gemma3_vocab vocab;
    int can_chat;
    char name[128];
    size_t weight_bytes;
    void *owned[8];                   /* blocks to free on close */
    int n_owned;
    const void *mapping;              /* the file, when we mapped it */
    size_t mapping_bytes;
};

/* A worker's room for the weights it is multiplying. */
struct unpacked {
    struct panel panel[PANELS];
    uint8_t interleaved[PANELS * TILE_ROWS * MAX_BYTES_OF_32]; /* no_repack: on the fly */
};

/* One conversation: the KV cache, and scratch for the chunk of tokens that is taken through the layers at
 * once. The shapes are here, the room in lay_out (section 13). In attention a few tokens make a pack. */
struct gemma3_state {
    const gemma3_model *m;
    const gemma3_config *config;      /* the model's, or the one that params give */
    gemma3_params p;
    void *allocated;                  /* by _new, else NULL */
    int pos;                          /* tokens in the cache */
    int chunk;                        /* tokens taken at once: min(n_batch, GEMMA3_CHUNK) */
    int pack;                         /* tokens whose attention is computed together */
    int ring;                         /* slots of a local layer's cache */
    uint8_t *k_cache[GEMMA3_MAX_LAYERS]; /* of F16 or F32; section 9 says how they lie */
    uint8_t *v_cache[GEMMA3_MAX_LAYERS];
    float *inv_freq[2];               /* [head_dim/2]; 0 global, 1 local, as is_local */
    float *cosine[2], *sine[2];       /* [chunk][head_dim/2] */
    float *x;                         /* [chunk][d_model]           residual stream */
    float *h;                         /* [chunk][d_model]           branch */
    float *q, *attended;              /* [chunk][n_heads][head_dim] */
    float *k, *v;                     /* [chunk][n_kv_heads][head_dim] */
    float *gate, *up;                 /* [chunk][d_ff] */
    float *pack_q;                    /* [n_kv_heads][pack][heads per kv head][head_dim] */
    float *pack_out;                  /* [n_kv_heads][pack][heads per kv head][head_dim] */
    float *score_sum;                 /* [n_kv_heads][pack][heads per kv head] */
    float *score;                     /* [n_kv_heads][pack][heads per kv head][n_score] */
    size_t n_score;                   /* n_ctx, rounded up to 16 */
    struct xblock *xq;                /* [chunk][widest input / 32] */
    int n_acc;                        /* vectors that a worker multiplies at once, at most */
    float (*acc)[TILE_ROWS];          /* [n_threads][n_acc] */
    struct unpacked *unpacked;        /* [n_threads] */
    float *row_floats;                /* [n_threads][ROWS_AT_ONCE][widest input], exact mode */
    char error[256];
};

static float (*acc_of(const gemma3_state *s, int worker))[TILE_ROWS]
{
    return s->acc + (size_t)worker * s->n_acc;
}

/* Share number i of total things cut into n_tasks runs: [*begin, *end). */
static void share_of(int total, int n_tasks, int i, int *begin, int *end)
{
    *begin = (int)((int64_t)total * i / n_tasks);
    *end = (int)((int64_t)total * (i + 1) / n_tasks);
}

/* Things to do for each of n_items, handed out in a few runs for each thread. */
struct items {
    int n_items, n_tasks;
    gemma3_task *each;
    void *job;
};

enum { TASKS_PER_THREAD = 6 };

static void items_task(void *arg, int index, int worker)
{
    const struct items *w = arg;
    fp_state fp = fp_enter(); /* the thread may be the caller's */
    int i, end;
    for (share_of(w->n_items, w->n_tasks, index, &i, &end); i < end; i++) w->each(w->job, i, worker);
    fp_leave(fp);
}

static void for_each(const gemma3_state *s, int n_items, gemma3_task *each, void *job)
{
    struct items w = {n_items, s->p.n_threads * TASKS_PER_THREAD, each, job};
    if (w.n_tasks > n_items) w.n_tasks = n_items;
    if (n_items > 1 && s->p.n_threads > 1) s->p.parallel_for(s->p.pool, w.n_tasks, items_task, &w);
    else
        for (int i = 0; i < n_items; i++) each(job, i, 0);
}

static void trace(const gemma3_state *s, const char *name, int l, float *x, int n, int width)
{
    if (s->p.trace) s->p.trace(s->p.trace_user, name, l, s->pos, n, width, x);
}

/* ==== 8. Matrix times vectors ===================================================================
 *
 * Weights' rows are shared out to threads here, in tiles of 32; which thread takes which tile cannot
 * change a bit, because a row's sum is never divided. */

/* n <= 32; nearly always 32, which the compiler then copies in line. */
INLINE void copy_floats(float *to, const float *from, int n)
{
    if (n == TILE_ROWS) memcpy(to, from, TILE_ROWS * sizeof(float));
    else memcpy(to, from, n * sizeof(float));
}

enum { MAX_PRODUCTS = 3, ROWS_AT_ONCE = 4 };

struct matmul {
    const gemma3_state *s;
    const struct matrix *w[MAX_PRODUCTS];
    float *y[MAX_PRODUCTS];           /* [n][rows] */
    int n_products, n;
    const float *x;                   /* [n][cols] */
    size_t blocks;                    /* of a row of xq */
};

/* Rows as floats: where they lie if they are floats, dequantised once for all tokens if not. */
static void mul_tile_floats(const struct matmul *job, const struct matrix *w, int row, int n_rows,
                            int worker, float (*acc)[TILE_ROWS])
{
    const gemma3_state *s = job->s;
    const struct kernels *k = s->m->kernels;
    if (is_float(w->format)) {
        k->mul_floats(w->format->type, w->data + row * w->row_bytes, w->row_bytes, n_rows, job->x,
                      w->cols, job->n, w->cols, acc);
        return;
    }
    float *rows = s->row_floats + (size_t)worker * ROWS_AT_ONCE * 32 * job->blocks;
    for (int r = 0; r < n_rows; r += ROWS_AT_ONCE) {
        int take = n_rows - r < ROWS_AT_ONCE ? n_rows - r : ROWS_AT_ONCE;
        for (int a = 0; a < take; a++) k->dequantize(w, row + r + a, rows + (size_t)a * w->cols);
        float (*part)[TILE_ROWS] = (float (*)[TILE_ROWS])(acc[0] + r); /* part[i][0] is acc[i][r] */
        k->mul_floats(F32, (const uint8_t *)rows, 4 * (size_t)w->cols, take, job->x, w->cols, job->n,
                      w->cols, part);
    }
}

/* Int8 activations: Q4_0 straight from its tile, the others through panels, unpacked once for all
 * tokens. A matrix that was not repacked is interleaved here, a few blocks at a time. */
static void mul_tile_integers(const struct matmul *job, const struct matrix *w, int row, int n_rows,
                              int worker, float (*acc)[TILE_ROWS])
{
    const struct kernels *k = job->s->m->kernels;
    const struct format *f = w->format;
    struct unpacked *u = &job->s->unpacked[worker];
    int blocks = w->cols / 32, groups = f->elements / 32, at_once = w->tiled && f->type == Q4_0 ? blocks : PANELS;
    size_t block_bytes = (size_t)TILE_ROWS * f->bytes;
    for (int b = 0; b < blocks; b += at_once) {
        int take = blocks - b < at_once ? blocks - b : at_once;
        const uint8_t *tile = w->data + row * w->row_bytes + b / groups * block_bytes; /* as long as its rows */
        if (!w->tiled) {
            make_tile(u->interleaved, w->data + row * w->row_bytes + (size_t)(b / groups) * f->bytes, w->row_bytes,
                      n_rows, take / groups, f);
            tile = u->interleaved;
        }
        if (f->type == Q4_0) {
            k->mul_q4_0(tile, take, job->s->xq + b, job->blocks, job->n, acc);
            continue;
        }
        for (int a = 0; a < take; a++) {
            const uint8_t *block = tile + a / groups * block_bytes;
            if (w->tiled) fetch(block + FETCH_AHEAD + a % groups * (block_bytes / groups), block_bytes / groups);
            k->unpack(f->type, block, a % groups, u->panel + a);
        }
        k->mul_panel(u->panel, take, f, job->s->xq + b, job->blocks, job->n, acc);
    }
}

static void mul_tile(const struct matmul *job, int product, int tile, int worker)
{
    const struct matrix *w = job->w[product];
    float (*acc)[TILE_ROWS] = acc_of(job->s, worker);
    int row = tile * TILE_ROWS, n_rows = w->rows - row < TILE_ROWS ? w->rows - row : TILE_ROWS;
    memset(acc, 0, job->n * sizeof *acc);
    if (job->s->m->exact || is_float(w->format)) mul_tile_floats(job, w, row, n_rows, worker, acc);
    else mul_tile_integers(job, w, row, n_rows, worker, acc);
    for (int i = 0; i < job->n; i++) copy_floats(job->y[product] + (size_t)i * w->rows + row, acc[i], n_rows);
}

static void matmul_task(void *arg, int tile, int worker)
{
    const struct matmul *job = arg;
    int product = 0;
    for (; tile >= n_tiles(job->w[product]); product++) tile -= n_tiles(job->w[product]);
    mul_tile(job, product, tile, worker);
}

static void quantize_task(void *arg, int index, int worker)
{
    const struct matmul *job = arg;
    int cols = job->w[0]->cols;
    (void)worker;
    job->s->m->kernels->quantize(job->s->xq + index * job->blocks, job->x + (size_t)index * cols, cols);
}

/* Every product of job with the same input x [n][cols]. */
static void matmul(struct matmul *job)
{
    const gemma3_state *s = job->s;
    int integers = 0;
    int tiles = 0;
    job->blocks = ((size_t)job->w[0]->cols + 31) / 32;
    for (int k = 0; k < job->n_products; k++) {
        tiles += n_tiles(job->w[k]);
        integers |= !is_float(job->w[k]->format);
    }
    if (integers && !s->m->exact) for_each(s, job->n, quantize_task, job);
    for_each(s, tiles, matmul_task, job);
}

static void matmul_one(const gemma3_state *s, float *y, const struct matrix *w, const float *x, int n)
{
    struct matmul job = {.s = s, .w = {w}, .y = {y}, .n_products = 1, .n = n, .x = x};
    matmul(&job);
}

/* y = rms(x) * w; x and y are [n][d_model] */
struct norm {
    const gemma3_state *s;
    float *y;
    const float *x, *w;
};

static void norm_task(void *arg, int i, int worker)
{
    const struct norm *job = arg;
    const gemma3_config *c = job->s->config;
    size_t at = (size_t)i * c->d_model;
    (void)worker;
    job->s->m->kernels->rmsnorm(job->y + at, job->x + at, job->w, c->d_model, c->rms_eps);
}

static void rmsnorm(const gemma3_state *s, float *y, const float *x, const float *w, int n)
{
    struct norm job = {.s = s, .y = y, .x = x, .w = w};
    for_each(s, n, norm_task, &job);
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t j = 0; j < n; j++) x[j] += y[j];
}

/* ==== 9. Attention, the KV cache, feed-forward ==================================================
 *
 * K (after norm and rope) and V are rounded to the cache's type before any use, also by their own
 * token. A global layer has a slot for every position. A local layer looks back `window` tokens,
 * itself included, and keeps a ring: position p lies in slot p mod ring, and ring = window + chunk - 1
 * slots suffice for the oldest key that the first token of a chunk sees to survive the chunk's writes.
 *
 * Decoding reads the whole cache for each token, so every task finds its part of it in one stream:
 *     K [n_kv_heads][slots][head_dim]                             a task scores a run of positions
 *     V [n_kv_heads][head_dim / MIX_WIDTH][slots][MIX_WIDTH]      a task sums one slice of a head
 * The cost of a token at position p is thus its bytes: the weights once, and for each layer the K and
 * V of min(p + 1, window) or p + 1 positions, 2 * n_kv_heads * head_dim numbers each. test/bench.c compares
 * this with the clock. */

static size_t kv_element(const gemma3_state *s) { return s->p.kv_type == GEMMA3_KV_F16 ? 2 : 4; }

static int slots_of(const gemma3_state *s, int l)
{
    return s->config->is_local[l] ? s->ring : s->p.n_ctx;
}

/* cos and sin of every angle of this chunk, for both bases; all layers share them. Linear scaling
 * divides the angle of global layers (factor 8 in 4B and larger); it is inside inv_freq. */
static void rope_tables(gemma3_state *s, int n)
{
    int half = s->config->head_dim / 2;
    for (int local = 0; local < 2; local++)
        for (int i = 0; i < n; i++)
            for (int j = 0; j < half; j++)
                cos_sin(s->inv_freq[local][j] * (float)(s->pos + i), s->cosine[local] + i * half + j,
                        s->sine[local] + i * half + j);
}

/* The attention of one pack of tokens in layer l. t counts its queries of one kv head: that of token
 * i0 + t / heads_per_kv, query head t % heads_per_kv of the group that shares the kv head. */
struct attention {
    gemma3_state *s;
    const struct layer *w;
    int l, slots;
    int i0, n;                        /* tokens i0 .. i0+n-1 of the chunk */
    int first_pos;                    /* lowest position that any of them sees */
    int heads_per_kv;
};

static int n_queries(const struct attention *a) { return a->n * a->heads_per_kv; }

/* Number of a query among all of the pack: where its row of pack_q, score and pack_out lies. */
static size_t query_at(const struct attention *a, int g, int t)
{
    return (size_t)g * a->s->pack * a->heads_per_kv + t;
}

static int cache_type(const gemma3_state *s) { return s->p.kv_type == GEMMA3_KV_F16 ? F16 : F32; }

/* First position that the token at position p sees: q - k < window in a local layer. */
static int first_seen(const struct attention *a, int p)
{
    const gemma3_config *c = a->s->config;
    return c->is_local[a->l] && p >= c->window ? p - c->window + 1 : 0;
}

static int slice_width(int head_dim, int j0) { return head_dim - j0 < MIX_WIDTH ? head_dim - j0 : MIX_WIDTH; }

/* Where K of kv head g at position p lies, and elements j0 .. j0 + slice_width - 1 of V. */
static uint8_t *key_at(const struct attention *a, int g, int p)
{
    size_t D = a->s->config->head_dim;
    return a->s->k_cache[a->l] + ((size_t)g * a->slots + p % a->slots) * D * kv_element(a->s);
}

static uint8_t *value_at(const struct attention *a, int g, int j0, int p)
{
    int D = a->s->config->head_dim;
    size_t before = ((size_t)g * D + j0) * a->slots + (size_t)(p % a->slots) * slice_width(D, j0);
    return a->s->v_cache[a->l] + before * kv_element(a->s);
}

/* Norm of the queries and keys of token i. */
static void norm_token(void *arg, int i, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    const gemma3_config *c = s->config;
    int D = c->head_dim;
    (void)worker;
    for (int h = 0; h < c->n_heads; h++) {
        float *q = s->q + ((size_t)i * c->n_heads + h) * D;
        s->m->kernels->rmsnorm(q, q, a->w->attn_q_norm, D, c->rms_eps);
    }
    for (int g = 0; g < c->n_kv_heads; g++) {
        float *k = s->k + ((size_t)i * c->n_kv_heads + g) * D;
        s->m->kernels->rmsnorm(k, k, a->w->attn_k_norm, D, c->rms_eps);
    }
}

/* Rope for the queries and keys of token i. */
static void turn_token(void *arg, int i, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    const gemma3_config *c = s->config;
    int D = c->head_dim, local = c->is_local[a->l];
    const float *cosine = s->cosine[local] + i * (D / 2), *sine = s->sine[local] + i * (D / 2);
    (void)worker;
    for (int h = 0; h < c->n_heads; h++)
        s->m->kernels->rope(s->q + ((size_t)i * c->n_heads + h) * D, cosine, sine, D);
    for (int g = 0; g < c->n_kv_heads; g++)
        s->m->kernels->rope(s->k + ((size_t)i * c->n_kv_heads + g) * D, cosine, sine, D);
}

/* K and V of token i go into the cache. */
static void store_token(void *arg, int i, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    const gemma3_config *c = s->config;
    int D = c->head_dim, p = s->pos + i, is_f16 = cache_type(s) == F16;
    (void)worker;
    for (int g = 0; g < c->n_kv_heads; g++) {
        const float *k = s->k + ((size_t)i * c->n_kv_heads + g) * D, *v = s->v + ((size_t)i * c->n_kv_heads + g) * D;
        s->m->kernels->store(key_at(a, g, p), k, D, is_f16);
        for (int j0 = 0; j0 < D; j0 += MIX_WIDTH)
            s->m->kernels->store(value_at(a, g, j0, p), v + j0, slice_width(D, j0), is_f16);
    }
}

/* Positions [begin, end) of the cache that lie in a row: fewer when the ring's end comes first. */
static int run_of(const struct attention *a, int begin, int end)
{
    int run = a->slots - begin % a->slots;
    return end - begin < run ? end - begin : run;
}

enum { SCORE_RUN = 64 };

static int n_score_runs(const struct attention *a)
{
    return (a->s->pos + a->i0 + a->n - a->first_pos + SCORE_RUN - 1) / SCORE_RUN;
}

/* Scores of SCORE_RUN positions with every query of one kv head: keys are the rows of a matrix. Among
 * them are positions that a query must not see, later ones and those before its window: softmax and mix
 * pass over them, which is the causal mask. */
static void score_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int D = s->config->head_dim, g = index / n_score_runs(a), end = s->pos + a->i0 + a->n;
    int p = a->first_pos + index % n_score_runs(a) * SCORE_RUN;
    float (*acc)[TILE_ROWS] = acc_of(s, worker);
    end = end - p < SCORE_RUN ? end : p + SCORE_RUN;
    for (int run; p < end; p += run) {
        run = run_of(a, p, end);
        run = run < TILE_ROWS ? run : TILE_ROWS;
        for (int t = 0, count; t < n_queries(a); t += count) {
            count = n_queries(a) - t < s->n_acc ? n_queries(a) - t : s->n_acc;
            s->m->kernels->mul_floats(cache_type(s), key_at(a, g, p), D * kv_element(s), run,
                                      s->pack_q + query_at(a, g, t) * D, D, count, D, acc);
            for (int k = 0; k < count; k++)
                copy_floats(s->score + query_at(a, g, t + k) * s->n_score + (p - a->first_pos), acc[k], run);
        }
    }
}

/* One query: its visible scores become exp(score - max); one thread adds them up in fixed order. */
static void softmax_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int g = index / n_queries(a), t = index % n_queries(a);
    int p = s->pos + a->i0 + t / a->heads_per_kv, first = first_seen(a, p);
    float *score = s->score + query_at(a, g, t) * s->n_score + (first - a->first_pos);
    (void)worker;
    s->score_sum[query_at(a, g, t)] = s->m->kernels->exp_scores(score, p + 1 - first, first);
}

/* The sums of one slice, divided by their queries' score_sum, go where attn_output expects them. */
static void divide_and_place(const struct attention *a, int g, int j0, const float *out)
{
    gemma3_state *s = a->s;
    const gemma3_config *c = s->config;
    int D = c->head_dim;
    for (int t = 0; t < n_queries(a); t++) {
        int i = a->i0 + t / a->heads_per_kv, h = g * a->heads_per_kv + t % a->heads_per_kv;
        float *to = s->attended + ((size_t)i * c->n_heads + h) * D + j0, sum = s->score_sum[query_at(a, g, t)];
        for (int j = 0; j < slice_width(D, j0); j++) to[j] = out[(size_t)t * D + j] / sum;
    }
}

static int n_slices(int head_dim) { return (head_dim + MIX_WIDTH - 1) / MIX_WIDTH; }

/* out = sum of e_p v_p over positions in order, for one slice of a kv head and its queries. The tokens of
 * the pack see different ranges: [first_seen(p), p]. Both ends grow with the token, so the tokens that see
 * a position are one run [from, to): those not before it whose window has begun. Positions are taken up
 * to where either end of the run changes, or the ring wraps. */
static void mix_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int D = s->config->head_dim, g = index / n_slices(D), j0 = index % n_slices(D) * MIX_WIDTH;
    int p0 = s->pos + a->i0, from = 0, to = 1;
    float *out = s->pack_out + query_at(a, g, 0) * D + j0;
    struct mix m = {.type = cache_type(s), .v_bytes = slice_width(D, j0) * kv_element(s), .e_stride = s->n_score,
                    .out_stride = D, .width = slice_width(D, j0)};
    (void)worker;
    for (int t = 0; t < n_queries(a); t++) memset(out + (size_t)t * D, 0, m.width * sizeof(float));
    for (int p = a->first_pos, end; p < p0 + a->n; p = end) {
        while (p0 + from < p) from++;
        while (to < a->n && first_seen(a, p0 + to) <= p) to++;
        end = p0 + from + 1;
        if (to < a->n && first_seen(a, p0 + to) < end) end = first_seen(a, p0 + to);
        end = p + run_of(a, p, end);
        m.v = value_at(a, g, j0, p);
        m.n_pos = end - p;
        m.n = (to - from) * a->heads_per_kv;
        m.e = s->score + query_at(a, g, from * a->heads_per_kv) * s->n_score + (p - a->first_pos);
        m.out = out + (size_t)from * a->heads_per_kv * D;
        s->m->kernels->mix_values(&m);
    }
    divide_and_place(a, g, j0, out);
}

/* Queries of one kv head side by side, and scaled. */
static void gather_queries(const struct attention *a)
{
    gemma3_state *s = a->s;
    const gemma3_config *c = s->config;
    size_t q_floats = (size_t)a->heads_per_kv * c->head_dim;
    for (int i = 0; i < a->n; i++)
        for (int g = 0; g < c->n_kv_heads; g++) {
            const float *q = s->q + ((size_t)(a->i0 + i) * c->n_kv_heads + g) * q_floats;
            float *to = s->pack_q + ((size_t)g * s->pack + i) * q_floats;
            for (size_t j = 0; j < q_floats; j++) to[j] = q[j] * c->query_scale;
        }
}

/* attended [i0 .. i0+n-1][n_heads][head_dim] for one pack of tokens: three phases, each shared out. A pack
 * meets every key and value it sees once for all its queries. */
static void attend(struct attention *a)
{
    const gemma3_state *s = a->s;
    const gemma3_config *c = s->config;
    a->first_pos = first_seen(a, s->pos + a->i0);
    gather_queries(a);
    for_each(s, c->n_kv_heads * n_score_runs(a), score_task, a);
    for_each(s, c->n_kv_heads * n_queries(a), softmax_task, a);
    for_each(s, c->n_kv_heads * n_slices(c->head_dim), mix_task, a);
}

/* h [n][d_model] -> h, through attention over the cache of layer l, which gains n positions. */
static void attention(gemma3_state *s, const struct layer *w, int l, int n)
{
    const gemma3_config *c = s->config;
    struct attention a = {.s = s, .w = w, .l = l, .slots = slots_of(s, l),
                          .heads_per_kv = c->n_heads / c->n_kv_heads};
    struct matmul qkv = {.s = s, .w = {&w->attn_q, &w->attn_k, &w->attn_v}, .y = {s->q, s->k, s->v},
                         .n_products = 3, .n = n, .x = s->h};
    matmul(&qkv);
    trace(s, "Qcur_raw", l, s->q, n, c->n_heads * c->head_dim);
    trace(s, "Kcur_raw", l, s->k, n, c->n_kv_heads * c->head_dim);
    trace(s, "Vcur", l, s->v, n, c->n_kv_heads * c->head_dim);
    for_each(s, n, norm_token, &a);
    trace(s, "Qcur_normed", l, s->q, n, c->n_heads * c->head_dim);
    trace(s, "Kcur_normed", l, s->k, n, c->n_kv_heads * c->head_dim);
    for_each(s, n, turn_token, &a);
    trace(s, "Qcur", l, s->q, n, c->n_heads * c->head_dim);
    trace(s, "Kcur", l, s->k, n, c->n_kv_heads * c->head_dim);
    for_each(s, n, store_token, &a);
    for (a.i0 = 0; a.i0 < n; a.i0 += s->pack) {
        a.n = n - a.i0 < s->pack ? n - a.i0 : s->pack;
        attend(&a);
    }
    trace(s, "kqv_out", l, s->attended, n, c->n_heads * c->head_dim);
    matmul_one(s, s->h, &w->attn_output, s->attended, n);
    trace(s, "attn_out", l, s->h, n, c->d_model);
}

/* ---- Feed-forward ---- */

static void gelu_task(void *arg, int i, int worker)
{
    gemma3_state *s = arg;
    size_t d_ff = s->config->d_ff;
    (void)worker;
    s->m->kernels->gelu(s->gate + i * d_ff, s->up + i * d_ff, (int)d_ff);
}

/* h [n][d_model] -> h: Wdown (gelu(Wgate h) * Wup h) */
static void feed_forward(gemma3_state *s, const struct layer *w, int l, int n)
{
    struct matmul gate_up = {.s = s, .w = {&w->ffn_gate, &w->ffn_up}, .y = {s->gate, s->up},
                             .n_products = 2, .n = n, .x = s->h};
    matmul(&gate_up);
    trace(s, "ffn_gate", l, s->gate, n, s->config->d_ff);
    trace(s, "ffn_up", l, s->up, n, s->config->d_ff);
    for_each(s, n, gelu_task, s);
    trace(s, "ffn_geglu", l, s->gate, n, s->config->d_ff);
    matmul_one(s, s->h, &w->ffn_down, s->gate, n);
}

/* ==== 10. The forward pass ====================================================================== */

/* x [n][d_model] = rows of the embedding times sqrt(d_model): Gemma ties embedding and head, and
 * this scale makes one matrix serve as both. */
static void embed(gemma3_state *s, const int32_t *ids, int n)
{
    const gemma3_config *c = s->config;
    for (int i = 0; i < n; i++) {
        float *x = s->x + (size_t)i * c->d_model;
        s->m->kernels->dequantize(&s->m->token_embd, ids[i], x);
        for (int j = 0; j < c->d_model; j++) x[j] *= c->embedding_scale;
    }
}

/* Rows that were asked for: their position is the first one's, the others need not be adjacent. */
static void trace_rows(const gemma3_state *s, const char *name, const int *rows, float *x, int n, int width)
{
    if (s->p.trace) s->p.trace(s->p.trace_user, name, -1, s->pos + rows[0], n, width, x);
}

/* Logits of n_rows tokens of the chunk, each n_vocab long. */
static void unembed(gemma3_state *s, const int *rows, int n_rows, float *logits)
{
    const gemma3_config *c = s->config;
    for (int k = 0; k < n_rows; k++) /* rows ascend, so a copy never overwrites one still needed */
        memmove(s->x + (size_t)k * c->d_model, s->x + (size_t)rows[k] * c->d_model,
                c->d_model * sizeof(float));
    rmsnorm(s, s->h, s->x, s->m->output_norm, n_rows);
    trace_rows(s, "result_norm", rows, s->h, n_rows, c->d_model);
    matmul_one(s, logits, &s->m->output, s->h, n_rows);
    for (size_t j = 0; c->final_softcap > 0 && j < (size_t)n_rows * c->n_vocab; j++) {
        float t = logits[j] / c->final_softcap;
        float e = exp_of(HARD_FMA, -2.0f * float_of(bits_of(t) & 0x7fffffff));
        float tanh_of_abs = (1.0f - e) / (1.0f + e);
        logits[j] = c->final_softcap * float_of(bits_of(tanh_of_abs) | (bits_of(t) & 0x80000000));
    }
    trace_rows(s, "result_output", rows, logits, n_rows, c->n_vocab);
}

/* n <= chunk tokens through all layers: x [n][d_model] afterwards. Prefill and decode are the same. */
static void forward_chunk(gemma3_state *s, const int32_t *ids, int n)
{
    const gemma3_config *c = s->config;
    size_t size = (size_t)n * c->d_model;
    rope_tables(s, n);
    embed(s, ids, n);
    trace(s, "inp_scaled", -1, s->x, n, c->d_model);
    for (int l = 0; l < c->n_layers; l++) {
        const struct layer *w = &s->m->layer[l];
        rmsnorm(s, s->h, s->x, w->attn_norm, n);
        trace(s, "attn_norm", l, s->h, n, c->d_model);
        attention(s, w, l, n);
        rmsnorm(s, s->h, s->h, w->post_attention_norm, n);
        trace(s, "attn_post_norm", l, s->h, n, c->d_model);
        add(s->x, s->h, size);
        trace(s, "sa_out", l, s->x, n, c->d_model);
        rmsnorm(s, s->h, s->x, w->ffn_norm, n);
        trace(s, "ffn_norm", l, s->h, n, c->d_model);
        feed_forward(s, w, l, n);
        trace(s, "ffn_out", l, s->h, n, c->d_model);
        rmsnorm(s, s->h, s->h, w->post_ffw_norm, n);
        trace(s, "ffn_post_norm", l, s->h, n, c->d_model);
        add(s->x, s->h, size);
        trace(s, "l_out", l, s->x, n, c->d_model);
    }
}

/* Labels of the trace as they come; from the second to the third from the end each layer has them. */
static const char *const trace_labels[] = {
    "inp_scaled", "attn_norm", "Qcur_raw", "Kcur_raw", "Vcur", "Qcur_normed", "Kcur_normed", "Qcur", "Kcur",
    "kqv_out", "attn_out", "attn_post_norm", "sa_out", "ffn_norm", "ffn_gate", "ffn_up", "ffn_geglu", "ffn_out",
    "ffn_post_norm", "l_out", "result_norm", "result_output"};
enum { N_TRACE_LABELS = sizeof trace_labels / sizeof *trace_labels };

const char *gemma3_trace_label(int index, int *in_layers)
{
    if (index < 0 || index >= N_TRACE_LABELS) return NULL;
    *in_layers = index > 0 && index < N_TRACE_LABELS - 2;
    return trace_labels[index];
}

static int forward_fault(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows)
{
    int n_vocab = s->config->n_vocab;
    if (n < 0) {
        snprintf(s->error, sizeof s->error, "%d tokens were given, expected 0 or more", n);
        return -1;
    }
    if (n > s->p.n_ctx - s->pos) {
        snprintf(s->error, sizeof s->error, "the context is full: it holds %d tokens, %d are in it and %d more were given",
                 s->p.n_ctx, s->pos, n);
        return -1;
    }
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab) {
            snprintf(s->error, sizeof s->error, "token %d is %d, outside the vocabulary of %d", s->pos + i,
                     (int)ids[i], n_vocab);
            return -1;
        }
    for (int k = 0; k < n_rows; k++)
        if (rows[k] < 0 || rows[k] >= n || (k && rows[k] <= rows[k - 1])) {
            snprintf(s->error, sizeof s->error, "rows[%d] is %d: rows must ascend and lie in 0..%d", k, rows[k], n - 1);
            return -1;
        }
    return 0;
}

int gemma3_forward(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows, float *logits)
{
    if (forward_fault(s, ids, n, rows, n_rows)) return -1;
    fp_state fp = fp_enter();
    for (int done = 0, take; done < n; done += take) {
        int in_chunk = 0, chunk_rows[GEMMA3_CHUNK];
        take = n - done < s->chunk ? n - done : s->chunk;
        forward_chunk(s, ids + done, take);
        for (; n_rows > 0 && *rows < done + take; rows++, n_rows--) chunk_rows[in_chunk++] = *rows - done;
        if (in_chunk) unembed(s, chunk_rows, in_chunk, logits);
        if (in_chunk) logits += (size_t)in_chunk * s->config->n_vocab;
        s->pos += take;
    }
    fp_leave(fp);
    return 0;
}

/* ==== 11. Reading GGUF ==========================================================================
 *
 *     "GGUF" | u32 version | u64 n_tensors | u64 n_kv | n_kv pairs | n_tensors infos | padding | data
 *     pair:  string key | u32 type | value          string: u64 length | bytes
 *     info:  string name | u32 n_dims | u64 ne[n_dims] | u32 type | u64 offset from data
 *     array: u32 element type | u64 count | elements
 *
 * ne[0] is the length of a row. Nothing of the file is trusted: every read goes through a cursor that
 * knows what is left, and every tensor's type, shape and end are checked once, when it is bound. */

static void *fail(gemma3_error *err, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (err) vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return NULL;
}

/* A path for an error message, whose reason comes after it: the end of a long one. */
enum { SHORT_PATH = 240 };
static const char *short_path(const char *path, char out[SHORT_PATH])
{
    size_t n = strlen(path);
    if (n < SHORT_PATH) return path;
    path += n - (SHORT_PATH - 4);
    while ((*path & 0xc0) == 0x80) path++; /* not in the middle of a character */
    snprintf(out, SHORT_PATH, "...%s", path);
    return out;
}

struct cursor {
    const uint8_t *p;
    size_t left;
    int failed;
};

static const uint8_t *take(struct cursor *c, uint64_t n)
{
    const uint8_t *p = c->p;
    if (c->failed || n > c->left) {
        c->failed = 1;
        return NULL;
    }
    c->p += n;
    c->left -= (size_t)n;
    return p;
}

static uint32_t take_u32(struct cursor *c)
{
    const uint8_t *p = take(c, 4);
    return p ? load_u32_le(p) : 0;
}

static uint64_t take_u64(struct cursor *c)
{
    const uint8_t *p = take(c, 8);
    return p ? load_u64_le(p) : 0;
}

struct string {
    const char *text;
    size_t n;
};

static struct string take_string(struct cursor *c)
{
    uint64_t n = take_u64(c);
    struct string s = {(const char *)take(c, n), (size_t)n};
    if (!s.text) s.n = 0;
    return s;
}

enum { KV_U8, KV_I8, KV_U16, KV_I16, KV_U32, KV_I32, KV_F32, KV_BOOL, KV_STRING, KV_ARRAY, KV_U64,
       KV_I64, KV_F64, KV_TYPES };

static const uint8_t kv_bytes[KV_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
static const char *const kv_names[KV_TYPES] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool",
                                               "string", "array", "u64", "i64", "f64"};

struct kv {
    struct string key;
    uint32_t type, element;      /* element: of an array */
    uint64_t count;              /* of an array, else 1 */
    struct cursor value;
};

struct tensor {
    struct string name;
    uint32_t type;
    uint64_t ne[4], offset;
};

struct gguf {
    const char *name;            /* of the file */
    const uint8_t *data;         /* tensors */
    size_t data_bytes;
    uint64_t alignment;          /* of every tensor in data */
    struct kv *kv;               /* sorted by key */
    struct tensor *tensor;       /* sorted by name */
    size_t n_kv, n_tensors;
    gemma3_error *err;
};

static int compare_strings(struct string a, struct string b)
{
    size_t n = a.n < b.n ? a.n : b.n;
    int c = n ? memcmp(a.text, b.text, n) : 0;
    return c ? c : (a.n > b.n) - (a.n < b.n);
}

static int compare_kv(const void *a, const void *b)
{
    return compare_strings(((const struct kv *)a)->key, ((const struct kv *)b)->key);
}

static int compare_tensors(const void *a, const void *b)
{
    return compare_strings(((const struct tensor *)a)->name, ((const struct tensor *)b)->name);
}

/* A name for an error message: printable, and not too long. */
static const char *shown(struct string s, char out[80])
{
    size_t n = s.n < 79 ? s.n : 79;
    for (size_t j = 0; j < n; j++) out[j] = s.text[j] >= 32 && s.text[j] < 127 ? s.text[j] : '?';
    out[n] = 0;
    return out;
}

static int read_kv(struct gguf *g, struct cursor *c, struct kv *kv)
{
    char text[80];
    kv->key = take_string(c);
    kv->type = take_u32(c);
    kv->element = kv->type;
    kv->count = 1;
    if (!c->failed && kv->type == KV_ARRAY) {
        kv->element = take_u32(c);
        kv->count = take_u64(c);
    }
    kv->value = *c;
    if (c->failed) return 0;
    if (kv->element == KV_ARRAY)
        return fail(g->err, "%s: key %s is an array of arrays, which is not supported", g->name,
                    shown(kv->key, text)), -1;
    if (kv->element >= KV_TYPES)
        return fail(g->err, "%s: key %s has value type %u, which is not one of GGUF's", g->name,
                    shown(kv->key, text), (unsigned)kv->element), -1;
    if (kv->element == KV_STRING)
        for (uint64_t k = 0; k < kv->count && !c->failed; k++) take_string(c);
    else if (kv->count > c->left) c->failed = 1;
    else take(c, kv->count * kv_bytes[kv->element]);
    return 0;
}

static int read_tensor(struct gguf *g, struct cursor *c, struct tensor *t)
{
    char text[80];
    t->name = take_string(c);
    uint32_t n_dims = take_u32(c);
    if (!c->failed && (n_dims < 1 || n_dims > 4))
        return fail(g->err, "%s: tensor %s has %u dimensions, expected 1 to 4", g->name,
                    shown(t->name, text), (unsigned)n_dims), -1;
    for (uint32_t k = 0; k < 4; k++) t->ne[k] = k < n_dims ? take_u64(c) : 1;
    t->type = take_u32(c);
    t->offset = take_u64(c);
    return 0;
}

static const struct kv *find_kv(const struct gguf *g, const char *key)
{
    struct kv wanted = {.key = {key, strlen(key)}};
    return g->n_kv ? bsearch(&wanted, g->kv, g->n_kv, sizeof wanted, compare_kv) : NULL;
}

static const struct tensor *find_tensor(const struct gguf *g, const char *name)
{
    struct tensor wanted = {.name = {name, strlen(name)}};
    return g->n_tensors ? bsearch(&wanted, g->tensor, g->n_tensors, sizeof wanted, compare_tensors) : NULL;
}

static int read_header(struct gguf *g, struct cursor *c)
{
    const uint8_t *magic = take(c, 4);
    if (!magic || memcmp(magic, "GGUF", 4))
        return fail(g->err, "%s is not a GGUF file: it does not begin with \"GGUF\"", g->name), -1;
    uint32_t version = take_u32(c);
    if (!c->failed && version != 2 && version != 3)
        return fail(g->err, "%s: GGUF version %u%s, expected 2 or 3", g->name, (unsigned)version,
                    version && !(version & 0xffff) ? " (a big-endian file)" : ""), -1;
    uint64_t n_tensors = take_u64(c), n_kv = take_u64(c);
    if (c->failed || n_kv > c->left / 13 || n_tensors > c->left / 32) /* their least sizes */
        return fail(g->err, "%s is truncated: its header promises %llu keys and %llu tensors", g->name,
                    (unsigned long long)n_kv, (unsigned long long)n_tensors), -1;
    g->n_kv = (size_t)n_kv;
    g->n_tensors = (size_t)n_tensors;
    g->kv = calloc(g->n_kv + 1, sizeof *g->kv);
    g->tensor = calloc(g->n_tensors + 1, sizeof *g->tensor);
    if (!g->kv || !g->tensor) return fail(g->err, "%s: out of memory for its keys", g->name), -1;
    return 0;
}

static int sort_directory(struct gguf *g)
{
    char text[80];
    qsort(g->kv, g->n_kv, sizeof *g->kv, compare_kv);
    qsort(g->tensor, g->n_tensors, sizeof *g->tensor, compare_tensors);
    for (size_t k = 1; k < g->n_kv; k++)
        if (!compare_kv(g->kv + k - 1, g->kv + k))
            return fail(g->err, "%s: key %s occurs twice", g->name, shown(g->kv[k].key, text)), -1;
    for (size_t k = 1; k < g->n_tensors; k++)
        if (!compare_tensors(g->tensor + k - 1, g->tensor + k))
            return fail(g->err, "%s: tensor %s occurs twice", g->name, shown(g->tensor[k].name, text)), -1;
    return 0;
}

static int read_gguf(struct gguf *g, const void *data, size_t size)
{
    struct cursor c = {data, size, 0};
    if (read_header(g, &c)) return -1;
    for (size_t k = 0; k < g->n_kv && !c.failed; k++)
        if (read_kv(g, &c, g->kv + k)) return -1;
    for (size_t k = 0; k < g->n_tensors && !c.failed; k++)
        if (read_tensor(g, &c, g->tensor + k)) return -1;
    if (c.failed) return fail(g->err, "%s is truncated: it ends inside its header", g->name), -1;
    if (sort_directory(g)) return -1;
    const struct kv *a = find_kv(g, "general.alignment");
    uint64_t alignment = a && a->type == KV_U32 ? load_u32_le(a->value.p) : 32;
    if ((a && a->type != KV_U32) || alignment == 0 || (alignment & (alignment - 1)))
        return fail(g->err, "%s: general.alignment must be a u32 power of two", g->name), -1;
    uint64_t start = (size - c.left + alignment - 1) & ~(alignment - 1);
    g->alignment = alignment;
    g->data = (const uint8_t *)data + (start < size ? start : size);
    g->data_bytes = start < size ? (size_t)(size - start) : 0;
    return 0;
}

/* A number of any type as double (exact for every value we accept); 0 and a sentence if it is none. */
static int read_number(const struct gguf *g, const struct kv *kv, double *out)
{
    const uint8_t *p = kv->value.p;
    char text[80];
    switch (kv->type) {
    case KV_U8: case KV_BOOL: *out = p[0]; return 1;
    case KV_I8: *out = (int8_t)p[0]; return 1;
    case KV_U16: *out = load_u16_le(p); return 1;
    case KV_I16: *out = (int16_t)load_u16_le(p); return 1;
    case KV_U32: *out = load_u32_le(p); return 1;
    case KV_I32: *out = (int32_t)load_u32_le(p); return 1;
    case KV_F32: *out = float_of(load_u32_le(p)); return 1;
    case KV_U64: *out = (double)load_u64_le(p); return 1;
    case KV_I64: *out = (double)(int64_t)load_u64_le(p); return 1;
    case KV_F64: { uint64_t u = load_u64_le(p); memcpy(out, &u, 8); return 1; }
    default:
        fail(g->err, "%s: key %s is a %s, expected a number", g->name, shown(kv->key, text),
             kv_names[kv->type]);
        return 0;
    }
}

/* Key "gemma3.NAME" as an integer in [low, high], or, when it is absent, fallback (< 0: required). */
static int get_int(const struct gguf *g, const char *name, int low, int high, int fallback, int *out)
{
    char key[96];
    double x;
    snprintf(key, sizeof key, "gemma3.%s", name);
    const struct kv *kv = find_kv(g, key);
    *out = fallback;
    if (!kv && fallback < 0) return fail(g->err, "%s: key %s is missing", g->name, key), -1;
    if (!kv) return 0;
    if (!read_number(g, kv, &x)) return -1;
    if (!(x >= low && x <= high) || x != (int)x)
        return fail(g->err, "%s: key %s is %.10g, expected an integer from %d to %d", g->name, key, x,
                    low, high), -1;
    *out = (int)x;
    return 0;
}

/* The same for a float of at least `least`; other: an older spelling of the key, or NULL. */
static int get_float(const struct gguf *g, const char *name, const char *other, float least, float fallback,
                     float *out)
{
    char key[96];
    double x;
    snprintf(key, sizeof key, "gemma3.%s", name);
    const struct kv *kv = find_kv(g, key);
    if (!kv && other) {
        snprintf(key, sizeof key, "gemma3.%s", other);
        kv = find_kv(g, key);
    }
    *out = fallback;
    if (!kv) return 0;
    if (!read_number(g, kv, &x)) return -1;
    if (!(x >= least && x <= 1e30))
        return fail(g->err, "%s: key %s is %g, expected a number from %g to 1e30", g->name, key, x, (double)least), -1;
    *out = (float)x;
    return 0;
}

static struct string get_string(const struct gguf *g, const char *key)
{
    const struct kv *kv = find_kv(g, key);
    struct cursor c;
    struct string none = {"", 0};
    if (!kv || kv->type != KV_STRING) return none;
    c = kv->value;
    return take_string(&c);
}

static int string_is(struct string s, const char *text)
{
    return s.n == strlen(text) && !memcmp(s.text, text, s.n);
}

/* 0 when a key is absent or one of two strings, of which the first is the usual one. */
static int check_string(const struct gguf *g, const char *key, const char *usual, const char *other)
{
    char text[80];
    const struct kv *kv = find_kv(g, key);
    if (!kv) return 0;
    if (kv->type != KV_STRING)
        return fail(g->err, "%s: key %s is a %s, expected a string", g->name, key, kv_names[kv->type]), -1;
    struct string s = get_string(g, key);
    if (string_is(s, usual) || string_is(s, other)) return 0;
    return fail(g->err, "%s: %s is \"%s\", expected \"%s\"", g->name, key, shown(s, text), usual), -1;
}

/* ==== 12. Opening a model ======================================================================= */

/* What a host with virtual memory does for us; elsewhere nothing (section 15). */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n);
static void host_use_large_pages(uint8_t *begin, size_t n);
static void host_unmap(const gemma3_model *m);

struct opening {
    struct gguf g;
    gemma3_model *m;
    gemma3_options options;
    float *norms;                /* where the next norm goes */
};

static void *own(struct opening *o, size_t bytes, const char *what)
{
    gemma3_model *m = o->m;
    void *p = m->n_owned < 8 ? malloc(bytes ? bytes : 1) : NULL;
    if (!p) return fail(o->g.err, "%s: out of memory for %s (%llu bytes)", o->g.name, what, (unsigned long long)bytes);
    return m->owned[m->n_owned++] = p;
}

/* Says in one sentence why this is no Gemma 3 text model that we can run. */
static int refuse_others(const struct opening *o)
{
    const struct gguf *g = &o->g;
    char text[80];
    double count = 0;
    const struct kv *split = find_kv(g, "split.count"); /* only the first part has the model's keys */
    if (split && read_number(g, split, &count) && count > 1)
        return fail(g->err, "%s is one of %.0f parts of a split model: merge them first (llama-gguf-split --merge)",
                    g->name, count), -1;
    if (!find_kv(g, "general.architecture"))
        return fail(g->err, "%s: general.architecture is missing, expected \"gemma3\"", g->name), -1;
    if (check_string(g, "general.architecture", "gemma3", "gemma3")) return -1;
    for (size_t k = 0; k < g->n_tensors; k++) {
        struct string name = g->tensor[k].name;
        if (name.n > 5 && !memcmp(name.text, "dense", 5))
            return fail(g->err, "%s: tensor %s belongs to an embedding model (EmbeddingGemma), not to a Gemma 3 text model",
                        g->name, shown(name, text)), -1;
        if (name.n > 16 && !memcmp(name.text + name.n - 15, "attn_qkv.weight", 15))
            return fail(g->err, "%s: tensor %s is a fused projection, expected attn_q, attn_k and attn_v", g->name,
                        shown(name, text)), -1;
    }
    return 0;
}

/* [ne1][ne0], and what is not 1 before them. */
static const char *shape_of(const struct tensor *t, char out[96])
{
    int n = 0;
    for (int k = t->ne[3] != 1 ? 3 : t->ne[2] != 1 ? 2 : 1; k >= 0; k--)
        n += snprintf(out + n, 96 - n, "[%llu]", (unsigned long long)t->ne[k]);
    return out;
}

/* Finds a tensor and checks its type, shape and end: [rows][cols], rows 0 for "any". */
static int bind(struct opening *o, const char *name, int rows, int cols, struct matrix *w)
{
    const struct gguf *g = &o->g;
    const struct tensor *t = find_tensor(g, name);
    if (!t) return fail(g->err, "%s: tensor %s is missing", g->name, name), -1;
    w->format = find_format(t->type);
    if (!w->format)
        return fail(g->err, "%s: tensor %s has type %u, which is not supported (F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 "
                    "Q2_K to Q6_K IQ4_NL are)", g->name, name, (unsigned)t->type), -1;
    char shape[96], want[32] = "any number of tokens";
    if (rows) snprintf(want, sizeof want, "%d", rows);
    if (t->ne[0] != (uint64_t)cols || (rows ? t->ne[1] != (uint64_t)rows : t->ne[1] < 1 || t->ne[1] > 1 << 24) ||
        t->ne[2] != 1 || t->ne[3] != 1)
        return fail(g->err, "%s: tensor %s is %s, expected [%s][%d]", g->name, name, shape_of(t, shape), want,
                    cols), -1;
    if (cols % w->format->elements)
        return fail(g->err, "%s: tensor %s has rows of %d, expected a multiple of %s's block of %d", g->name, name,
                    cols, w->format->name, w->format->elements), -1;
    w->rows = (int)t->ne[1];
    w->cols = cols;
    w->tiled = 0;
    w->row_bytes = (size_t)(cols / w->format->elements) * w->format->bytes;
    uint64_t bytes = (uint64_t)w->row_bytes * w->rows;
    if (t->offset % g->alignment)
        return fail(g->err, "%s: tensor %s is at offset %llu, expected a multiple of %llu", g->name, name,
                    (unsigned long long)t->offset, (unsigned long long)g->alignment), -1;
    if (t->offset > g->data_bytes || bytes > g->data_bytes - t->offset)
        return fail(g->err, "%s is truncated: tensor %s ends %llu bytes past the end of the file", g->name, name,
                    (unsigned long long)(t->offset + bytes - g->data_bytes)), -1;
    w->data = g->data + t->offset;
    o->m->weight_bytes += (size_t)bytes;
    return 0;
}

static int bind_layer(struct opening *o, int l, const char *name, int rows, int cols, struct matrix *w)
{
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s.weight", l, name);
    return bind(o, full, rows, cols, w);
}

/* A norm's vector: any float type, copied out as float32. */
static int bind_norm(struct opening *o, const char *name, int n, const float **out)
{
    struct matrix w;
    if (bind(o, name, 1, n, &w)) return -1;
    if (!is_float(w.format))
        return fail(o->g.err, "%s: tensor %s has type %s, expected F32", o->g.name, name, w.format->name), -1;
    o->m->kernels->dequantize(&w, 0, o->norms);
    *out = o->norms;
    o->norms += n;
    return 0;
}

static int bind_layer_norm(struct opening *o, int l, const char *name, int n, const float **out)
{
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s.weight", l, name);
    return bind_norm(o, full, n, out);
}

/* Heads: some converters leave the keys out, the tensors' shapes always tell. */
static int configure_heads(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    const struct tensor *q = find_tensor(&o->g, "blk.0.attn_q.weight"), *k = find_tensor(&o->g, "blk.0.attn_k.weight");
    if (get_int(&o->g, "attention.head_count", 1, 1024, -1, &c->n_heads)) return -1;
    int from_q = q && q->ne[1] <= 1 << 20 ? (int)q->ne[1] / c->n_heads : 0;
    if (get_int(&o->g, "attention.key_length", 2, 1024, from_q, &c->head_dim)) return -1;
    if (c->head_dim < 2 || c->head_dim % 2)
        return fail(o->g.err, "%s: heads of %d elements, expected an even number", o->g.name, c->head_dim), -1;
    int from_k = k && k->ne[1] <= 1 << 20 ? (int)k->ne[1] / c->head_dim : 0, value_length;
    if (get_int(&o->g, "attention.head_count_kv", 1, 1024, from_k, &c->n_kv_heads)) return -1;
    if (c->n_kv_heads < 1 || c->n_heads % c->n_kv_heads)
        return fail(o->g.err, "%s: %d query heads do not divide into %d key-value heads", o->g.name, c->n_heads,
                    c->n_kv_heads), -1;
    if (get_int(&o->g, "attention.value_length", 1, 1024, c->head_dim, &value_length)) return -1;
    if (value_length != c->head_dim)
        return fail(o->g.err, "%s: gemma3.attention.value_length is %d, expected key_length's %d", o->g.name,
                    value_length, c->head_dim), -1;
    return 0;
}

/* Which layers are local: gemma3.attention.sliding_window_pattern is absent (6), a number n (every
 * n-th layer is global), or an array with one bool for each layer (true: local). */
static int configure_layers(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    int known = c->n_layers == 18 || c->n_layers == 26 ? 512   /* 270M, 1B; 4B, 12B, 27B */
              : c->n_layers == 34 || c->n_layers == 48 || c->n_layers == 62 ? 1024 : 0, pattern;
    if (get_int(&o->g, "attention.sliding_window", 0, 1 << 24, known, &c->window)) return -1;
    const struct kv *kv = find_kv(&o->g, "gemma3.attention.sliding_window_pattern");
    int is_array = kv && kv->type == KV_ARRAY;
    if (is_array && (kv->element != KV_BOOL || kv->count < (uint64_t)c->n_layers))
        return fail(o->g.err, "%s: gemma3.attention.sliding_window_pattern must have one bool for each of %d layers",
                    o->g.name, c->n_layers), -1;
    if (is_array) pattern = 0;
    else if (get_int(&o->g, "attention.sliding_window_pattern", 0, GEMMA3_MAX_LAYERS, 6, &pattern)) return -1;
    for (int l = 0; l < c->n_layers; l++) {
        int local = is_array ? kv->value.p[l] != 0 : pattern > 1 && (l + 1) % pattern != 0;
        c->is_local[l] = (uint8_t)(local && c->window > 0);
    }
    return 0;
}

static int configure_rope(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    int large = c->n_layers == 34 || c->n_layers == 48 || c->n_layers == 62;
    if (check_string(&o->g, "gemma3.rope.scaling.type", "linear", "none")) return -1;
    struct string type = get_string(&o->g, "gemma3.rope.scaling.type");
    if (get_float(&o->g, "rope.freq_base", "rope.global.freq_base", 1, 1e6f, &c->rope_base_global) ||
        get_float(&o->g, "rope.freq_base_swa", "rope.local.freq_base", 1, 1e4f, &c->rope_base_local) ||
        get_float(&o->g, "rope.scaling.factor", "rope.scale_linear", 0, large ? 8 : 1, &c->rope_factor))
        return -1;
    if (c->rope_factor == 0 || string_is(type, "none")) c->rope_factor = 1;
    c->rope_factor_local = 1;
    /* Angles are at most position / factor, positions below 2^24: cos_sin can take angles below 2^31. */
    if (c->rope_factor < 0x1p-7f)
        return fail(o->g.err, "%s: gemma3.rope.scaling.factor is %g, expected at least 1/128 (angles must stay below 2^31)",
                    o->g.name, (double)c->rope_factor), -1;
    return 0;
}

static int configure(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    const struct gguf *g = &o->g;
    if (get_int(g, "block_count", 1, GEMMA3_MAX_LAYERS, -1, &c->n_layers) ||
        get_int(g, "embedding_length", 1, 1 << 16, -1, &c->d_model) ||
        get_int(g, "feed_forward_length", 1, 1 << 20, -1, &c->d_ff) ||
        get_int(g, "context_length", 1, 1 << 24, 32768, &c->n_ctx_train) ||
        get_float(g, "attention.layer_norm_rms_epsilon", NULL, 0, 1e-6f, &c->rms_eps) ||
        get_float(g, "final_logit_softcapping", NULL, 0, 0, &c->final_softcap))
        return -1;
    if (configure_heads(o) || configure_layers(o) || configure_rope(o)) return -1;
    /* 27B's queries are scaled by 1/sqrt(d_model / n_heads) = 1/sqrt(168), not by 1/sqrt(head_dim). */
    int n = c->n_layers == 62 ? c->d_model / c->n_heads : c->head_dim;
    c->query_scale = 1.0f / sqrt_of((float)n);
    c->embedding_scale = sqrt_of((float)c->d_model);
    return 0;
}

/* The arrays that the tokenizer works on; strings stay in the file. */
static int read_vocab(struct opening *o)
{
    gemma3_model *m = o->m;
    const struct gguf *g = &o->g;
    const struct kv *tokens = find_kv(g, "tokenizer.ggml.tokens"), *scores = find_kv(g, "tokenizer.ggml.scores");
    const struct kv *types = find_kv(g, "tokenizer.ggml.token_type");
    if (!tokens || tokens->type != KV_ARRAY || tokens->element != KV_STRING || !tokens->count)
        return fail(g->err, "%s: key tokenizer.ggml.tokens is missing or no array of strings", g->name), -1;
    int n = m->token_embd.rows;
    if (tokens->count < (uint64_t)n) n = (int)tokens->count;
    m->config.n_vocab = n;
    if (!scores || scores->type != KV_ARRAY || scores->element != KV_F32 || scores->count < (uint64_t)n)
        return fail(g->err, "%s: key tokenizer.ggml.scores must be an array of %d f32", g->name, n), -1;
    if (types && (types->type != KV_ARRAY || (types->element != KV_I32 && types->element != KV_U32) ||
                  types->count < (uint64_t)n))
        return fail(g->err, "%s: key tokenizer.ggml.token_type must be an array of %d i32", g->name, n), -1;
    const char **text = own(o, n * sizeof *text, "the vocabulary");
    uint32_t *length = own(o, n * (sizeof *length + sizeof(float) + sizeof(int32_t)), "the vocabulary");
    if (!text || !length) return -1;
    float *score = (float *)(void *)(length + n);
    int32_t *type = (int32_t *)(void *)(score + n);
    struct cursor c = tokens->value;
    for (int k = 0; k < n; k++) {
        struct string s = take_string(&c);
        if (s.n > GEMMA3_PIECE_MAX)
            return fail(g->err, "%s: key tokenizer.ggml.tokens: token %d has %llu bytes, expected at most %d", g->name,
                        k, (unsigned long long)s.n, GEMMA3_PIECE_MAX), -1;
        text[k] = s.text;
        length[k] = (uint32_t)s.n;
        score[k] = float_of(load_u32_le(scores->value.p + 4 * (size_t)k));
        type[k] = types ? (int32_t)load_u32_le(types->value.p + 4 * (size_t)k) : 1;
    }
    m->vocab = (gemma3_vocab){.n_vocab = n, .text = text, .length = length, .score = score, .type = type};
    return 0;
}

/* The id that a key gives, or, when it is absent, that of the token with this text; -1: none. */
static int special_id(const struct opening *o, const char *key, const char *text, int32_t *id)
{
    const struct kv *kv = find_kv(&o->g, key);
    const gemma3_vocab *v = &o->m->vocab;
    double x = -1;
    if (kv && !read_number(&o->g, kv, &x)) return -1;
    if (kv && !(x >= 0 && x < v->n_vocab))
        return fail(o->g.err, "%s: key %s is %.10g, outside the vocabulary of %d", o->g.name, key, x, v->n_vocab), -1;
    *id = (int32_t)x;
    if (*id != x) return fail(o->g.err, "%s: key %s is %.10g, expected an integer", o->g.name, key, x), -1;
    for (int32_t k = 0; !kv && *id < 0 && k < v->n_vocab; k++)
        if (string_is((struct string){v->text[k], v->length[k]}, text)) *id = k;
    return 0;
}

static int open_tokenizer(struct opening *o)
{
    gemma3_model *m = o->m;
    gemma3_vocab *v = &m->vocab;
    double add_bos = 1;
    if (check_string(&o->g, "tokenizer.ggml.model", "llama", "llama") || read_vocab(o) ||
        special_id(o, "tokenizer.ggml.bos_token_id", "<bos>", &v->bos) ||
        special_id(o, "tokenizer.ggml.eos_token_id", "<eos>", &v->eos) ||
        special_id(o, "tokenizer.ggml.unknown_token_id", "<unk>", &v->unknown))
        return -1;
    const struct kv *kv = find_kv(&o->g, "tokenizer.ggml.add_bos_token");
    if (kv && !read_number(&o->g, kv, &add_bos)) return -1;
    v->add_bos = add_bos != 0;
    size_t size = gemma3_tokenizer_size(v);
    void *mem = own(o, size, "the tokenizer");
    if (!mem) return -1;
    m->tokenizer = gemma3_tokenizer_init(v, mem, size, o->g.err);
    return m->tokenizer ? 0 : -1;
}

static int bind_weights(struct opening *o)
{
    gemma3_model *m = o->m;
    const gemma3_config *c = &m->config;
    int d = c->d_model, D = c->head_dim, q = c->n_heads * D, kv = c->n_kv_heads * D;
    o->norms = own(o, ((size_t)c->n_layers * (4 * d + 2 * D) + d) * sizeof(float), "the norms");
    if (!o->norms || bind(o, "token_embd.weight", 0, d, &m->token_embd) ||
        bind_norm(o, "output_norm.weight", d, &m->output_norm))
        return -1;
    m->output = m->token_embd;
    m->tied = !find_tensor(&o->g, "output.weight");
    if (!m->tied && bind(o, "output.weight", m->token_embd.rows, d, &m->output)) return -1;
    for (int l = 0; l < c->n_layers; l++) {
        struct layer *w = &m->layer[l];
        if (bind_layer_norm(o, l, "attn_norm", d, &w->attn_norm) ||
            bind_layer(o, l, "attn_q", q, d, &w->attn_q) ||
            bind_layer(o, l, "attn_k", kv, d, &w->attn_k) ||
            bind_layer(o, l, "attn_v", kv, d, &w->attn_v) ||
            bind_layer(o, l, "attn_output", d, q, &w->attn_output) ||
            bind_layer_norm(o, l, "attn_q_norm", D, &w->attn_q_norm) ||
            bind_layer_norm(o, l, "attn_k_norm", D, &w->attn_k_norm) ||
            bind_layer_norm(o, l, "post_attention_norm", d, &w->post_attention_norm) ||
            bind_layer_norm(o, l, "ffn_norm", d, &w->ffn_norm) ||
            bind_layer(o, l, "ffn_gate", c->d_ff, d, &w->ffn_gate) ||
            bind_layer(o, l, "ffn_up", c->d_ff, d, &w->ffn_up) ||
            bind_layer(o, l, "ffn_down", d, c->d_ff, &w->ffn_down) ||
            bind_layer_norm(o, l, "post_ffw_norm", d, &w->post_ffw_norm))
            return -1;
    }
    return 0;
}

/* ---- Integer formats into tiles ---- */

struct repack {
    const gemma3_model *m;
    struct matrix *w;
    uint8_t *to;
    int n_tasks;
};

/* A share of the work: small, because until its end its rows are in memory twice. */
enum { REPACK_BYTES = 1 << 19, MIN_REPACK_TASKS = 8 };

/* A share of the tiles; then the file's pages are given back, so that no row is in memory twice. */
static void repack_task(void *arg, int index, int worker)
{
    const struct repack *job = arg;
    const struct matrix *w = job->w;
    int tile, end, row, last;
    (void)worker;
    share_of(n_tiles(w), job->n_tasks, index, &tile, &end);
    row = tile * TILE_ROWS, last = end * TILE_ROWS < w->rows ? end * TILE_ROWS : w->rows;
    const uint8_t *from = w->data + row * w->row_bytes;
    for (int n; row < last; row += n) {
        n = last - row < TILE_ROWS ? last - row : TILE_ROWS;
        make_tile(job->to + row * w->row_bytes, w->data + row * w->row_bytes, w->row_bytes, n,
                  w->cols / w->format->elements, w->format);
    }
    host_give_back(job->m, from, (size_t)(w->data + last * w->row_bytes - from));
}

static size_t tiled_bytes(const struct matrix *w)
{
    return is_float(w->format) ? 0 : (size_t)n_tiles(w) * TILE_ROWS * w->row_bytes;
}

static void repack_one(struct opening *o, struct matrix *w, uint8_t **to)
{
    size_t bytes = tiled_bytes(w);
    struct repack job = {o->m, w, *to, MIN_REPACK_TASKS + (int)(bytes / REPACK_BYTES)};
    if (!bytes) return;
    if (o->options.parallel_for && o->options.n_threads > 1)
        o->options.parallel_for(o->options.pool, job.n_tasks, repack_task, &job);
    else
        for (int k = 0; k < job.n_tasks; k++) repack_task(&job, k, 0);
    w->data = *to;
    w->tiled = 1;
    *to += bytes;
}

static int repack(struct opening *o)
{
    gemma3_model *m = o->m;
    int n = 0, n_layers = m->config.n_layers;
    struct matrix *all[GEMMA3_MAX_LAYERS * 7 + 2];
    all[n++] = &m->token_embd;
    if (!m->tied) all[n++] = &m->output;
    for (int l = 0; l < n_layers; l++) {
        struct layer *w = &m->layer[l];
        struct matrix *of_layer[7] = {&w->attn_q, &w->attn_k, &w->attn_v, &w->attn_output,
                                      &w->ffn_gate, &w->ffn_up, &w->ffn_down};
        for (int k = 0; k < 7; k++) all[n++] = of_layer[k];
    }
    size_t bytes = 0;
    for (int k = 0; k < n; k++) bytes += tiled_bytes(all[k]);
    if (!bytes) return 0;
    uint8_t *to = own(o, bytes + 64, "the weights");
    if (!to) return -1;
    host_use_large_pages(to, bytes);
    to += -(uintptr_t)to & 63;
    for (int k = 0; k < n; k++) {
        repack_one(o, all[k], &to);
        if (o->options.progress) o->options.progress(o->options.user, (double)(k + 1) / n);
    }
    if (m->tied) m->output = m->token_embd;
    return 0;
}

static int choose_kernels(struct opening *o)
{
    const char *wanted = o->options.isa ? o->options.isa : gemma3_isa_name(0);
    for (int k = 0; k < N_KERNELS; k++)
        if (!strcmp(all_kernels[k].name, wanted) && cpu_has(wanted)) {
            o->m->kernels = &all_kernels[k];
            return 0;
        }
    return fail(o->g.err, "instruction set \"%s\" is unknown or this CPU does not have it", wanted), -1;
}

static int open_steps(struct opening *o, const void *data, size_t size)
{
    gemma3_model *m = o->m;
    const char *fault = arithmetic_fault();
    if (fault) return fail(o->g.err, "this build cannot keep the numeric contract: %s", fault), -1;
    if (choose_kernels(o) || read_gguf(&o->g, data, size) || refuse_others(o) || configure(o) ||
        bind_weights(o) || open_tokenizer(o))
        return -1;
    m->token_embd.rows = m->output.rows = m->config.n_vocab; /* rows beyond the tokens are padding */
    if (!m->exact && !o->options.no_repack && repack(o)) return -1;
    struct string name = get_string(&o->g, "general.name");
    memcpy(m->name, name.text, name.n < sizeof m->name - 1 ? name.n : sizeof m->name - 1);
    m->can_chat = get_string(&o->g, "tokenizer.chat_template").n > 0;
    return 0;
}

static gemma3_model *open_bytes(const void *data, size_t size, const char *name, const gemma3_options *options,
                                gemma3_error *err, gemma3_model *m)
{
    char shortened[SHORT_PATH];
    struct opening o = {.g = {.name = short_path(name, shortened), .err = err}, .m = m};
    fp_state fp = fp_enter();
    if (options) o.options = *options;
    m->exact = o.options.exact;
    int failed = open_steps(&o, data, size);
    free(o.g.kv);
    free(o.g.tensor);
    fp_leave(fp);
    if (failed) gemma3_close(m);
    return failed ? NULL : m;
}

gemma3_model *gemma3_open_memory(const void *data, size_t size, const char *name, const gemma3_options *options,
                                 gemma3_error *err)
{
    gemma3_model *m = calloc(1, sizeof *m);
    if (!name) name = "a model in memory";
    if (!m) return fail(err, "out of memory for a model");
    return open_bytes(data, size, name, options, err, m);
}

void gemma3_close(gemma3_model *m)
{
    if (!m) return;
    for (int k = 0; k < m->n_owned; k++) free(m->owned[k]);
    host_unmap(m);
    free(m);
}

const gemma3_config *gemma3_model_config(const gemma3_model *m) { return &m->config; }
static int matrix_tensor(const struct matrix *w, gemma3_tensor *out)
{
    out->format = w->format->name;
    out->rows = w->rows, out->cols = w->cols;
    out->data = w->data;
    out->bytes = (size_t)w->rows * w->row_bytes;
    return 0;
}

static int norm_tensor(const float *w, int n, gemma3_tensor *out)
{
    out->format = "F32";
    out->rows = 1, out->cols = n;
    out->data = out->floats = w;
    out->bytes = n * sizeof *w;
    return 0;
}

int gemma3_model_tensor(const gemma3_model *m, int index, gemma3_tensor *out)
{
    static const char *const names[] = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_q_norm", "attn_k_norm",
        "attn_output", "post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm"};
    const gemma3_config *c = &m->config;
    int l = (index - 1) / 13, k = (index - 1) % 13, after = index - 1 - 13 * c->n_layers;
    memset(out, 0, sizeof *out);
    if (index < 0 || after > (m->tied ? 0 : 1)) return -1;
    if (index == 0 || after >= 0)
        snprintf(out->name, sizeof out->name, "%s.weight", index == 0 ? "token_embd" : after ? "output" : "output_norm");
    else snprintf(out->name, sizeof out->name, "blk.%d.%s.weight", l, names[k]);
    if (index == 0) return matrix_tensor(&m->token_embd, out);
    if (after == 0) return norm_tensor(m->output_norm, c->d_model, out);
    if (after == 1) return matrix_tensor(&m->output, out);
    const struct layer *w = &m->layer[l];
    const struct matrix *matrices[13] = {NULL, &w->attn_q, &w->attn_k, &w->attn_v, NULL, NULL, &w->attn_output, NULL,
                                         NULL, &w->ffn_gate, &w->ffn_up, &w->ffn_down, NULL};
    const float *norms[13] = {w->attn_norm, NULL, NULL, NULL, w->attn_q_norm, w->attn_k_norm, NULL,
                              w->post_attention_norm, w->ffn_norm, NULL, NULL, NULL, w->post_ffw_norm};
    if (matrices[k]) return matrix_tensor(matrices[k], out);
    return norm_tensor(norms[k], k == 4 || k == 5 ? c->head_dim : c->d_model, out);
}

const gemma3_tokenizer *gemma3_model_tokenizer(const gemma3_model *m) { return m->tokenizer; }
const char *gemma3_model_isa(const gemma3_model *m) { return m->kernels->name; }
const char *gemma3_model_name(const gemma3_model *m) { return m->name; }
int gemma3_model_is_exact(const gemma3_model *m) { return m->exact; }
int gemma3_model_can_chat(const gemma3_model *m) { return m->can_chat; }
size_t gemma3_model_weight_bytes(const gemma3_model *m) { return m->weight_bytes; }

size_t gemma3_model_token_bytes(const gemma3_model *m)
{
    return m->weight_bytes - (m->tied ? 0 : m->token_embd.row_bytes * m->token_embd.rows);
}

/* ==== 13. Sizes and states ====================================================================== */

/* Takes pieces of one block, each aligned to 64 bytes; with base NULL it only counts. */
struct arena {
    uint8_t *base;
    size_t used;
};

/* Sizes stop at SIZE_MAX, which no memory has, instead of wrapping on a machine of 32 bits. */
static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }
static size_t plus(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }

static void *piece(struct arena *a, size_t count, size_t bytes)
{
    void *p = a->base ? a->base + a->used : NULL;
    size_t size = times(count, bytes);
    a->used = plus(a->used, size > SIZE_MAX - 63 ? SIZE_MAX : (size + 63) & ~(size_t)63);
    return p;
}

static void size_state(gemma3_state *s, const gemma3_config *c, const gemma3_params *p)
{
    s->p = *p;
    s->chunk = p->n_batch < GEMMA3_CHUNK ? p->n_batch : GEMMA3_CHUNK;
    s->chunk = s->chunk < p->n_ctx ? s->chunk : p->n_ctx;
    s->pack = s->chunk < 4 ? s->chunk : 4;
    s->n_acc = s->chunk < 16 ? 16 : s->chunk; /* attention has that many queries of a kv head */
    s->ring = c->window + s->chunk - 1 < p->n_ctx ? c->window + s->chunk - 1 : p->n_ctx;
}

size_t gemma3_kv_bytes(const gemma3_config *c, const gemma3_params *p)
{
    gemma3_state s;
    size_t slots = 0;
    size_state(&s, c, p);
    for (int l = 0; l < c->n_layers; l++) slots = plus(slots, c->is_local[l] ? s.ring : p->n_ctx);
    return times(times(slots, times(c->n_kv_heads, c->head_dim)), 2 * kv_element(&s));
}

static int widest_input(const gemma3_config *c)
{
    int widest = c->d_model > c->d_ff ? c->d_model : c->d_ff;
    return widest > c->n_heads * c->head_dim ? widest : c->n_heads * c->head_dim;
}

/* Where everything of a state lies. The one place that knows: sizes are counted by the same lines. */
static void lay_out(gemma3_state *s, struct arena *a)
{
    const gemma3_config *c = s->config;
    size_t D = c->head_dim, q = c->n_heads * D, kv = times(c->n_kv_heads, D), n = s->chunk;
    size_t pack_q = (size_t)s->pack * c->n_heads, blocks = ((size_t)widest_input(c) + 31) / 32;
    for (int l = 0; l < c->n_layers; l++) {
        s->k_cache[l] = piece(a, times(slots_of(s, l), kv), kv_element(s));
        s->v_cache[l] = piece(a, times(slots_of(s, l), kv), kv_element(s));
    }
    for (int local = 0; local < 2; local++) {
        s->inv_freq[local] = piece(a, D / 2, sizeof(float));
        s->cosine[local] = piece(a, n * (D / 2), sizeof(float));
        s->sine[local] = piece(a, n * (D / 2), sizeof(float));
    }
    s->x = piece(a, n * c->d_model, sizeof(float));
    s->h = piece(a, n * c->d_model, sizeof(float));
    s->q = piece(a, n * q, sizeof(float));
    s->attended = piece(a, n * q, sizeof(float));
    s->k = piece(a, times(n, kv), sizeof(float));
    s->v = piece(a, times(n, kv), sizeof(float));
    s->gate = piece(a, n * c->d_ff, sizeof(float));
    s->up = piece(a, n * c->d_ff, sizeof(float));
    s->pack_q = piece(a, pack_q * D, sizeof(float));
    s->pack_out = piece(a, pack_q * D, sizeof(float));
    s->score_sum = piece(a, pack_q, sizeof(float));
    s->n_score = ((size_t)s->p.n_ctx + 15) & ~(size_t)15;
    s->score = piece(a, times(pack_q, s->n_score), sizeof(float));
    s->xq = piece(a, s->m->exact ? 0 : n * blocks, sizeof *s->xq);
    s->acc = piece(a, (size_t)s->p.n_threads * s->n_acc, sizeof *s->acc);
    s->unpacked = piece(a, s->m->exact ? 0 : (size_t)s->p.n_threads, sizeof *s->unpacked);
    s->row_floats = piece(a, s->m->exact ? (size_t)s->p.n_threads * ROWS_AT_ONCE * blocks : 0, 32 * sizeof(float));
}

gemma3_params gemma3_default_params(const gemma3_model *m)
{
    gemma3_params p = {.n_ctx = m->config.n_ctx_train < 4096 ? m->config.n_ctx_train : 4096, .n_batch = 512,
                       .kv_type = m->exact ? GEMMA3_KV_F32 : GEMMA3_KV_F16, .n_threads = 1};
    return p;
}

size_t gemma3_state_size(const gemma3_model *m, const gemma3_params *p)
{
    gemma3_state s = {.m = m, .config = p->config ? p->config : &m->config};
    struct arena a = {NULL, 0};
    size_state(&s, s.config, p);
    lay_out(&s, &a);
    return plus(a.used, sizeof s + 128); /* to align any memory to 64 */
}

/* -1 and a sentence when no state can be made of these. */
static int check_params(const gemma3_model *m, const gemma3_params *p, gemma3_error *err)
{
    if (p->n_ctx < 1 || p->n_ctx > 1 << 24)
        return fail(err, "a context of %d tokens: expected 1 to %d", p->n_ctx, 1 << 24), -1;
    if (p->n_batch < 1) return fail(err, "a batch of %d tokens: expected at least 1", p->n_batch), -1;
    if (p->n_threads < 1 || p->n_threads > GEMMA3_MAX_THREADS)
        return fail(err, "%d threads: expected 1 to %d", p->n_threads, GEMMA3_MAX_THREADS), -1;
    if (p->n_threads > 1 && !p->parallel_for)
        return fail(err, "%d threads, but no parallel_for to run them", p->n_threads), -1;
    if (gemma3_state_size(m, p) == SIZE_MAX)
        return fail(err, "a context of %d tokens needs more memory than this machine can address", p->n_ctx), -1;
    return 0;
}

gemma3_state *gemma3_state_init(const gemma3_model *m, const gemma3_params *p, void *mem, size_t size,
                                gemma3_error *err)
{
    const gemma3_config *c = p->config ? p->config : &m->config;
    if (check_params(m, p, err)) return NULL;
    size_t need = gemma3_state_size(m, p);
    if (size < need)
        return fail(err, "a state needs %llu bytes, %llu were given", (unsigned long long)need,
                    (unsigned long long)size);
    fp_state fp = fp_enter();
    gemma3_state *s = (gemma3_state *)(((uintptr_t)mem + 63) & ~(uintptr_t)63);
    struct arena a = {(uint8_t *)s + ((sizeof *s + 63) & ~(size_t)63), 0};
    memset(s, 0, sizeof *s);
    s->m = m;
    s->config = c;
    size_state(s, c, p);
    lay_out(s, &a);
    for (int local = 0; local < 2; local++)
        for (int j = 0; j < c->head_dim / 2; j++) {
            float base = local ? c->rope_base_local : c->rope_base_global;
            float turned = (float)power(base, 2.0 * j / c->head_dim);
            s->inv_freq[local][j] = (1.0f / turned) / (local ? c->rope_factor_local : c->rope_factor);
        }
    fp_leave(fp);
    return s;
}

gemma3_state *gemma3_state_new(const gemma3_model *m, const gemma3_params *p, gemma3_error *err)
{
    if (check_params(m, p, err)) return NULL;
    size_t size = gemma3_state_size(m, p);
    void *mem = malloc(size);
    if (!mem)
        return fail(err, "out of memory for a context of %d tokens (%llu bytes)", p->n_ctx, (unsigned long long)size);
    gemma3_state *s = gemma3_state_init(m, p, mem, size, err);
    if (!s) free(mem);
    else s->allocated = mem;
    return s;
}

void gemma3_state_free(gemma3_state *s)
{
    if (s) free(s->allocated);
}

void gemma3_state_reset(gemma3_state *s) { s->pos = 0; }
int gemma3_state_pos(const gemma3_state *s) { return s->pos; }
int gemma3_state_n_ctx(const gemma3_state *s) { return s->p.n_ctx; }
const char *gemma3_state_error(const gemma3_state *s) { return s->error; }

/* ==== 14. Scores, sampling, SHA-256 ============================================================= */

/* Logits are looked at SCAN at a time: only where the largest of them could matter, one by one. */
enum { SCAN = 256 };

#define MINUS_INFINITY float_of(0xff800000)

/* The largest of n <= SCAN logits; -infinity when all are NaN. */
static float largest_of(const float *logits, int n)
{
    float lane[16];
    int j = 0;
    for (int k = 0; k < 16; k++) lane[k] = MINUS_INFINITY;
    for (; j + 16 <= n; j += 16)
        for (int k = 0; k < 16; k++) lane[k] = logits[j + k] > lane[k] ? logits[j + k] : lane[k];
    for (; j < n; j++) lane[0] = logits[j] > lane[0] ? logits[j] : lane[0];
    for (int k = 1; k < 16; k++) lane[0] = lane[k] > lane[0] ? lane[k] : lane[0];
    return lane[0];
}

int32_t gemma3_argmax(const float *logits, int n_vocab)
{
    fp_state fp = fp_enter();
    int32_t best = 0;
    float top = MINUS_INFINITY;
    for (int32_t first = 0, n; first < n_vocab; first += n) {
        n = n_vocab - first < SCAN ? n_vocab - first : SCAN;
        if (!(largest_of(logits + first, n) > top)) continue;
        for (int32_t id = first; id < first + n; id++)
            if (logits[id] > top) top = logits[id], best = id;
    }
    fp_leave(fp);
    return best;
}

double gemma3_nll(const float *logits, int n_vocab, int32_t id)
{
    fp_state fp = fp_enter();
    float max = logits[gemma3_argmax(logits, n_vocab)];
    double lane[16] = {0};
    for (int j = 0; j < n_vocab; j++) lane[j % 16] += exp_double((double)logits[j] - max);
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    double nll = ((double)max - logits[id]) + log_double(lane[0]);
    fp_leave(fp);
    return nll;
}

gemma3_sampler gemma3_sampler_new(uint64_t seed)
{
    gemma3_sampler s = {.temperature = 1, .top_k = 64, .top_p = 0.95f, .repeat_penalty = 1};
    uint64_t z = seed + 0x9E3779B97F4A7C15; /* splitmix64 */
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    z ^= z >> 31;
    s.rng = z ? z : 1;
    return s;
}

void gemma3_sampler_accept(gemma3_sampler *s, int32_t id)
{
    s->last[s->n_last++ % GEMMA3_PENALTY_WINDOW] = id;
    if (s->n_last == 2 * GEMMA3_PENALTY_WINDOW) s->n_last = GEMMA3_PENALTY_WINDOW;
}

static float next_uniform(gemma3_sampler *s) /* xorshift64*, 24 bits, [0, 1) */
{
    s->rng ^= s->rng >> 12;
    s->rng ^= s->rng << 25;
    s->rng ^= s->rng >> 27;
    return (float)(s->rng * 0x2545F4914F6CDD1D >> 40) * 0x1p-24f;
}

/* Whether the repeat penalty changes this token, and its logit then. */
static int is_penalized(const gemma3_sampler *s, int32_t id)
{
    int n = s->n_last < GEMMA3_PENALTY_WINDOW ? s->n_last : GEMMA3_PENALTY_WINDOW;
    for (int k = 0; k < n && s->repeat_penalty != 1; k++)
        if (s->last[k] == id) return 1;
    return 0;
}

static gemma3_candidate candidate(const gemma3_sampler *s, const float *logits, int32_t id)
{
    float l = logits[id] == logits[id] ? logits[id] : MINUS_INFINITY; /* NaN never wins */
    if (is_penalized(s, id)) l = l > 0 ? l / s->repeat_penalty : l * s->repeat_penalty;
    return (gemma3_candidate){l, id};
}

/* 1 when a comes before b: logit down, id up. */
static int before(gemma3_candidate a, gemma3_candidate b)
{
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

static int compare_ids(const void *a, const void *b)
{
    return ((const gemma3_candidate *)a)->id - ((const gemma3_candidate *)b)->id;
}

/* Puts the root of a heap of n where it belongs. On top is the one that comes first or, with
 * last_on_top, last. */
static void sink(gemma3_candidate *c, int n, int root, int last_on_top)
{
    gemma3_candidate new = c[root];
    for (int child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && before(c[child], c[child + 1]) == last_on_top) child++;
        if (before(new, c[child]) != last_on_top) break;
        c[root] = c[child];
    }
    c[root] = new;
}

static void make_heap(gemma3_candidate *c, int n, int last_on_top)
{
    for (int root = n / 2; root-- > 0;) sink(c, n, root, last_on_top);
}

/* Puts one more into a heap of the k that come first, the last of them on top. */
static int offer(gemma3_candidate *c, int n, int k, gemma3_candidate new)
{
    if (n < k) {
        c[n++] = new;
        if (n == k) make_heap(c, k, 1);
    } else if (before(new, c[0])) {
        c[0] = new;
        sink(c, k, 0, 1);
    }
    return n;
}

/* Puts the k <= n_vocab candidates that come first into c[0 .. k-1], by selection. Penalised tokens are
 * offered ahead of the others: then a run of logits below the last one kept can be passed over. */
static void keep_best(const gemma3_sampler *s, const float *logits, int n_vocab, gemma3_candidate *c, int k)
{
    int kept = 0, n_last = s->n_last < GEMMA3_PENALTY_WINDOW ? s->n_last : GEMMA3_PENALTY_WINDOW;
    for (int a = 0; a < n_last && s->repeat_penalty != 1; a++) {
        int again = s->last[a] < 0 || s->last[a] >= n_vocab;
        for (int b = 0; b < a; b++) again |= s->last[b] == s->last[a];
        if (!again) kept = offer(c, kept, k, candidate(s, logits, s->last[a]));
    }
    for (int32_t first = 0, n; first < n_vocab; first += n) {
        n = n_vocab - first < SCAN ? n_vocab - first : SCAN;
        if (kept == k && largest_of(logits + first, n) < c[0].logit) continue;
        for (int32_t id = first; id < first + n; id++)
            if ((kept < k || !(logits[id] < c[0].logit)) && !is_penalized(s, id))
                kept = offer(c, kept, k, candidate(s, logits, id));
    }
}

static float weight(const gemma3_sampler *s, float logit, float top)
{
    return exp_of(HARD_FMA, (logit - top) / s->temperature);
}

/* Draws one of n candidates. They leave a heap in order, and only as many as top-p keeps: these gather
 * behind it, the first one last, with their weight in place of their logit. */
static int32_t draw(gemma3_sampler *s, gemma3_candidate *c, int n, float top, float total)
{
    float sum = 0, kept = 0, limit = s->top_p * total;
    int left = n;
    make_heap(c, n, 0);
    while (left > 0 && (left == n || sum < limit)) {
        gemma3_candidate first = c[0];
        c[0] = c[--left];
        sink(c, left, 0, 0);
        first.logit = weight(s, first.logit, top);
        sum += first.logit;
        c[left] = first;
    }
    for (int j = n - 1; j >= left; j--)
        if (c[j].logit >= s->min_p) kept += c[j].logit;
    float u = next_uniform(s) * kept;
    int32_t chosen = c[n - 1].id;
    sum = 0;
    for (int j = n - 1; j >= left && !(sum > u); j--)
        if (c[j].logit >= s->min_p) sum += c[j].logit, chosen = c[j].id;
    return chosen;
}

int32_t gemma3_sample(gemma3_sampler *s, const float *logits, int n_vocab, gemma3_candidate *c)
{
    fp_state fp = fp_enter();
    float lane[16] = {0};
    int n = s->temperature > 0 ? n_vocab : 1, best = 0;
    if (s->top_k > 0 && s->top_k < n) n = s->top_k;
    if (n < n_vocab) {
        keep_best(s, logits, n_vocab, c, n);
        qsort(c, n, sizeof *c, compare_ids);
    } else
        for (int32_t id = 0; id < n_vocab; id++) c[id] = candidate(s, logits, id);
    for (int j = 1; j < n; j++)
        if (c[j].logit > c[best].logit) best = j;
    int32_t chosen = c[best].id;
    float top = c[best].logit;
    if (n > 1 && top - top == 0) {
        for (int j = 0; j < n; j++) lane[c[j].id % 16] += weight(s, c[j].logit, top);
        chosen = draw(s, c, n, top, join_lanes(lane));
    }
    fp_leave(fp);
    return chosen;
}

/* ---- SHA-256 ---- */

static uint32_t turn_right(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* Constants: the first 32 bits of the fractions of the cube roots of the first 64 primes. */
static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void sha256_block(gemma3_sha256 *c)
{
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)c->block[4 * i] << 24 | (uint32_t)c->block[4 * i + 1] << 16 |
               (uint32_t)c->block[4 * i + 2] << 8 | c->block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + (turn_right(a, 7) ^ turn_right(a, 18) ^ a >> 3) + w[i - 7] +
               (turn_right(b, 17) ^ turn_right(b, 19) ^ b >> 10);
    }
    memcpy(v, c->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t t1 = v[7] + (turn_right(v[4], 6) ^ turn_right(v[4], 11) ^ turn_right(v[4], 25)) +
                      ((v[4] & v[5]) ^ (~v[4] & v[6])) + sha256_k[i] + w[i];
        uint32_t t2 = (turn_right(v[0], 2) ^ turn_right(v[0], 13) ^ turn_right(v[0], 22)) +
                      ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) c->h[i] += v[i];
}

void gemma3_sha256_init(gemma3_sha256 *c)
{
    static const uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                  0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    memset(c, 0, sizeof *c);
    memcpy(c->h, h, sizeof h);
}

void gemma3_sha256_add(gemma3_sha256 *c, const void *data, size_t n)
{
    const uint8_t *p = data;
    while (n > 0) {
        size_t at = c->n_low % 64, room = 64 - at, now = n < room ? n : room;
        memcpy(c->block + at, p, now);
        p += now;
        n -= now;
        c->n_low += (uint32_t)now;
        c->n_high += c->n_low < now;
        if (at + now == 64) sha256_block(c);
    }
}

void gemma3_sha256_add_floats(gemma3_sha256 *c, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t u = bits_of(x[i]);
        const uint8_t bytes[4] = {(uint8_t)u, (uint8_t)(u >> 8), (uint8_t)(u >> 16), (uint8_t)(u >> 24)};
        gemma3_sha256_add(c, bytes, 4);
    }
}

void gemma3_sha256_end(gemma3_sha256 *c, char hex[65])
{
    uint8_t length[8], pad = 0x80;
    uint64_t n_bits = ((uint64_t)c->n_high << 32 | c->n_low) * 8;
    for (int i = 0; i < 8; i++) length[i] = (uint8_t)(n_bits >> (56 - 8 * i));
    gemma3_sha256_add(c, &pad, 1);
    for (pad = 0; c->n_low % 64 != 56;) gemma3_sha256_add(c, &pad, 1);
    gemma3_sha256_add(c, length, 8);
    for (int i = 0; i < 64; i++) hex[i] = "0123456789abcdef"[c->h[i / 8] >> (28 - 4 * (i % 8)) & 15];
    hex[64] = 0;
}

/* ==== 15. Threads and files of the host ========================================================= */

#if !defined(GEMMA3_NO_FILE)
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* madvise for the whole pages inside [begin, begin + n). */
static void advise(const uint8_t *begin, size_t n, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = ((uintptr_t)begin + page - 1) / page * page;
    uintptr_t to = ((uintptr_t)begin + n) / page * page;
    if (to > from) madvise((void *)from, to - from, advice);
}

/* After repacking, the file's pages are not needed any more. */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n)
{
    if (m->mapping) advise(begin, n, MADV_DONTNEED);
}

static void host_use_large_pages(uint8_t *begin, size_t n)
{
#if defined(MADV_HUGEPAGE)
    advise(begin, n, MADV_HUGEPAGE);
#else
    (void)begin, (void)n;
#endif
}

static void host_unmap(const gemma3_model *m)
{
    if (m->mapping) munmap((void *)(uintptr_t)m->mapping, m->mapping_bytes);
}

gemma3_model *gemma3_open(const char *path, const gemma3_options *options, gemma3_error *err)
{
    struct stat st;
    char shortened[SHORT_PATH];
    if (!path) return fail(err, "no path of a model was given");
    const char *name = short_path(path, shortened);
    int fd = open(path, O_RDONLY | O_NONBLOCK); /* a FIFO is not waited for */
    if (fd < 0) return fail(err, "%s cannot be opened: %s", name, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        return fail(err, "%s is not a regular file", name);
    }
    if (st.st_size == 0 || (uint64_t)st.st_size > SIZE_MAX) {
        close(fd);
        return fail(err, "%s has %lld bytes: %s", name, (long long)st.st_size,
                    st.st_size ? "more than this machine can address" : "it is empty");
    }
    void *data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    int map_error = errno;
    close(fd);
    if (data == MAP_FAILED) return fail(err, "%s cannot be mapped: %s", name, strerror(map_error));
    gemma3_model *m = calloc(1, sizeof *m);
    if (!m) {
        munmap(data, (size_t)st.st_size);
        return fail(err, "%s: out of memory", name);
    }
    m->mapping = data;
    m->mapping_bytes = (size_t)st.st_size;
    return open_bytes(data, m->mapping_bytes, path, options, err, m);
}

/* The first number in a file, or other. */
static long number_in(const char *path, long other)
{
    long number;
    FILE *f = fopen(path, "r");
    if (!f || fscanf(f, "%ld", &number) != 1) number = other;
    if (f) fclose(f);
    return number;
}

/* The cores this process may use: of the hardware threads that share a core one counts (two of them
 * gain nothing where memory or multipliers are the limit), fast and slow cores alike, because tasks go
 * to whoever is free. */
static int usable_cores(void)
{
#if defined(__linux__)
    enum { MAX_CPUS = 1024 };
    cpu_set_t may_use;
    uint8_t seen[MAX_CPUS] = {0};
    int cores = 0;
    if (sched_getaffinity(0, sizeof may_use, &may_use)) return (int)sysconf(_SC_NPROCESSORS_ONLN);
    for (int cpu = 0; cpu < MAX_CPUS && cpu < CPU_SETSIZE; cpu++) {
        char path[96];
        if (!CPU_ISSET(cpu, &may_use)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        long core = number_in(path, cpu); /* named by the first of its threads */
        if (core < 0 || core >= MAX_CPUS) core = cpu;
        cores += !seen[core];
        seen[core] = 1;
    }
    return cores;
#else
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
#endif
}

/* A container may have fewer CPUs' worth of time than CPUs: "quota period" in microseconds, the period
 * usually 100000, or "max". */
int gemma3_default_threads(void)
{
    int cores = usable_cores();
    long quota = number_in("/sys/fs/cgroup/cpu.max", 0), n = quota > 0 ? (quota + 99999) / 100000 : cores;
    if (n < cores) cores = (int)n;
    return cores < 1 ? 1 : cores > GEMMA3_MAX_THREADS ? GEMMA3_MAX_THREADS : cores;
}

/* A call of gemma3_pool_run is a round. `ticket` holds the round's number and how many of its tasks are
 * left to claim in one word, so that a thread that comes late can claim nothing of a round that has
 * ended, and a claim proves that task and job are still this round's. A worker spins a while for the
 * next round, then sleeps. */
struct gemma3_pool {
    int n_threads;
    pthread_t *thread;
    _Atomic uint64_t ticket;          /* round << LEFT_BITS | tasks left */
    _Atomic int done, sleepers, stop;
    gemma3_task *_Atomic task;
    void *_Atomic job;
    pthread_mutex_t round;            /* held during a round: states that share a pool take turns */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

enum { LEFT_BITS = 24, SPINS = 20000 }; /* a fifth of a millisecond: longer than what one thread does alone */

struct worker {
    gemma3_pool *pool;
    int id;
};

static void relax(int spin)
{
#if defined(HAVE_X86)
    _mm_pause();
#endif
    if (spin % 256 == 255) sched_yield();
}

/* Claims and runs tasks of the current round until none is left. */
static void work(gemma3_pool *pool, int worker)
{
    for (;;) {
        uint64_t ticket = atomic_load(&pool->ticket);
        int left = (int)(ticket & ((1 << LEFT_BITS) - 1));
        if (left == 0) return;
        gemma3_task *task = atomic_load(&pool->task);
        void *job = atomic_load(&pool->job);
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket - 1)) continue;
        task(job, left - 1, worker);
        atomic_fetch_add(&pool->done, 1);
    }
}

static void sleep_until_round(gemma3_pool *pool, uint64_t seen)
{
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->ticket) >> LEFT_BITS == seen && !atomic_load(&pool->stop))
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *arg)
{
    struct worker me = *(struct worker *)arg;
    gemma3_pool *pool = me.pool;
    uint64_t seen = 0;
    free(arg);
    fp_enter();
    while (!atomic_load(&pool->stop)) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool->ticket) >> LEFT_BITS == seen; spin++) relax(spin);
        if (atomic_load(&pool->ticket) >> LEFT_BITS == seen) sleep_until_round(pool, seen);
        seen = atomic_load(&pool->ticket) >> LEFT_BITS;
        work(pool, me.id);
    }
    return NULL;
}

void gemma3_pool_run(void *arg, int n_tasks, gemma3_task *task, void *job)
{
    gemma3_pool *pool = arg;
    pthread_mutex_lock(&pool->round);
    uint64_t round = (atomic_load(&pool->ticket) >> LEFT_BITS) + 1;
    atomic_store(&pool->task, task); /* nothing is left of the last round: no one reads these yet */
    atomic_store(&pool->job, job);
    atomic_store(&pool->done, 0);
    atomic_store(&pool->ticket, round << LEFT_BITS | (unsigned)n_tasks);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    work(pool, 0);
    for (int spin = 0; atomic_load(&pool->done) < n_tasks; spin++) relax(spin);
    pthread_mutex_unlock(&pool->round);
}

gemma3_pool *gemma3_pool_new(int n_threads, gemma3_error *err)
{
    gemma3_pool *pool = calloc(1, sizeof *pool);
    if (!pool || !(pool->thread = calloc(n_threads > 0 ? n_threads : 1, sizeof *pool->thread))) {
        free(pool);
        return fail(err, "out of memory for %d threads", n_threads);
    }
    pthread_mutex_init(&pool->round, NULL);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (pool->n_threads = 1; pool->n_threads < n_threads; pool->n_threads++) {
        struct worker *w = malloc(sizeof *w);
        if (w) *w = (struct worker){pool, pool->n_threads};
        if (!w || pthread_create(&pool->thread[pool->n_threads], NULL, worker_main, w)) {
            fail(err, "thread %d of %d cannot be started", pool->n_threads + 1, n_threads);
            free(w);
            gemma3_pool_free(pool);
            return NULL;
        }
    }
    return pool;
}

void gemma3_pool_free(gemma3_pool *pool)
{
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int k = 1; k < pool->n_threads; k++) pthread_join(pool->thread[k], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    pthread_mutex_destroy(&pool->round);
    free(pool->thread);
    free(pool);
}
#else
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n) { (void)m, (void)begin, (void)n; }
static void host_use_large_pages(uint8_t *begin, size_t n) { (void)begin, (void)n; }
static void host_unmap(const gemma3_model *m) { (void)m; }
#endif /* GEMMA3_NO_FILE */

#ifndef GEMMA3_NO_MAIN

/* ==== 16. The command line ======================================================================
 *
 * From here on only gemma3.h is used: this is the worked example of the library, and whoever wants
 * the library alone deletes from here to the end. The parts: the options, the few things asked of
 * the system, a session (an opened model with what belongs to it), then one part for each job.
 *
 * Text and results go to stdout, everything else to stderr. main returns 0, 1 when the job failed
 * or 2 when the command line was wrong; a function that can fail returns that number, having said
 * why in one sentence. */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stddef.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char default_model[] = "gemma3-folktales-q4_0.gguf";

enum {
    MAX_STOPS = 32,          /* --stop texts */
    MAX_STOP_BYTES = 1000,   /* of one of them */
    MAX_FILE_BYTES = 1 << 29, /* of a text: the tokenizer takes no more */
    DEFAULT_CHUNK = 512,     /* tokens of --perplexity's pieces, as in llama-perplexity */
};

/* Set by Ctrl-C during a chat. A signal handler can be given nothing, so this is the one variable
 * of the program that does not live in a struct. */
static volatile sig_atomic_t interrupted;

/* Says what went wrong with the job. */
static int complain(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fputs("gemma3: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    return 1;
}

/* Says what is wrong with the command line. */
static int refuse(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fputs("gemma3: ", stderr);
    vfprintf(stderr, format, list);
    fputs(" (gemma3 --help lists the options)\n", stderr);
    va_end(list);
    return 2;
}

static int out_of_memory(size_t n_bytes, const char *what)
{
    return complain("out of memory: %s needs %zu bytes", what, n_bytes);
}

static int lesser(int a, int b)
{
    return a < b ? a : b;
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- Command line: the options ---- */

struct texts {
    const char *text[MAX_STOPS];
    int n;
};

struct numbers {
    int32_t *value;          /* owned */
    int n;
};

struct maybe_text {
    int given;
    const char *text;        /* NULL: the option stood without a text */
};

struct args {
    const char *model, *prompt, *file, *ids_file, *system, *isa, *kv;
    const char *logits, *perplexity, *trace, *trace_dir;
    struct maybe_text tokenize;
    struct numbers positions, detokenize;
    struct texts stop;
    int chat, out_ids, exact, no_repack, no_bos, special, hash, nll, info, version, help;
    int n_predict;           /* -1: until a stop token */
    int n_ctx;               /* 0: the default of the job */
    int n_threads, n_batch, top_k, top;
    double temperature, top_p, min_p, repeat_penalty;
    uint64_t seed;
};

enum option_kind { HEADING, FLAG, NUMBER, REAL, SEED, TEXT, MAYBE_TEXT, TEXTS, NUMBERS };

struct option {
    const char *name;        /* as typed; of a HEADING, the heading */
    const char *value;       /* what --help calls the value */
    enum option_kind kind;
    size_t field;            /* offset in struct args */
    double least, most;      /* of a NUMBER or REAL */
    const char *help;
};

#define FIELD(name) offsetof(struct args, name)

static const struct option options[] = {
    {"What to read", NULL, HEADING, 0, 0, 0, NULL},
    {"-m", "MODEL", TEXT, FIELD(model), 0, 0,
     "a Gemma 3 GGUF; default: gemma3-folktales-q4_0.gguf beside the\n"
     "program, in its weights/, or the same in the current folder"},
    {"-p", "TEXT", TEXT, FIELD(prompt), 0, 0, "continue TEXT, as it stands, after <bos>"},
    {"-f", "FILE", TEXT, FIELD(file), 0, 0, "continue the text in FILE; - is stdin"},
    {"--ids", "FILE", TEXT, FIELD(ids_file), 0, 0,
     "continue the ids in FILE, separated by spaces or line ends; no\n<bos> is added; - is stdin"},
    {"-i", NULL, FLAG, FIELD(chat), 0, 0,
     "chat, in Gemma's turns; /clear forgets, /quit ends, Ctrl-C stops\nan answer"},
    {"--system", "TEXT", TEXT, FIELD(system), 0, 0, "put before the first turn of a chat"},
    {"--special", NULL, FLAG, FIELD(special), 0, 0,
     "control tokens spelled in the text are those tokens, and are\nshown in what is printed"},
    {"--no-bos", NULL, FLAG, FIELD(no_bos), 0, 0, "no <bos> before the text"},

    {"What to write", NULL, HEADING, 0, 0, 0, NULL},
    {"-n", "N", NUMBER, FIELD(n_predict), 0, INT_MAX,
     "tokens to generate; default: until a stop token or the end of\nthe context"},
    {"--temp", "T", REAL, FIELD(temperature), 0, 1e6,
     "temperature; 0: always the likeliest; default 1"},
    {"--top-k", "K", NUMBER, FIELD(top_k), 0, INT_MAX,
     "choose among the K likeliest; 0: all; default 64"},
    {"--top-p", "P", REAL, FIELD(top_p), 0, 1,
     "among the likeliest with this probability together; default 0.95"},
    {"--min-p", "P", REAL, FIELD(min_p), 0, 1,
     "among those with P times the largest probability; default 0"},
    {"--repeat-penalty", "R", REAL, FIELD(repeat_penalty), 1e-6, 1e6,
     "against repeating any of the last 64 tokens; default 1: none"},
    {"--seed", "S", SEED, FIELD(seed), 0, 0, "a seed gives the same text everywhere; default 42"},
    {"--stop", "TEXT", TEXTS, FIELD(stop), 0, 0, "end before TEXT; may be given several times"},
    {"--out-ids", NULL, FLAG, FIELD(out_ids), 0, 0,
     "print the ids generated, without the stop token, not their text"},

    {"Numbers instead of text (nothing is generated unless -n is given)", NULL, HEADING, 0, 0, 0,
     NULL},
    {"--logits", "FILE", TEXT, FIELD(logits), 0, 0,
     "float32, little-endian, [positions][n_vocab]; - is stdout, and\n"
     "what else is asked for goes to stderr"},
    {"--positions", "LIST", NUMBERS, FIELD(positions), 0, 0,
     "rows of --logits and --hash, as 0,5,-1; from the end when\nnegative; default: all"},
    {"--hash", NULL, FLAG, FIELD(hash), 0, 0,
     "contract, mode, type of the cache, SHA-256 of those same logits"},
    {"--top", "N", NUMBER, FIELD(top), 1, INT_MAX,
     "the N likeliest next tokens: id, text, logit, probability"},
    {"--nll", NULL, FLAG, FIELD(nll), 0, 0,
     "for each position: pos, id, -log p(id given those before)"},
    {"--perplexity", "FILE", TEXT, FIELD(perplexity), 0, 0,
     "of the text in FILE by llama-perplexity's method: chunks of -c\n"
     "tokens (default 512), the second half of each is scored"},
    {"--trace", "NAMES", TEXT, FIELD(trace), 0, 0,
     "tensors inside, of the prompt, by llama.cpp's labels: l_out-7,\nattn_norm (of every layer)"},
    {"--trace-dir", "DIR", TEXT, FIELD(trace_dir), 0, 0,
     "write them whole, DIR/l_out-7.f32, float32, little-endian; DIR is\nmade when it is absent"},
    {"--tokenize", "TEXT", MAYBE_TEXT, FIELD(tokenize), 0, 0,
     "ids of TEXT; without TEXT, of the file given with -f"},
    {"--detokenize", "IDS", NUMBERS, FIELD(detokenize), 0, 0,
     "bytes of the ids, as \"2 818 5279\""},

    {"How to compute", NULL, HEADING, 0, 0, 0, NULL},
    {"-c", "N", NUMBER, FIELD(n_ctx), 1, 1 << 24,
     "context in tokens; default: the smaller of the model's and 4096"},
    {"-t", "N", NUMBER, FIELD(n_threads), 1, GEMMA3_MAX_THREADS,
     "threads; default: physical cores"},
    {"-b", "N", NUMBER, FIELD(n_batch), 1, INT_MAX,
     "tokens of the prompt taken at once; default 512"},
    {"--exact", NULL, FLAG, FIELD(exact), 0, 0, "weights and activations in float32"},
    {"--kv", "f16|f32", TEXT, FIELD(kv), 0, 0,
     "numbers in the cache; default f16, with --exact f32"},
    {"--isa", "NAME", TEXT, FIELD(isa), 0, 0,
     "force the kernels of an instruction set; list: those that this\nCPU can run, best first"},
    {"--no-repack", NULL, FLAG, FIELD(no_repack), 0, 0,
     "use the weights where they lie in the file: opens faster, runs\nslower, same bits"},

    {"About", NULL, HEADING, 0, 0, 0, NULL},
    {"--info", NULL, FLAG, FIELD(info), 0, 0, "the model's hyperparameters, and memory in bytes"},
    {"--version", NULL, FLAG, FIELD(version), 0, 0, "of the program and of the numeric contract"},
    {"--help", NULL, FLAG, FIELD(help), 0, 0, "this text"},
};

enum { N_OPTIONS = sizeof options / sizeof *options };

static int print_help(void)
{
    puts("usage: gemma3 [-m MODEL] -p TEXT | -f FILE | --ids FILE | -i  [options]\n\n"
         "Runs Gemma 3. For a model and a sequence of ids, mode (--exact or not) and --kv give\n"
         "one bit pattern of logits, on every machine and with every other option.");
    for (int i = 0; i < N_OPTIONS; i++) {
        const struct option *o = &options[i];
        if (o->kind == HEADING) {
            printf("\n%s:\n", o->name);
            continue;
        }
        int n = printf("  %s %s", o->name, o->value ? o->value : "");
        printf("%*s", n < 24 ? 24 - n : 1, "");
        for (const char *c = o->help; *c; c++)
            if (*c == '\n')
                printf("\n%24s", "");
            else
                putchar(*c);
        putchar('\n');
    }
    puts("\nExit: 0, 1 when the job failed, 2 when the command line was wrong.");
    return 0;
}

static const struct option *find_option(const char *name, size_t n)
{
    for (int i = 0; i < N_OPTIONS; i++)
        if (options[i].kind != HEADING && strlen(options[i].name) == n &&
            memcmp(options[i].name, name, n) == 0)
            return &options[i];
    return NULL;
}

/* Reads whole numbers parted by any of the separators. Returns how many, -1 at something else (*bad
 * then points there), -2 without memory. */
static int parse_numbers(const char *text, const char *separators, struct numbers *out,
                         const char **bad)
{
    size_t room = strlen(text) / 2 + 1;
    int32_t *value = malloc(room * sizeof *value);
    size_t n = 0;
    if (!value)
        return -2;
    text += strspn(text, separators);
    while (*text) {
        char *end;
        errno = 0;
        long number = strtol(text, &end, 10);
        if (end == text || (*end && !strchr(separators, *end)) || errno || number < INT32_MIN ||
            number > INT32_MAX || n == INT_MAX) {
            free(value);
            *bad = text;
            return -1;
        }
        value[n++] = (int32_t)number;
        text = end + strspn(end, separators);
    }
    free(out->value);
    out->value = value;
    out->n = (int)n;
    return out->n;
}

static int set_number(const struct option *o, const char *text, void *field)
{
    char *end;
    errno = 0;
    if (o->kind == REAL) {
        double x = strtod(text, &end);
        if (end == text || *end || !(x >= o->least && x <= o->most))
            return refuse("%s %s: expected a number from %g to %g", o->name, text, o->least,
                          o->most);
        *(double *)field = x;
    } else if (o->kind == SEED) {
        unsigned long long x = strtoull(text, &end, 10);
        if (*text < '0' || *text > '9' || *end || errno)
            return refuse("%s %s: expected a whole number from 0 to 2^64-1", o->name, text);
        *(uint64_t *)field = x;
    } else {
        long x = strtol(text, &end, 10);
        if (end == text || *end || errno || x < (long)o->least || x > (long)o->most)
            return refuse("%s %s: expected a whole number from %.0f to %.0f", o->name, text,
                          o->least, o->most);
        *(int *)field = (int)x;
    }
    return 0;
}

static int add_text(const struct option *o, const char *text, struct texts *list)
{
    if (list->n == MAX_STOPS)
        return refuse("%s: %d of them are possible", o->name, MAX_STOPS);
    if (*text == 0 || strlen(text) > MAX_STOP_BYTES)
        return refuse("%s: expected a text of 1 to %d bytes", o->name, MAX_STOP_BYTES);
    list->text[list->n++] = text;
    return 0;
}

static int set_option(struct args *a, const struct option *o, const char *text)
{
    void *field = (char *)a + o->field;
    const char *bad;
    int n;
    switch (o->kind) {
    case FLAG:
        *(int *)field = 1;
        return 0;
    case TEXT:
        *(const char **)field = text;
        return 0;
    case MAYBE_TEXT:
        *(struct maybe_text *)field = (struct maybe_text){1, text};
        return 0;
    case TEXTS:
        return add_text(o, text, field);
    case NUMBERS:
        n = parse_numbers(text, ", \t\n", field, &bad);
        if (n == 0 || n == -1)
            return refuse("%s \"%s\": expected whole numbers parted by commas or spaces", o->name,
                          text);
        return n > 0 ? 0 : out_of_memory(strlen(text) * 2, o->name);
    default:
        return set_number(o, text, field);
    }
}

/* Both "--seed 7" and "--seed=7". */
static int parse_args(struct args *a, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *text = NULL;
        size_t n = strncmp(name, "--", 2) == 0 ? strcspn(name, "=") : strlen(name);
        const struct option *o = find_option(name, n);
        if (!o)
            return refuse(*name == '-' ? "unknown option %s" : "unexpected argument \"%s\"", name);
        if (name[n] == '=')
            text = name + n + 1;
        if (o->kind == FLAG && text)
            return refuse("%s takes no value", o->name);
        if (o->kind == MAYBE_TEXT && !text && i + 1 < argc &&
            !find_option(argv[i + 1], strlen(argv[i + 1])))
            text = argv[++i];
        if (o->kind != FLAG && o->kind != MAYBE_TEXT && !text) {
            if (i + 1 == argc)
                return refuse("%s needs a value: %s", o->name, o->value);
            text = argv[++i];
        }
        int code = set_option(a, o, text);
        if (code)
            return code;
    }
    return 0;
}

enum job { CONTINUE, CHAT, PERPLEXITY, TOKENIZE, DETOKENIZE, INFO };

static int wants_numbers(const struct args *a)
{
    return a->logits || a->hash || a->top || a->nll || a->trace;
}

/* Which of the jobs is meant; each excludes the others. */
static int choose_job(const struct args *a, enum job *job)
{
    int n_jobs = (a->prompt || a->file || a->ids_file) + a->chat + !!a->perplexity +
                 (a->tokenize.given && a->tokenize.text) + !!a->detokenize.n + a->info;
    int n_prompts = !!a->prompt + !!a->file + !!a->ids_file;
    if (n_jobs > 1)
        return refuse("contradictory: one of -p, -f, --ids, -i, --perplexity, --tokenize, "
                      "--detokenize and --info, not several");
    if (n_prompts > 1 || (a->tokenize.given && (a->prompt || a->ids_file)))
        return refuse("contradictory: one of -p, -f, --ids and --tokenize TEXT, not several");
    if (a->tokenize.given && !a->tokenize.text && !a->file)
        return refuse("--tokenize needs a TEXT or -f FILE");
    if (n_jobs == 0)
        return refuse("nothing to do: give a prompt with -p TEXT, -f FILE (- is stdin) or "
                      "--ids FILE, or chat with -i");
    *job = a->info ? INFO : a->detokenize.n ? DETOKENIZE : a->tokenize.given ? TOKENIZE :
           a->perplexity ? PERPLEXITY : a->chat ? CHAT : CONTINUE;
    return 0;
}

static int check_isa(const char *isa)
{
    if (!isa)
        return 0;
    char list[256] = "";
    for (int i = 0; gemma3_isa_name(i); i++) {
        if (strcmp(gemma3_isa_name(i), isa) == 0)
            return 0;
        size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, " %s", gemma3_isa_name(i));
    }
    return refuse("--isa %s: this CPU can run%s", isa, list);
}

static int check_args(const struct args *a, enum job *job)
{
    int code = choose_job(a, job);
    if (!code)
        code = check_isa(a->isa);
    if (code)
        return code;
    if (a->kv && strcmp(a->kv, "f16") != 0 && strcmp(a->kv, "f32") != 0)
        return refuse("--kv %s: expected f16 or f32", a->kv);
    if (*job != CONTINUE && wants_numbers(a))
        return refuse("--logits, --hash, --top, --nll and --trace need -p, -f or --ids");
    if (*job != CONTINUE && *job != CHAT && a->n_predict > 0)
        return refuse("-n needs a prompt to continue: -p, -f, --ids or -i");
    if (a->positions.n && !a->logits && !a->hash)
        return refuse("--positions needs --logits or --hash");
    if (a->trace_dir && !a->trace)
        return refuse("--trace-dir needs --trace");
    if (a->system && !a->chat)
        return refuse("--system needs -i");
    if (*job == PERPLEXITY && a->n_ctx && a->n_ctx < 3)
        return refuse("-c %d: --perplexity needs chunks of 3 tokens or more", a->n_ctx);
    return 0;
}

/* ---- Command line: files ---- */

/* The beginning of a text for a message: nothing in it can do anything to a terminal. */
static const char *printable(const char *text, char out[24])
{
    size_t n = 0;
    for (; text[n] && n < 20; n++)
        out[n] = text[n] >= 32 && text[n] < 127 ? text[n] : '?';
    out[n] = 0;
    return out;
}

/* Bytes of a regular file, 0 of anything else. */
static long long size_of_file(FILE *f)
{
    struct stat st;
    return fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode) ? (long long)st.st_size : 0;
}

/* All bytes of a file, "-" being stdin, and a NUL after them. */
static int read_whole(const char *path, char **data, size_t *n)
{
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    size_t room = 1 << 16, got = 0;
    if (!f)
        return complain("%s: %s", path, strerror(errno));
    long long size = size_of_file(f);
    char *bytes = size <= MAX_FILE_BYTES ? malloc(room + 1) : NULL;
    errno = 0;
    while (bytes) {
        got += fread(bytes + got, 1, room - got, f);
        if (got < room || room > MAX_FILE_BYTES)
            break;
        char *larger = realloc(bytes, (room *= 2) + 1);
        if (!larger)
            free(bytes);
        bytes = larger;
    }
    int failed = ferror(f), reason = errno;
    if (f != stdin)
        fclose(f);
    if (size > MAX_FILE_BYTES)
        return complain("%s: %lld bytes, expected at most %d", path, size, MAX_FILE_BYTES);
    if (!bytes)
        return out_of_memory(room, path);
    bytes[got] = 0;
    *data = bytes, *n = got;
    if (failed)
        return complain("%s: %s", path, strerror(reason));
    if (got > MAX_FILE_BYTES)
        return complain("%s: expected at most %d bytes", path, MAX_FILE_BYTES);
    return 0;
}

/* Writes float32 as little-endian bytes on any machine. */
static int write_floats(FILE *f, const float *x, size_t n)
{
    unsigned char bytes[4 * 512];
    for (size_t i = 0; i < n;) {
        size_t count = 0;
        for (; count < 512 && i < n; count++, i++) {
            uint32_t u;
            memcpy(&u, &x[i], 4);
            for (int k = 0; k < 4; k++)
                bytes[4 * count + k] = (unsigned char)(u >> 8 * k);
        }
        if (fwrite(bytes, 4, count, f) != count)
            return -1;
    }
    return 0;
}

/* Something could not be written, errno says why. A reader that has gone away knows. */
static int write_failed(const char *what)
{
    return errno == EPIPE ? 1 : complain("%s: %s", what, strerror(errno ? errno : EIO));
}

/* What is in stdout's buffer gets out, or we say why not: errno is that of the write that failed, now
 * or, with nothing left in the buffer, before. */
static int flush_stdout(void)
{
    return fflush(stdout) == 0 && !ferror(stdout) ? 0 : write_failed("standard output");
}

/* ---- Command line: tracing ---- */

/* One tensor that --trace asked for. The prompt comes in several calls: rows are appended. */
struct tensor_seen {
    char name[64];           /* with its layer: l_out-7 */
    size_t n_rows;
    int width;
    float first[3], last[3], least, most;
    double sum;
};

struct watch {
    const char *names;       /* --trace's list */
    const char *dir;         /* NULL: summaries */
    struct tensor_seen *seen;
    int n_seen, room;
    char trouble[300];       /* what went wrong, "" while nothing has */
};

/* Whether a name of the list, of n bytes, asks for this tensor: l_out is every layer's. */
static int asks_for(const char *wanted, size_t n, const char *name, const char *with_layer)
{
    return (strlen(name) == n && memcmp(wanted, name, n) == 0) ||
           (strlen(with_layer) == n && memcmp(wanted, with_layer, n) == 0);
}

static int is_watched(const struct watch *w, const char *name, const char *with_layer)
{
    for (const char *p = w->names; *p; p += *p == ',') {
        size_t n = strcspn(p, ",");
        if (asks_for(p, n, name, with_layer))
            return 1;
        p += n;
    }
    return 0;
}

static struct tensor_seen *find_seen(struct watch *w, const char *with_layer)
{
    for (int i = 0; i < w->n_seen; i++)
        if (strcmp(w->seen[i].name, with_layer) == 0)
            return &w->seen[i];
    if (w->n_seen == w->room) {
        int room = w->room ? 2 * w->room : 64;
        struct tensor_seen *larger = realloc(w->seen, (size_t)room * sizeof *larger);
        if (!larger)
            return NULL;
        w->seen = larger, w->room = room;
    }
    struct tensor_seen *t = &w->seen[w->n_seen++];
    *t = (struct tensor_seen){.least = INFINITY, .most = -INFINITY};
    snprintf(t->name, sizeof t->name, "%s", with_layer);
    return t;
}

/* first and last: the first and the last three values of the whole tensor. */
static void summarize(struct tensor_seen *t, const float *x, size_t n)
{
    if (t->n_rows == 0)
        memcpy(t->first, x, (n < 3 ? n : 3) * sizeof *x);
    if (n >= 3)
        memcpy(t->last, x + n - 3, 3 * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        t->sum += (double)x[i];
        t->least = x[i] < t->least ? x[i] : t->least;
        t->most = x[i] > t->most ? x[i] : t->most;
    }
}

/* Opened anew for every call: all layers of all tensors are more files than may be open at once. */
static void append_floats(struct watch *w, const struct tensor_seen *t, const float *x, size_t n)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s.f32", w->dir, t->name) >= (int)sizeof path) {
        snprintf(w->trouble, sizeof w->trouble, "--trace-dir: the name is too long");
        return;
    }
    FILE *f = fopen(path, t->n_rows ? "ab" : "wb");
    int failed = !f || write_floats(f, x, n);
    if ((f && fclose(f)) || failed)
        snprintf(w->trouble, sizeof w->trouble, "%.200s: %.80s", path, strerror(errno));
}

/* The library calls this with every tensor inside. */
static void see_tensor(void *user, const char *name, int layer, int pos, int n, int width,
                       float *data)
{
    struct watch *w = user;
    char with_layer[64];
    (void)pos;
    snprintf(with_layer, sizeof with_layer, layer < 0 ? "%s" : "%s-%d", name, layer);
    if (w->trouble[0] || !is_watched(w, name, with_layer))
        return;
    struct tensor_seen *t = find_seen(w, with_layer);
    if (!t) {
        snprintf(w->trouble, sizeof w->trouble, "out of memory for --trace");
        return;
    }
    size_t n_values = (size_t)n * (size_t)width;
    if (w->dir)
        append_floats(w, t, data, n_values);
    else
        summarize(t, data, n_values);
    t->n_rows += (size_t)n;
    t->width = width;
}

/* Whether a name of n bytes is a label, or, as l_out-7, one with a layer. */
static int is_label(const char *name, size_t n, int n_layers)
{
    const char *label;
    int in_layers;
    for (int i = 0; (label = gemma3_trace_label(i, &in_layers)); i++) {
        if (asks_for(name, n, label, label))
            return 1;
        for (int l = 0; in_layers && l < n_layers; l++) {
            char with_layer[64];
            snprintf(with_layer, sizeof with_layer, "%s-%d", label, l);
            if (asks_for(name, n, label, with_layer))
                return 1;
        }
    }
    return 0;
}

/* Before anything is computed: are all names of the list known? */
static int check_names(const char *names, int n_layers)
{
    for (const char *p = names;; p++) {
        size_t n = strcspn(p, ",");
        if (!is_label(p, n, n_layers))
            return complain("--trace: the model has no tensor \"%.*s\" (names are llama.cpp's: "
                            "attn_norm, Qcur, l_out-0, result_norm ...)", (int)n, p);
        p += n;
        if (!*p)
            return 0;
    }
}

/* Makes the folder unless it is there. */
static int make_folder(const char *path)
{
    struct stat st;
    if (mkdir(path, 0777) == 0)
        return 0;
    if (errno == EEXIST && stat(path, &st) == 0 && !S_ISDIR(st.st_mode))
        errno = ENOTDIR;
    if (errno != EEXIST || access(path, W_OK | X_OK))
        return complain("%s: %s", path, strerror(errno));
    return 0;
}

static int print_watched(const struct watch *w, FILE *out)
{
    if (w->trouble[0])
        return complain("%s", w->trouble);
    for (int i = 0; i < w->n_seen; i++) {
        const struct tensor_seen *t = &w->seen[i];
        fprintf(out, "%s [%zu][%d]", t->name, t->n_rows, t->width);
        if (w->dir)
            fprintf(out, " %s/%s.f32\n", w->dir, t->name);
        else
            fprintf(out, " first %.9g %.9g %.9g last %.9g %.9g %.9g sum %.9g min %.9g max %.9g\n",
                    t->first[0], t->first[1], t->first[2], t->last[0], t->last[1], t->last[2],
                    t->sum, t->least, t->most);
    }
    return 0;
}

/* ---- Command line: a session ---- */

/* Text on its way to stdout: whole characters only, and nothing that may be the start of a --stop
 * text before that is decided. */
struct printer {
    gemma3_utf8 utf8;
    char held[MAX_STOP_BYTES + 1];
    size_t n_held;
    int n_tokens;            /* printed since the text began */
    int stopped;             /* a --stop text came */
};

struct session {
    const struct args *args;
    gemma3_pool *pool;
    const char *model_path;
    gemma3_model *model;
    const gemma3_config *config;
    const gemma3_tokenizer *tokenizer;
    gemma3_params params;
    gemma3_state *state;
    gemma3_sampler sampler;
    gemma3_candidate *candidates; /* [n_vocab] */
    int max_rows;            /* rows of logits computed at once */
    float *logits;           /* [max_rows][n_vocab] */
    int32_t *ids;            /* [n_ids] the prompt */
    int n_ids;
    FILE *out;               /* stdout, or stderr while the logits go to stdout */
    struct watch watch;
    struct printer printer;
    int n_read, n_written;   /* tokens, for the speed */
    double read_seconds, write_seconds;
};

static void show_loading(void *user, double fraction)
{
    (void)user;
    if (fraction < 1)
        fprintf(stderr, "\rloading %3.0f %%", 100 * fraction);
    else
        fprintf(stderr, "\r%20s\r", "");
}

/* The model that comes with the program lies beside it or in weights/. */
static const char *find_model(const char *program, char *path, size_t size)
{
    const char *slash = strrchr(program, '/');
    int n_dir = slash ? (int)(slash - program) + 1 : 0;
    for (int i = 0; i < 4; i++) {
        snprintf(path, size, "%.*s%s%s", i < 2 ? n_dir : 0, program, i % 2 ? "" : "weights/",
                 default_model);
        if (access(path, R_OK) == 0)
            return path;
    }
    return NULL;
}

static int open_model(struct session *s, const char *path, int computes)
{
    const struct args *a = s->args;
    gemma3_error err;
    int n_threads = computes ? a->n_threads : 1;
    s->model_path = path;
    s->pool = gemma3_pool_new(n_threads, &err);
    if (!s->pool)
        return complain("%s", err.text);
    gemma3_options o = {
        .exact = a->exact,
        .no_repack = a->no_repack || !computes,
        .isa = a->isa,
        .n_threads = n_threads,
        .parallel_for = gemma3_pool_run,
        .pool = s->pool,
        .progress = computes && isatty(STDERR_FILENO) ? show_loading : NULL,
    };
    s->model = gemma3_open(path, &o, &err);
    if (!s->model)
        return complain("%s", err.text);
    s->config = gemma3_model_config(s->model);
    s->tokenizer = gemma3_model_tokenizer(s->model);

    s->params = gemma3_default_params(s->model);
    if (a->n_ctx || a->perplexity)
        s->params.n_ctx = a->n_ctx ? a->n_ctx : DEFAULT_CHUNK;
    if (a->kv)
        s->params.kv_type = strcmp(a->kv, "f32") == 0 ? GEMMA3_KV_F32 : GEMMA3_KV_F16;
    s->params.n_batch = a->n_batch;
    s->params.n_threads = n_threads;
    s->params.parallel_for = gemma3_pool_run;
    s->params.pool = s->pool;
    return 0;
}

/* What computing needs besides the model. Scores are asked for by the tile, text by the row. */
static int open_state(struct session *s)
{
    const struct args *a = s->args;
    gemma3_error err;
    s->watch = (struct watch){.names = a->trace, .dir = a->trace_dir};
    if (a->trace) {
        s->params.trace = see_tensor;
        s->params.trace_user = &s->watch;
    }
    if (a->trace && check_names(a->trace, s->config->n_layers))
        return 1;
    if (a->trace_dir && make_folder(a->trace_dir))
        return 1;
    s->state = gemma3_state_new(s->model, &s->params, &err);
    if (!s->state)
        return complain("%s", err.text);

    size_t n_vocab = (size_t)s->config->n_vocab;
    s->max_rows = wants_numbers(a) || a->perplexity ? lesser(a->n_batch, GEMMA3_CHUNK) : 1;
    s->logits = calloc(n_vocab * (size_t)s->max_rows, sizeof *s->logits);
    if (!s->logits)
        return out_of_memory(n_vocab * (size_t)s->max_rows * sizeof *s->logits, "the logits");
    s->candidates = malloc(n_vocab * sizeof *s->candidates);
    if (!s->candidates)
        return out_of_memory(n_vocab * sizeof *s->candidates, "sampling");

    s->sampler = gemma3_sampler_new(a->seed);
    s->sampler.temperature = (float)a->temperature;
    s->sampler.top_k = a->top_k;
    s->sampler.top_p = (float)a->top_p;
    s->sampler.min_p = (float)a->min_p;
    s->sampler.repeat_penalty = (float)a->repeat_penalty;
    return 0;
}

static void close_session(struct session *s)
{
    free(s->ids);
    free(s->logits);
    free(s->candidates);
    free(s->watch.seen);
    gemma3_state_free(s->state);
    gemma3_close(s->model);
    gemma3_pool_free(s->pool);
}

static int encode_flags(const struct args *a)
{
    return (a->no_bos ? 0 : GEMMA3_BOS) | (a->special ? GEMMA3_SPECIAL : 0);
}

static int encode_text(struct session *s, const char *text, size_t n)
{
    size_t room = n + 1;
    s->ids = malloc(room * sizeof *s->ids);
    if (!s->ids)
        return out_of_memory(room * sizeof *s->ids, "the ids of the text");
    s->n_ids = gemma3_encode(s->tokenizer, text, n, encode_flags(s->args), s->ids, (int)room);
    return s->n_ids < 0 ? out_of_memory(gemma3_encode_work(n), "encoding the text") : 0;
}

static int encode_file(struct session *s, const char *path)
{
    char *text = NULL;
    size_t n = 0;
    int code = read_whole(path, &text, &n);
    if (!code)
        code = encode_text(s, text, n);
    free(text);
    return code;
}

static int check_ids(const struct session *s, const struct numbers *ids, const char *where)
{
    for (int i = 0; i < ids->n; i++)
        if (ids->value[i] < 0 || ids->value[i] >= s->config->n_vocab)
            return complain("%s: id %d is outside the vocabulary, 0 to %d", where,
                            (int)ids->value[i], s->config->n_vocab - 1);
    return 0;
}

static int read_ids(struct session *s, const char *path)
{
    char *text = NULL;
    size_t n_bytes = 0;
    struct numbers ids = {NULL, 0};
    const char *bad = NULL;
    char shown_bad[24];
    int code = read_whole(path, &text, &n_bytes);
    if (!code) {
        int n = parse_numbers(text, " \t\r\n\v\f", &ids, &bad);
        if (n == -2)
            code = out_of_memory(n_bytes * 2, path);
        else if (n == -1 || strlen(text) < n_bytes)
            code = complain("%s: expected ids parted by spaces or line ends, found \"%s\"", path,
                            n == -1 ? printable(bad, shown_bad) : "a zero byte");
        else
            code = check_ids(s, &ids, path);
    }
    free(text);
    s->ids = ids.value;
    s->n_ids = ids.n;
    return code;
}

/* Fills s->ids with what is to be continued or scored. */
static int read_prompt(struct session *s)
{
    const struct args *a = s->args;
    int code = a->ids_file ? read_ids(s, a->ids_file) :
               a->file ? encode_file(s, a->file) :
               a->perplexity ? encode_file(s, a->perplexity) :
               encode_text(s, a->prompt, strlen(a->prompt));
    if (!code && s->n_ids == 0)
        return complain("the prompt has no tokens");
    if (!code && !a->perplexity && s->n_ids > s->params.n_ctx)
        return complain("the prompt has %d tokens and the context room for %d: give -c %d or more",
                        s->n_ids, s->params.n_ctx, s->n_ids);
    return code;
}

/* A long prompt takes a while; somebody may be watching. */
static void show_reading(const struct session *s, int n_done, int n)
{
    if (n <= s->params.n_batch || !isatty(STDERR_FILENO))
        return;
    if (n_done < n)
        fprintf(stderr, "\rreading %d of %d tokens", n_done, n);
    else
        fprintf(stderr, "\r%40s\r", "");
}

/* Takes tokens through the model in batches; s->logits is then the last one's row. */
static int read_tokens(struct session *s, const int32_t *ids, int n)
{
    double start = seconds();
    for (int i = 0; i < n;) {
        int count = lesser(n - i, s->params.n_batch), row = count - 1;
        int is_last = i + count == n;
        if (gemma3_forward(s->state, ids + i, count, &row, is_last, s->logits))
            return complain("%s", gemma3_state_error(s->state));
        i += count;
        show_reading(s, i, n);
    }
    for (int i = 0; i < n; i++)
        gemma3_sampler_accept(&s->sampler, ids[i]);
    s->n_read += n;
    s->read_seconds += seconds() - start;
    return 0;
}

static void print_speed(const struct session *s)
{
    fprintf(stderr, "prompt %d tokens, %.1f tokens/s; generated %d tokens, %.1f tokens/s\n",
            s->n_read, s->read_seconds > 0 ? s->n_read / s->read_seconds : 0.0, s->n_written,
            s->write_seconds > 0 ? s->n_written / s->write_seconds : 0.0);
}

/* ---- Command line: text ---- */

/* How many of the first n bytes held are surely not the start of a --stop text. */
static size_t n_free_bytes(const struct printer *p, const struct texts *stop)
{
    for (size_t k = 0; k < p->n_held; k++)
        for (int i = 0; i < stop->n; i++)
            if (strncmp(stop->text[i], p->held + k, p->n_held - k) == 0)
                return k;
    return p->n_held;
}

static void print_byte(struct session *s, char byte)
{
    struct printer *p = &s->printer;
    const struct texts *stop = &s->args->stop;
    if (p->stopped)
        return;
    p->held[p->n_held++] = byte;
    size_t n = n_free_bytes(p, stop), n_gone = n;
    for (int i = 0; i < stop->n; i++) {
        size_t length = strlen(stop->text[i]);
        if (length > p->n_held ||
            memcmp(stop->text[i], p->held + p->n_held - length, length) != 0)
            continue;
        if (!p->stopped || n > p->n_held - length) /* of several the longest */
            n = p->n_held - length;
        n_gone = p->n_held;
        p->stopped = 1;
    }
    if (!s->args->out_ids)
        fwrite(p->held, 1, n, s->out);
    p->n_held -= n_gone;
    memmove(p->held, p->held + n_gone, p->n_held);
}

static int print_token(struct session *s, int32_t id)
{
    char piece[GEMMA3_PIECE_MAX], character[8];
    int n = gemma3_decode(s->tokenizer, id, s->args->special ? GEMMA3_SPECIAL : 0, piece);
    for (int i = 0; i < n; i++) {
        int n_bytes = gemma3_utf8_push(&s->printer.utf8, (unsigned char)piece[i], character);
        for (int k = 0; k < n_bytes; k++)
            print_byte(s, character[k]);
    }
    if (s->args->out_ids && !s->printer.stopped)
        fprintf(s->out, s->printer.n_tokens ? " %d" : "%d", (int)id);
    s->printer.n_tokens++;
    return s->out == stdout ? flush_stdout() : 0;
}

/* What is still held back is text after all. */
static int end_text(struct session *s)
{
    struct printer *p = &s->printer;
    char character[8];
    int n = gemma3_utf8_end(&p->utf8, character);
    for (int i = 0; i < n; i++)
        print_byte(s, character[i]);
    if (!s->args->out_ids && !p->stopped)
        fwrite(p->held, 1, p->n_held, s->out);
    if (s->args->out_ids || s->args->chat || isatty(STDOUT_FILENO))
        fputc('\n', s->out);
    return s->out == stdout ? flush_stdout() : 0;
}

/* Chooses, prints and takes in one token after another. In a chat the last one is taken in too,
 * because the conversation goes on after it. */
static int write_tokens(struct session *s)
{
    const struct args *a = s->args;
    double start = seconds();
    int code = 0;
    s->printer = (struct printer){.n_held = 0};
    for (int i = 0; !interrupted && !code && (a->n_predict < 0 || i < a->n_predict); i++) {
        int32_t id = gemma3_sample(&s->sampler, s->logits, s->config->n_vocab, s->candidates);
        if (gemma3_is_stop(s->tokenizer, id))
            break;
        gemma3_sampler_accept(&s->sampler, id);
        code = print_token(s, id);
        s->n_written++;
        int row = 0, is_last = i + 1 == a->n_predict || s->printer.stopped;
        if (code || (is_last && !a->chat))
            break;
        if (gemma3_state_pos(s->state) == gemma3_state_n_ctx(s->state)) {
            if (!is_last)
                fprintf(stderr, "\ngemma3: the context of %d tokens is full\n",
                        gemma3_state_n_ctx(s->state));
            break;
        }
        if (gemma3_forward(s->state, &id, 1, &row, !is_last, s->logits))
            code = complain("%s", gemma3_state_error(s->state));
        if (is_last)
            break;
    }
    s->write_seconds += seconds() - start;
    return code ? code : end_text(s);
}

/* ---- Command line: scores ---- */

/* The rows of --logits and --hash, on their way to the file and the hash. */
struct rows_out {
    int32_t *position;       /* [n] in the order asked for; NULL: all */
    int n, n_done;
    float *kept;             /* [n][n_vocab] when that order is not the model's, else NULL */
    FILE *file;
    const char *path;        /* --logits */
    char *target, *unready;  /* owned: the file meant, and its name until it is whole; or NULL */
    gemma3_sha256 hash;
};

static int write_row(struct rows_out *o, const float *row, int n_vocab)
{
    gemma3_sha256_add_floats(&o->hash, row, (size_t)n_vocab);
    if (!o->file || write_floats(o->file, row, (size_t)n_vocab) == 0)
        return 0;
    return write_failed(o->file == stdout ? "standard output" : o->path);
}

/* Turns --positions into indices, and finds out whether rows can be written as they come. */
static int begin_rows(struct session *s, struct rows_out *o)
{
    const struct numbers *p = &s->args->positions;
    int ascending = 1;
    gemma3_sha256_init(&o->hash);
    if (p->n == 0)
        return 0;
    o->position = malloc((size_t)p->n * sizeof *o->position);
    if (!o->position)
        return out_of_memory((size_t)p->n * sizeof *o->position, "--positions");
    for (; o->n < p->n; o->n++) {
        int position = p->value[o->n] + (p->value[o->n] < 0 ? s->n_ids : 0);
        if (position < 0 || position >= s->n_ids)
            return complain("--positions %d: the prompt has %d tokens", (int)p->value[o->n],
                            s->n_ids);
        ascending &= o->n == 0 || position >= o->position[o->n - 1];
        o->position[o->n] = position;
    }
    if (ascending)
        return 0;
    size_t n_values = (size_t)p->n * (size_t)s->config->n_vocab;
    o->kept = malloc(n_values * sizeof *o->kept);
    return o->kept ? 0 : out_of_memory(n_values * sizeof *o->kept, "--positions out of order");
}

static int is_same_file(const char *path, const struct stat *other)
{
    struct stat st;
    return stat(path, &st) == 0 && st.st_dev == other->st_dev && st.st_ino == other->st_ino;
}

/* A file is written under another name beside its own, which it gets when it is whole: a job that
 * fails leaves what was there. Devices and pipes are written as they are. */
static int open_file(struct rows_out *o, const char *model)
{
    struct stat st;
    int is_there = stat(o->path, &st) == 0;
    if (is_there && is_same_file(model, &st))
        return complain("--logits %s: this is the model, which would be overwritten", o->path);
    if (is_there && !S_ISREG(st.st_mode)) {
        o->file = fopen(o->path, "wb");
        return o->file ? 0 : complain("%s: %s", o->path, strerror(errno));
    }
    if (is_there && access(o->path, W_OK))
        return complain("%s: %s", o->path, strerror(errno));
    o->target = is_there ? realpath(o->path, NULL) : strdup(o->path); /* what a link leads to */
    size_t size = o->target ? strlen(o->target) + 32 : 0;
    o->unready = size ? malloc(size) : NULL;
    if (!o->unready)
        return out_of_memory(strlen(o->path) + 32, "--logits");
    snprintf(o->unready, size, "%s.%ld.tmp", o->target, (long)getpid());
    o->file = fopen(o->unready, "wbx");
    if (!o->file)
        return complain("%s: %s", o->path, strerror(errno));
    if (is_there && fchmod(fileno(o->file), st.st_mode & 0777))
        return complain("%s: %s", o->unready, strerror(errno));
    return 0;
}

static int open_rows(struct session *s, struct rows_out *o)
{
    int code = begin_rows(s, o);
    o->path = s->args->logits;
    if (code || !o->path)
        return code;
    if (strcmp(o->path, "-") != 0)
        return open_file(o, s->model_path);
    o->file = stdout;
    return 0;
}

/* How often a row is wanted. */
static int is_wanted(const struct rows_out *o, int position)
{
    if (!o->position)
        return 1;
    int n = 0;
    for (int i = 0; i < o->n; i++)
        n += o->position[i] == position;
    return n;
}

static int take_row(struct session *s, struct rows_out *o, int position, const float *row)
{
    int n_vocab = s->config->n_vocab, code = 0;
    if (o->kept) {
        for (int i = 0; i < o->n; i++)
            if (o->position[i] == position)
                memcpy(o->kept + (size_t)i * (size_t)n_vocab, row, (size_t)n_vocab * sizeof *row);
        return 0;
    }
    for (int n = is_wanted(o, position); n > 0 && !code; n--)
        code = write_row(o, row, n_vocab);
    return code;
}

static int close_rows(struct session *s, struct rows_out *o, int code)
{
    for (int i = 0; o->kept && i < o->n && !code; i++)
        code = write_row(o, o->kept + (size_t)i * (size_t)s->config->n_vocab, s->config->n_vocab);
    free(o->position);
    free(o->kept);
    if (o->file == stdout)
        return code ? code : flush_stdout();
    if (o->file && fclose(o->file) && !code)
        code = complain("%s: %s", o->path, strerror(errno));
    if (o->file && o->unready && !code && rename(o->unready, o->target))
        code = complain("%s: %s", o->path, strerror(errno));
    if (o->file && o->unready && code)
        remove(o->unready);
    free(o->target);
    free(o->unready);
    return code;
}

/* Everything asked about one position. */
static int score_row(struct session *s, struct rows_out *o, int position, const float *row)
{
    const struct args *a = s->args;
    if (a->nll && position + 1 < s->n_ids) {
        int32_t next = s->ids[position + 1];
        fprintf(s->out, "%d %d %.9g\n", position + 1, (int)next,
                gemma3_nll(row, s->config->n_vocab, next));
    }
    return a->logits || a->hash ? take_row(s, o, position, row) : 0;
}

/* Rows of the tile of n tokens at start that something needs: ascending, the prompt's last always,
 * since --top and text come after it. */
static int rows_needed(const struct session *s, const struct rows_out *o, int start, int n,
                       int rows[GEMMA3_CHUNK])
{
    const struct args *a = s->args;
    int n_rows = 0, all = a->nll || (a->trace && strstr(a->trace, "result_"));
    for (int i = 0; i < n; i++)
        if (all || start + i + 1 == s->n_ids ||
            ((a->logits || a->hash) && is_wanted(o, start + i)))
            rows[n_rows++] = i;
    return n_rows;
}

/* One pass over the prompt for everything that was asked for together. */
static int score_prompt(struct session *s, struct rows_out *o)
{
    size_t n_vocab = (size_t)s->config->n_vocab;
    int code = 0, n_rows = 0;
    double start = seconds();
    for (int i = 0; i < s->n_ids && !code;) {
        int rows[GEMMA3_CHUNK], n = lesser(s->n_ids - i, s->max_rows);
        n_rows = rows_needed(s, o, i, n, rows);
        if (gemma3_forward(s->state, s->ids + i, n, rows, n_rows, s->logits))
            return complain("%s", gemma3_state_error(s->state));
        if (s->watch.trouble[0])
            return complain("%s", s->watch.trouble);
        for (int r = 0; r < n_rows && !code; r++)
            code = score_row(s, o, i + rows[r], s->logits + (size_t)r * n_vocab);
        if (!code && s->out == stdout)
            code = flush_stdout();
        i += n;
        show_reading(s, i, s->n_ids);
    }
    if (code)
        return code;
    memmove(s->logits, s->logits + (size_t)(n_rows - 1) * n_vocab, n_vocab * sizeof *s->logits);
    for (int i = 0; i < s->n_ids; i++)
        gemma3_sampler_accept(&s->sampler, s->ids[i]);
    s->n_read = s->n_ids;
    s->read_seconds = seconds() - start;
    return 0;
}

static void print_hash(struct session *s, struct rows_out *o)
{
    char hex[65];
    gemma3_sha256_end(&o->hash, hex);
    fprintf(s->out, "contract %d mode %s kv %s sha256 %s\n", GEMMA3_CONTRACT,
            s->args->exact ? "exact" : "default",
            s->params.kv_type == GEMMA3_KV_F32 ? "f32" : "f16", hex);
}

/* By logit down, then by id up; what is not a number comes last. */
static int by_logit(const void *left, const void *right)
{
    const gemma3_candidate *a = left, *b = right;
    float x = isnan(a->logit) ? -INFINITY : a->logit, y = isnan(b->logit) ? -INFINITY : b->logit;
    if (x != y)
        return x < y ? 1 : -1;
    return (a->id > b->id) - (a->id < b->id);
}

static void print_quoted(FILE *out, const char *text, int n)
{
    fputc('"', out);
    for (int i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '\n')
            fputs("\\n", out);
        else if (c == '"' || c == '\\')
            fprintf(out, "\\%c", c);
        else if (c < 32 || c == 127 || (n == 1 && c > 127))
            fprintf(out, "\\x%02x", c);
        else
            fputc(c, out);
    }
    fputs("\"", out);
}

/* p = exp(l - largest - log(sum)), where log(sum) is the largest one's nll. */
static void print_top(struct session *s)
{
    int n_vocab = s->config->n_vocab;
    gemma3_candidate *c = s->candidates;
    for (int i = 0; i < n_vocab; i++)
        c[i] = (gemma3_candidate){s->logits[i], i};
    qsort(c, (size_t)n_vocab, sizeof *c, by_logit);
    double log_sum = gemma3_nll(s->logits, n_vocab, c[0].id);
    for (int i = 0; i < lesser(s->args->top, n_vocab); i++) {
        char piece[GEMMA3_PIECE_MAX];
        int n = gemma3_decode(s->tokenizer, c[i].id, GEMMA3_SPECIAL, piece);
        fprintf(s->out, "%d\t", (int)c[i].id);
        print_quoted(s->out, piece, n);
        fprintf(s->out, "\t%.9g\t%.9g\n", (double)c[i].logit,
                gemma3_exp((double)c[i].logit - (double)c[0].logit - log_sum));
    }
}

static int score(struct session *s)
{
    struct rows_out o = {.n = 0};
    int code = open_rows(s, &o);
    if (!code)
        code = score_prompt(s, &o);
    if (!code && s->args->trace)
        code = print_watched(&s->watch, s->out);
    s->watch.names = ""; /* the prompt is traced, not what may be generated after it */
    code = close_rows(s, &o, code);
    if (code)
        return code;
    if (s->args->hash)
        print_hash(s, &o);
    if (s->args->top)
        print_top(s);
    return flush_stdout();
}

/* ---- Command line: the jobs ---- */

/* -p, -f, --ids */
static int continue_prompt(struct session *s)
{
    const struct args *a = s->args;
    int numbers = wants_numbers(a), code = read_prompt(s);
    if (!code)
        code = open_state(s);
    if (!code)
        code = numbers ? score(s) : read_tokens(s, s->ids, s->n_ids);
    if (code || a->n_predict == 0 || (numbers && a->n_predict < 0))
        return code;
    code = write_tokens(s);
    print_speed(s);
    return code;
}

/* Sums over the tokens scored by --perplexity. */
struct scored {
    double nll, nll_squared; /* sums */
    size_t n, n_bytes;       /* tokens, and their text */
};

/* One chunk of n tokens: <bos> in place of its first (as llama-perplexity does), scores for the
 * second half. Position i gives the probability of token i + 1. */
static int score_chunk(struct session *s, const int32_t *ids, int n, struct scored *sum)
{
    const gemma3_vocab *v = gemma3_tokenizer_vocab(s->tokenizer);
    size_t n_vocab = (size_t)s->config->n_vocab;
    gemma3_state_reset(s->state);
    for (int i = 0; i < n - 1;) {
        int rows[GEMMA3_CHUNK], n_rows = 0, count = lesser(n - 1 - i, s->max_rows);
        int32_t tile[GEMMA3_CHUNK];
        memcpy(tile, ids + i, (size_t)count * sizeof *tile);
        if (i == 0 && v->bos >= 0 && v->add_bos && !s->args->no_bos)
            tile[0] = v->bos;
        for (int k = 0; k < count; k++)
            if (i + k >= n / 2)
                rows[n_rows++] = k;
        if (gemma3_forward(s->state, tile, count, rows, n_rows, s->logits))
            return complain("%s", gemma3_state_error(s->state));
        for (int r = 0; r < n_rows; r++) {
            char piece[GEMMA3_PIECE_MAX];
            int32_t next = ids[i + rows[r] + 1];
            double nll = gemma3_nll(s->logits + (size_t)r * n_vocab, (int)n_vocab, next);
            sum->nll += nll;
            sum->nll_squared += nll * nll;
            sum->n++;
            sum->n_bytes += (size_t)gemma3_decode(s->tokenizer, next, 0, piece);
        }
        i += count;
    }
    return 0;
}

static int perplexity(struct session *s)
{
    int code = read_prompt(s), n = s->params.n_ctx;
    struct scored sum = {0, 0, 0, 0};
    if (!code && s->n_ids / 2 < n)
        return complain("%s: %d tokens; --perplexity needs two chunks of %d (-c), %.0f tokens",
                        s->args->perplexity, s->n_ids, n, 2.0 * n);
    if (!code)
        code = open_state(s);
    for (int i = 0; i < s->n_ids / n && !code; i++) {
        code = score_chunk(s, s->ids + (size_t)i * (size_t)n, n, &sum);
        if (!code) {
            printf("[%d]%.4f,", i + 1, gemma3_exp(sum.nll / (double)sum.n));
            code = flush_stdout();
        }
    }
    if (code)
        return code;
    double n_scored = (double)sum.n, mean = sum.nll / n_scored;
    double variance = sum.nll_squared / n_scored - mean * mean, ppl = gemma3_exp(mean);
    double error = variance > 0 && sum.n > 1 ? ppl * sqrt(variance / (n_scored - 1)) : 0;
    printf("\ntokens scored %zu of %d, chunks %d of %d\n", sum.n, s->n_ids, s->n_ids / n, n);
    printf("mean nll %.9g\n", mean);
    if (sum.n_bytes)
        printf("bits per byte %.9g\n", sum.nll / gemma3_log(2) / (double)sum.n_bytes);
    printf("ppl %.4f +- %.5f\n", ppl, error);
    return 0;
}

static int tokenize(struct session *s)
{
    const char *text = s->args->tokenize.text;
    int code = text ? encode_text(s, text, strlen(text)) : encode_file(s, s->args->file);
    for (int i = 0; i < s->n_ids && !code; i++)
        printf(i ? " %d" : "%d", (int)s->ids[i]);
    if (!code)
        putchar('\n');
    return code;
}

static int detokenize(struct session *s)
{
    const struct numbers *ids = &s->args->detokenize;
    int code = check_ids(s, ids, "--detokenize");
    for (int i = 0; i < ids->n && !code; i++) {
        char piece[GEMMA3_PIECE_MAX];
        int n = gemma3_decode(s->tokenizer, ids->value[i], s->args->special ? GEMMA3_SPECIAL : 0,
                              piece);
        fwrite(piece, 1, (size_t)n, stdout);
    }
    if (!code && isatty(STDOUT_FILENO))
        putchar('\n');
    return code;
}

static void print_memory(const struct session *s)
{
    gemma3_params p = s->params;
    const int n_ctx[] = {512, 4096, s->config->n_ctx_train, s->params.n_ctx};
    printf("weights                %zu bytes, %zu read for each token generated\n",
           gemma3_model_weight_bytes(s->model), gemma3_model_token_bytes(s->model));
    for (int i = 0; i < 4; i++) {
        int seen = 0;
        for (int k = 0; k < i; k++)
            seen |= n_ctx[k] == n_ctx[i];
        if (seen)
            continue;
        p.n_ctx = n_ctx[i];
        size_t n_bytes = gemma3_kv_bytes(s->config, &p);
        printf("KV cache               %zu bytes for -c %d in %s\n", n_bytes, p.n_ctx,
               p.kv_type == GEMMA3_KV_F32 ? "f32" : "f16");
    }
    p = s->params;
    p.n_threads = s->args->n_threads;
    size_t n_scratch = gemma3_state_size(s->model, &p) - gemma3_kv_bytes(s->config, &p);
    printf("scratch and tables     %zu bytes for -c %d -b %d -t %d\n", n_scratch, p.n_ctx, p.n_batch,
           p.n_threads);
}

/* A text out of the file: whole characters, and no control characters (U+0000 to 1F, 7F to 9F). */
static void print_name(const char *name)
{
    gemma3_utf8 whole = {.n = 0};
    char c[8];
    for (; *name; name++) { /* n is 0 within a character */
        int n = gemma3_utf8_push(&whole, (unsigned char)*name, c);
        if (n == 1 ? c[0] < 32 || c[0] == 127 : n == 2 && memcmp(c, "\xC2\xA0", 2) < 0)
            putchar('?');
        else
            fwrite(c, 1, (size_t)n, stdout);
    }
    fwrite(c, 1, (size_t)gemma3_utf8_end(&whole, c), stdout);
    putchar('\n');
}

static int info(struct session *s)
{
    const gemma3_config *c = s->config;
    printf("name                   ");
    print_name(gemma3_model_name(s->model));
    printf("chat template          %s\n", gemma3_model_can_chat(s->model) ? "yes" : "no");
    printf("contract               %d\n", GEMMA3_CONTRACT);
    printf("mode                   %s\n", gemma3_model_is_exact(s->model) ? "exact" : "default");
    printf("isa                    %s\n", gemma3_model_isa(s->model));
    printf("n_layers               %d\n", c->n_layers);
    printf("d_model                %d\n", c->d_model);
    printf("d_ff                   %d\n", c->d_ff);
    printf("n_heads                %d\n", c->n_heads);
    printf("n_kv_heads             %d\n", c->n_kv_heads);
    printf("head_dim               %d\n", c->head_dim);
    printf("n_vocab                %d\n", c->n_vocab);
    printf("n_ctx_train            %d tokens\n", c->n_ctx_train);
    printf("window                 %d tokens\n", c->window);
    printf("rms_eps                %.9g\n", (double)c->rms_eps);
    printf("rope_base_global       %.9g\n", (double)c->rope_base_global);
    printf("rope_base_local        %.9g\n", (double)c->rope_base_local);
    printf("rope_factor            %.9g\n", (double)c->rope_factor);
    printf("query_scale            %.9g\n", (double)c->query_scale);
    printf("embedding_scale        %.9g\n", (double)c->embedding_scale);
    printf("final_softcap          %.9g\n", (double)c->final_softcap);
    printf("global layers         ");
    for (int l = 0; l < c->n_layers; l++)
        if (!c->is_local[l])
            printf(" %d", l);
    putchar('\n');
    print_memory(s);
    return 0;
}

/* ---- Command line: chat ---- */

static void note_interrupt(int signal_number)
{
    (void)signal_number;
    interrupted = 1;
}

/* flags: 0 while waiting for a line, so that the waiting ends; SA_RESTART while an answer is
 * written, so that the writing does not fail. */
static void catch_interrupts(int flags)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = note_interrupt;
    action.sa_flags = flags;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}

/* Whatever ended the answer, the model finds it closed when the next turn comes. */
static int close_turn(struct session *s)
{
    static const char mark[] = "<end_of_turn>";
    int32_t id = gemma3_find(s->tokenizer, mark, sizeof mark - 1);
    if (id < 0 || gemma3_state_pos(s->state) == gemma3_state_n_ctx(s->state))
        return 0;
    gemma3_sampler_accept(&s->sampler, id);
    if (gemma3_forward(s->state, &id, 1, NULL, 0, NULL))
        return complain("%s", gemma3_state_error(s->state));
    return 0;
}

/* One turn and its answer. *full: the turn did not fit and nothing happened. */
static int answer(struct session *s, const char *text, int *full)
{
    const char *system = s->args->system;
    int pos = gemma3_state_pos(s->state), n_ctx = gemma3_state_n_ctx(s->state);
    size_t room = strlen(text) + (system ? strlen(system) : 0) + 32;
    int32_t *ids = room < INT_MAX ? malloc(room * sizeof *ids) : NULL;
    if (!ids)
        return out_of_memory(room * sizeof *ids, "the turn");
    int n = gemma3_encode_turn(s->tokenizer, system, text, pos == 0, ids, (int)room), code = 0;
    *full = n > n_ctx - pos;
    if (n == -2)
        code = out_of_memory(gemma3_encode_work(room), "encoding the turn");
    else if (n < 0)
        code = complain("the vocabulary has no <start_of_turn> and <end_of_turn>: no chat");
    else if (*full)
        fprintf(stderr, "gemma3: the context of %d tokens is full: this turn needs %d and %d are "
                "left; /clear starts again, -c gives more\n", n_ctx, n, n_ctx - pos);
    else if (!(code = read_tokens(s, ids, n)) && !(code = write_tokens(s)))
        code = close_turn(s);
    free(ids);
    return code;
}

/* A line of the user's without its end. 0: there is none any more. Ctrl-C drops what there is of it. */
static int read_line(char **line, size_t *size)
{
    int asks = isatty(STDIN_FILENO);
    for (int n_interrupts = 0; n_interrupts < 2; n_interrupts++) {
        interrupted = 0;
        clearerr(stdin);
        if (asks)
            fputs("> ", stderr);
        catch_interrupts(0);
        ssize_t n = getline(line, size, stdin);
        catch_interrupts(SA_RESTART);
        int is_whole = n > 0 && (!interrupted || (*line)[n - 1] == '\n');
        while (n > 0 && ((*line)[n - 1] == '\n' || (*line)[n - 1] == '\r'))
            (*line)[--n] = 0;
        if (is_whole)
            return 1;
        if (asks)
            fputc('\n', stderr);
        if (!interrupted)
            return 0;
        if (asks && n_interrupts == 0)
            fputs("Ctrl-C again or /quit ends the chat\n", stderr);
    }
    return 0;
}

/* A full context ends the chat, unless somebody is there to type /clear. */
static int chat(struct session *s)
{
    char *line = NULL;
    size_t size = 0;
    int full = 0, code = open_state(s);
    if (!code && !gemma3_model_can_chat(s->model))
        fputs("gemma3: no chat template in the file: this may be a base model, not trained to chat\n",
              stderr);
    while (!code && (!full || isatty(STDIN_FILENO)) && read_line(&line, &size)) {
        interrupted = 0;
        if (strcmp(line, "/quit") == 0)
            break;
        if (strcmp(line, "/clear") == 0) {
            gemma3_state_reset(s->state);
            s->sampler.n_last = 0;
        } else if (line[strspn(line, " \t")]) {
            code = answer(s, line, &full);
        }
    }
    free(line);
    if (!code && s->n_read)
        print_speed(s);
    return code;
}

/* ---- Command line: main ---- */

/* No file that we open may get the number of a stream that the caller has closed. What stands in for
 * it can be neither read nor written, so that using it is an error. */
static void fill_streams(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) < 0)
            return;
}

static int print_isas(void)
{
    for (int i = 0; gemma3_isa_name(i); i++)
        puts(gemma3_isa_name(i));
    return 0;
}

static int run_job(const struct args *a, enum job job, const char *program)
{
    struct session s = {.args = a, .out = a->logits && !strcmp(a->logits, "-") ? stderr : stdout};
    char found[4096];
    const char *path = a->model ? a->model : find_model(program, found, sizeof found);
    if (!path)
        return refuse("no model: give -m MODEL.gguf");
    int code = open_model(&s, path, job == CONTINUE || job == CHAT || job == PERPLEXITY);
    if (!code)
        code = job == CONTINUE ? continue_prompt(&s) :
               job == CHAT ? chat(&s) :
               job == PERPLEXITY ? perplexity(&s) :
               job == TOKENIZE ? tokenize(&s) :
               job == DETOKENIZE ? detokenize(&s) : info(&s);
    close_session(&s);
    return code;
}

int main(int argc, char **argv)
{
    struct args a = {
        .n_predict = -1, .n_threads = gemma3_default_threads(), .n_batch = 512, .temperature = 1,
        .top_k = 64, .top_p = 0.95, .repeat_penalty = 1, .seed = 42,
    };
    enum job job = CONTINUE;
    fill_streams();
    signal(SIGPIPE, SIG_IGN); /* a reader that goes away is an error of writing, not our end */
#if defined(SIGXFSZ)
    signal(SIGXFSZ, SIG_IGN); /* and so is a file that grows beyond its limit */
#endif
    int code = parse_args(&a, argc, argv);
    if (code == 0 && a.help)
        code = print_help();
    else if (code == 0 && a.version)
        printf("gemma3.c %s, numeric contract %d\n", GEMMA3_VERSION, GEMMA3_CONTRACT);
    else if (code == 0 && a.isa && strcmp(a.isa, "list") == 0)
        code = print_isas();
    else if (code == 0 && (code = check_args(&a, &job)) == 0)
        code = run_job(&a, job, argv[0] ? argv[0] : "");
    free(a.positions.value);
    free(a.detokenize.value);
    if (code == 0)
        code = flush_stdout();
    return code;
}

#endif
