/* Sixteen numbers at once, of fp32 or widened from bf16. */

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

ALWAYS int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

ALWAYS float from_half(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

ALWAYS uint16_t to_half(float value) { /* to the nearest, ties to even; not a number stays that */
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000)
        return word >> 16 | 64;
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

ALWAYS float rounded(float value, int bf16) { return bf16 ? from_half(to_half(value)) : value; }

ALWAYS Lanes load(const void *at, int64_t i, int bf16) {
    if (!bf16) {
        Lanes v;
        memcpy(&v, (const float *)at + i, 64);
        return v;
    }
    Halves h;
    memcpy(&h, (const uint16_t *)at + i, 32);
    return (Lanes)(__builtin_convertvector(h, Words) << 16);
}

ALWAYS Lanes load_some(const void *at, int64_t i, int64_t count, int bf16) { /* zeros beyond the count */
    float some[16] = {0};
    for (int64_t k = 0; k < count; k++)
        some[k] = bf16 ? from_half(((const uint16_t *)at)[i + k]) : ((const float *)at)[i + k];
    return load(some, 0, 0);
}

ALWAYS float one_of(const void *at, int64_t i, int bf16) {
    return bf16 ? from_half(((const uint16_t *)at)[i]) : ((const float *)at)[i];
}

ALWAYS Lanes rounded_lanes(Lanes v, int bf16) {
    if (!bf16)
        return v;
    const Words word = (Words)v, nan = (Words)((word & 0x7fffffff) > 0x7f800000);
    const Words near = word + 0x7fff + (word >> 16 & 1);
    return (Lanes)(((nan & (word | 0x400000)) | (~nan & near)) & 0xffff0000);
}

ALWAYS Lanes add_product(Lanes sum, Lanes a, Lanes b) {
#ifdef __AVX512F__
    return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
    return sum + a * b;
#endif
}

/* The sums of the lanes of four, each in the same order. */
ALWAYS void totals(Lanes a, Lanes b, Lanes c, Lanes d, float *to) {
#ifdef __AVX512F__
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
    const __m512d u = (__m512d)x, v = (__m512d)y;
    const __m512 z = _mm512_add_ps((__m512)_mm512_unpacklo_pd(u, v), (__m512)_mm512_unpackhi_pd(u, v));
    const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(z), (__m256)_mm512_extractf64x4_pd((__m512d)z, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#else
    const Lanes each[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        float sum = 0;
        for (int k = 0; k < 16; k++)
            sum += each[i][k];
        to[i] = sum;
    }
#endif
}

ALWAYS float total(Lanes v) {
    float four[4];
    totals(v, v, v, v, four);
    return four[0];
}

ALWAYS Lanes larger(Lanes a, Lanes b) {
#ifdef __AVX512F__
    return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    for (int k = 0; k < 16; k++)
        a[k] = b[k] > a[k] ? b[k] : a[k];
    return a;
#endif
}

ALWAYS Lanes all(float value) { return value - (Lanes){0}; }
