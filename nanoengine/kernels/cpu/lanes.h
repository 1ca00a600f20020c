/* Sixteen lanes of floats, of 32-bit sums and of byte products, by the widest instructions that the compiler may use.
 *
 * f16 holds 16 floats, i16 16 int32. codes holds 64 unsigned bytes: 4 of each lane.
 */
#ifndef NE_LANES_H
#define NE_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

/* A float16. */
INLINE float half1(const uint8_t *p) {
    uint32_t h = p[0] | (uint32_t)p[1] << 8, sign = (h & 0x8000u) << 16, rest = h & 0x7fffu, bits;
    float value;
    if (rest >= 0x7c00u) {
        bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
    } else if (rest >= 0x400u) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {
        value = (float)rest * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, 4);
    return value;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && !defined(NE_PLAIN)

#include <immintrin.h>
#define NE_PATH "AVX-512 VNNI"
#define SIGNED_BYTES 0 /* the first factor of a byte product is unsigned: signed weights are moved up by 128 */

typedef __m512 f16;
typedef __m512i i16;
typedef __m512i codes;

INLINE f16 f_set(float x) { return _mm512_set1_ps(x); }
INLINE f16 f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void f_store(float *p, f16 x) { _mm512_storeu_ps(p, x); }
INLINE f16 f_add(f16 a, f16 b) { return _mm512_add_ps(a, b); }
INLINE f16 f_mul(f16 a, f16 b) { return _mm512_mul_ps(a, b); }
INLINE f16 f_max(f16 a, f16 b) { return _mm512_max_ps(a, b); }
INLINE f16 f_fma(f16 a, f16 b, f16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float f_sum(f16 a) { return _mm512_reduce_add_ps(a); }
INLINE f16 f_half(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE f16 f_u8(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))); }
INLINE f16 f_s8(const uint8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
INLINE f16 f_int(i16 a) { return _mm512_cvtepi32_ps(a); }
INLINE i16 i_set(int32_t x) { return _mm512_set1_epi32(x); }
/* Adds the 4 products of each lane's bytes with the 4 signed bytes of x. */
INLINE i16 i_dot(i16 sum, codes w, int32_t x) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x)); }
INLINE i16 i_dot_bytes(i16 sum, codes w, int32_t x) { return i_dot(sum, w, x); }
INLINE codes c_bytes(const uint8_t *p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8((char)0x80)); }
INLINE codes c_low(const uint8_t *p) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15)); }
INLINE codes c_high(const uint8_t *p) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
}
/* Adds `value` to the bytes whose bit is set. */
INLINE codes c_bits(codes w, const uint8_t *p, char value) {
    uint64_t bits;
    memcpy(&bits, p, 8);
    return _mm512_mask_add_epi8(w, (__mmask64)bits, w, _mm512_set1_epi8(value));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(NE_PLAIN)

#include <immintrin.h>
#ifdef __AVXVNNI__
#define NE_PATH "AVX2 with VNNI"
#else
#define NE_PATH "AVX2"
#endif
#define SIGNED_BYTES 1

typedef struct { __m256 a, b; } f16;
typedef struct { __m256i a, b; } i16;
typedef struct { __m256i a, b; } codes;

#define F16(first, second) ((f16){first, second})
#define I16(first, second) ((i16){first, second})
#define CODES(first, second) ((codes){first, second})

INLINE f16 f_set(float x) { return F16(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE f16 f_load(const float *p) { return F16(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void f_store(float *p, f16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE f16 f_add(f16 x, f16 y) { return F16(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
INLINE f16 f_mul(f16 x, f16 y) { return F16(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE f16 f_max(f16 x, f16 y) { return F16(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
INLINE f16 f_fma(f16 x, f16 y, f16 z) { return F16(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)); }
INLINE float f_sum(f16 x) {
    __m256 both = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE f16 f_half(const uint8_t *p) {
    return F16(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + 1)));
}
INLINE f16 f_u8(const uint8_t *p) {
    return F16(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))),
               _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))));
}
INLINE f16 f_s8(const uint8_t *p) {
    return F16(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))),
               _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8)))));
}
INLINE f16 f_int(i16 x) { return F16(_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE i16 i_set(int32_t x) { return I16(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE __m256i i_dot8(__m256i sum, __m256i w, __m256i x) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
#endif
}
/* Codes are below 64: pairs of products fit in 16 bits. */
INLINE i16 i_dot(i16 sum, codes w, int32_t x) {
    __m256i four = _mm256_set1_epi32(x);
    return I16(i_dot8(sum.a, w.a, four), i_dot8(sum.b, w.b, four));
}
/* Signed bytes above -128: their signs are given to x. */
INLINE i16 i_dot_bytes(i16 sum, codes w, int32_t x) {
    __m256i four = _mm256_set1_epi32(x);
    return I16(i_dot8(sum.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(four, w.a)),
               i_dot8(sum.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(four, w.b)));
}
INLINE codes c_bytes(const uint8_t *p) {
    return CODES(_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
INLINE codes c_low(const uint8_t *p) {
    codes w = c_bytes(p);
    return CODES(_mm256_and_si256(w.a, _mm256_set1_epi8(15)), _mm256_and_si256(w.b, _mm256_set1_epi8(15)));
}
INLINE codes c_high(const uint8_t *p) {
    codes w = c_bytes(p);
    return CODES(_mm256_and_si256(_mm256_srli_epi16(w.a, 4), _mm256_set1_epi8(15)),
                 _mm256_and_si256(_mm256_srli_epi16(w.b, 4), _mm256_set1_epi8(15)));
}
INLINE __m256i c_bits8(__m256i w, const uint8_t *p, char value) {
    int32_t bits;
    memcpy(&bits, p, 4);
    const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit_of = _mm256_set1_epi64x((long long)0x8040201008040201ull);
    __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of);
    return _mm256_add_epi8(w, _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit_of), _mm256_set1_epi8(value)));
}
INLINE codes c_bits(codes w, const uint8_t *p, char value) {
    return CODES(c_bits8(w.a, p, value), c_bits8(w.b, p + 4, value));
}

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD) && !defined(NE_PLAIN)

#include <arm_neon.h>
#define NE_PATH "NEON dot products"
#define SIGNED_BYTES 1

typedef struct { float32x4_t v[4]; } f16;
typedef struct { int32x4_t v[4]; } i16;
typedef struct { int8x16_t v[4]; } codes;

#define EACH4(i) for (int i = 0; i < 4; i++)

INLINE f16 f_set(float x) { f16 y; EACH4(i) y.v[i] = vdupq_n_f32(x); return y; }
INLINE f16 f_load(const float *p) { f16 y; EACH4(i) y.v[i] = vld1q_f32(p + 4 * i); return y; }
INLINE void f_store(float *p, f16 x) { EACH4(i) vst1q_f32(p + 4 * i, x.v[i]); }
INLINE f16 f_add(f16 a, f16 b) { EACH4(i) a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
INLINE f16 f_mul(f16 a, f16 b) { EACH4(i) a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
INLINE f16 f_max(f16 a, f16 b) { EACH4(i) a.v[i] = vmaxq_f32(a.v[i], b.v[i]); return a; }
INLINE f16 f_fma(f16 a, f16 b, f16 c) { EACH4(i) c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return c; }
INLINE float f_sum(f16 a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
INLINE f16 f_half(const uint8_t *p) {
    f16 y;
    EACH4(i) y.v[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i)));
    return y;
}
INLINE f16 f_u8(const uint8_t *p) {
    uint8x16_t bytes = vld1q_u8(p);
    uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
    return (f16){{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
                  vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
}
INLINE f16 f_s8(const uint8_t *p) {
    int8x16_t bytes = vld1q_s8((const int8_t *)p);
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return (f16){{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
                  vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
INLINE f16 f_int(i16 a) { f16 y; EACH4(i) y.v[i] = vcvtq_f32_s32(a.v[i]); return y; }
INLINE i16 i_set(int32_t x) { i16 y; EACH4(i) y.v[i] = vdupq_n_s32(x); return y; }
INLINE i16 i_dot(i16 sum, codes w, int32_t x) {
    int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(x));
    EACH4(i) sum.v[i] = vdotq_s32(sum.v[i], w.v[i], four);
    return sum;
}
INLINE i16 i_dot_bytes(i16 sum, codes w, int32_t x) { return i_dot(sum, w, x); }
INLINE codes c_bytes(const uint8_t *p) { codes w; EACH4(i) w.v[i] = vld1q_s8((const int8_t *)p + 16 * i); return w; }
INLINE codes c_low(const uint8_t *p) {
    codes w;
    EACH4(i) w.v[i] = vreinterpretq_s8_u8(vandq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(15)));
    return w;
}
INLINE codes c_high(const uint8_t *p) {
    codes w;
    EACH4(i) w.v[i] = vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(p + 16 * i), 4));
    return w;
}
INLINE codes c_bits(codes w, const uint8_t *p, char value) {
    static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t bit_of = vld1q_u8(bit);
    EACH4(i) {
        uint8x16_t set = vtstq_u8(vcombine_u8(vdup_n_u8(p[2 * i]), vdup_n_u8(p[2 * i + 1])), bit_of);
        w.v[i] = vaddq_s8(w.v[i], vreinterpretq_s8_u8(vandq_u8(set, vdupq_n_u8((uint8_t)value))));
    }
    return w;
}

#else

#define NE_PATH "plain C"
#define SIGNED_BYTES 1

typedef struct { float v[LANES]; } f16;
typedef struct { int32_t v[LANES]; } i16;
typedef struct { int8_t v[4 * LANES]; } codes;

#define EACH(i) for (int i = 0; i < LANES; i++)

INLINE f16 f_set(float x) { f16 y; EACH(i) y.v[i] = x; return y; }
INLINE f16 f_load(const float *p) { f16 y; EACH(i) y.v[i] = p[i]; return y; }
INLINE void f_store(float *p, f16 x) { EACH(i) p[i] = x.v[i]; }
INLINE f16 f_add(f16 a, f16 b) { EACH(i) a.v[i] += b.v[i]; return a; }
INLINE f16 f_mul(f16 a, f16 b) { EACH(i) a.v[i] *= b.v[i]; return a; }
INLINE f16 f_max(f16 a, f16 b) { EACH(i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE f16 f_fma(f16 a, f16 b, f16 c) { EACH(i) c.v[i] += a.v[i] * b.v[i]; return c; }
INLINE float f_sum(f16 a) { float s = 0; EACH(i) s += a.v[i]; return s; }
INLINE f16 f_half(const uint8_t *p) { f16 y; EACH(i) y.v[i] = half1(p + 2 * i); return y; }
INLINE f16 f_u8(const uint8_t *p) { f16 y; EACH(i) y.v[i] = p[i]; return y; }
INLINE f16 f_s8(const uint8_t *p) { f16 y; EACH(i) y.v[i] = (int8_t)p[i]; return y; }
INLINE f16 f_int(i16 a) { f16 y; EACH(i) y.v[i] = (float)a.v[i]; return y; }
INLINE i16 i_set(int32_t x) { i16 y; EACH(i) y.v[i] = x; return y; }
INLINE i16 i_dot(i16 sum, codes w, int32_t x) {
    int8_t four[4];
    memcpy(four, &x, 4);
    EACH(i) for (int j = 0; j < 4; j++) sum.v[i] += w.v[4 * i + j] * four[j];
    return sum;
}
INLINE i16 i_dot_bytes(i16 sum, codes w, int32_t x) { return i_dot(sum, w, x); }
INLINE codes c_bytes(const uint8_t *p) { codes w; memcpy(&w, p, sizeof w); return w; }
INLINE codes c_low(const uint8_t *p) { codes w; for (int i = 0; i < 64; i++) w.v[i] = p[i] & 15; return w; }
INLINE codes c_high(const uint8_t *p) { codes w; for (int i = 0; i < 64; i++) w.v[i] = p[i] >> 4; return w; }
INLINE codes c_bits(codes w, const uint8_t *p, char value) {
    for (int i = 0; i < 64; i++) w.v[i] = (int8_t)(w.v[i] + ((p[i / 8] >> i % 8) & 1) * value);
    return w;
}

#endif

/* Rounded to the nearest integer, halves to even: |x| < 2^22. */
INLINE int32_t round1(float x) {
    float moved = x + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &moved, 4);
    return bits - 0x4b400000;
}

/* e^x within 2 units in the last place; 0 below -87, and what is no number stays none. */
INLINE float exp1(float x) {
    float low = x < -87.3f ? -87.3f : x, in = low > 88.3f ? 88.3f : low;
    float n = (in * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (in - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    int32_t power = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    float y = p * scale;
    y = x < -87.3f ? 0.0f : y;
    y = x > 88.3f ? INFINITY : y;
    return x != x ? x : y;
}

/* Runs body(data, thread, threads) on the threads of the OpenMP runtime that torch has loaded, or on this one alone. */
typedef void (*ne_body)(void *data, int thread, int threads);
void ne_parallel(ne_body body, void *data, int threads);
/* Waits, in a body, for all of its threads. */
void ne_barrier(int threads);

#endif
