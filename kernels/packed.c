/* Products with matrices of packed weights, on the processor. `workbench/compiled.py` compiles this file,
`workbench/native.py` calls it.

A row of a matrix is stored by a codec of `workbench/codec.py`: codes of `bits` bits, a stream that begins with the
lowest bit; perhaps one part scale of 8 bits for each `group` of codes (part is NULL where there is none); one fp16
scale for the row. A weight is (code - most) * unit, most = 2^(bits - 1) - 1, unit = part / 255 * whole.

One token reads every weight once, so the memory sets the pace, and what is computed must keep up with it. Where the
processor has AVX512 VBMI and VNNI, activations become whole numbers of 16 bits with one scale for 64 of them, each
split in two halves of 8 bits; one instruction multiplies 64 codes by 64 halves. Rounding an activation errs by
at most 2^-16 of the largest in its 64. Elsewhere the rows are unpacked to fp32 and multiplied: right, not fast.

A row is summed in one order whatever the number of threads. Functions return 0, or 1 where there is no memory. */

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes are read as little-endian words"
#endif
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(PORTABLE)
#define VNNI 1
#else
#define VNNI 0
#endif

#define GROUP 64     /* activations that share a scale, and the group of codes that VNNI multiplies */
#define BLOCK 1024   /* activations are padded to blocks of 16 groups, whose scales fill a register */
#define PIECE 512    /* codes that are unpacked at once */
#define CHUNK 32768  /* bytes of codes that a thread takes at once */
#define AHEAD 8192   /* bytes of codes that are asked for before they are needed */

typedef struct {
    const uint8_t *codes, *part;
    const uint16_t *whole;
    int64_t count, width, bits, group; /* count rows of that width */
} Matrix;

typedef struct { /* tokens of a width, quantised for a number of bits */
    int64_t width, padded, step; /* token t is number t * step */
    const float *x;
    int8_t *q;            /* a token takes 2 * padded */
    float *scale, *shift; /* padded / GROUP each; shift is -most * scale * sum of q */
} Inputs;

ALWAYS int64_t row_bytes(const Matrix *m) { return upto(m->width * m->bits, 8); }
ALWAYS int64_t row_groups(const Matrix *m) { return upto(m->width, m->group); }
ALWAYS int64_t chunk_rows(const Matrix *m) { return 1 + CHUNK / row_bytes(m); }
ALWAYS int fast(const Matrix *m) { return VNNI && (!m->part || m->group == GROUP); }

static void *room(int64_t bytes) { return aligned_alloc(64, upto(bytes + 1, 64) * 64); }

ALWAYS float half(uint16_t bits) {
#ifdef __F16C__
    return _cvtsh_ss(bits);
#else
    uint32_t exponent = bits >> 10 & 31, sign = (uint32_t)(bits & 0x8000) << 16;
    float value = exponent ? ldexpf(1024 + (bits & 1023), exponent - 25) : ldexpf(bits & 1023, -24);
    if (exponent == 31)
        value = bits & 1023 ? NAN : INFINITY;
    return sign ? -value : value;
#endif
}

/* ---- unpacking ---- */

#if VNNI
ALWAYS __m512i every(int bits, int first, int step) { /* byte 8 i + k is bits * i + k or, of shifts, first + step * k */
    uint8_t at[64];
    for (int i = 0; i < 64; i++)
        at[i] = bits ? bits * (i / 8) + i % 8 : first + step * (i % 8);
    return _mm512_loadu_si512(at);
}
ALWAYS __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

/* 64 codes in their order from a register that holds their bytes */
ALWAYS __m512i spread(int bits, __m512i bytes) {
    if (bits == 8)
        return bytes;
    bytes = _mm512_permutexvar_epi8(every(bits, 0, 0), bytes);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(every(0, 0, bits), bytes), _mm512_set1_epi8((1 << bits) - 1));
}

ALWAYS __m512i load_codes(int bits, const uint8_t *codes) { /* 64, and no byte beyond */
    return spread(bits, bits == 8   ? _mm512_loadu_si512(codes)
                        : bits == 4 ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)codes))
                                    : _mm512_maskz_loadu_epi8(first_bytes(8 * bits), codes));
}

ALWAYS void store_weights(__m128i codes, __m512i most, __m512 unit, float *out) {
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), most)), unit));
}

ALWAYS void unpack_groups(int bits, const uint8_t *codes, const uint8_t *part, float whole, int64_t groups,
                          float *out) {
    const __m512i most = _mm512_set1_epi32((1 << (bits - 1)) - 1);
    for (int64_t g = 0; g < groups; g++, codes += 8 * bits, out += GROUP) {
        const __m512 unit = _mm512_set1_ps(part ? part[g] / 255.0f * whole : whole);
        const __m512i v = load_codes(bits, codes);
        store_weights(_mm512_castsi512_si128(v), most, unit, out);
        store_weights(_mm512_extracti32x4_epi32(v, 1), most, unit, out + 16);
        store_weights(_mm512_extracti32x4_epi32(v, 2), most, unit, out + 32);
        store_weights(_mm512_extracti32x4_epi32(v, 3), most, unit, out + 48);
    }
}
#endif

/* Up to 7 bytes are written beyond the count. */
ALWAYS void decode_some(int bits, const uint8_t *codes, int64_t count, uint8_t *out) {
    for (int64_t at = 0; at < count; at += 8, codes += bits) {
        uint64_t word = 0;
        if (at + 8 <= count)
            memcpy(&word, codes, bits);
        else
            memcpy(&word, codes, upto((count - at) * bits, 8));
        for (int k = 0; k < 8; k++)
            out[at + k] = word >> (bits * k) & ((1 << bits) - 1);
    }
}

/* Calls something with the number of bits as a constant. */
#define FOR_BITS(bits, CALL) \
    switch (bits) { \
    case 2: CALL(2); break; \
    case 3: CALL(3); break; \
    case 4: CALL(4); break; \
    case 5: CALL(5); break; \
    case 6: CALL(6); break; \
    case 7: CALL(7); break; \
    case 8: CALL(8); break; \
    }

/* Weights from, ..., from + count - 1 of a row, at most PIECE of them, as `unpack` of the codec computes them. `from`
is a multiple of 8. */
static void unpack_piece(const Matrix *m, int64_t row, int64_t from, int64_t count, float *restrict out) {
    const float whole = half(m->whole[row]);
    const uint8_t *codes = m->codes + row * row_bytes(m) + from * m->bits / 8;
    const uint8_t *part = m->part ? m->part + row * row_groups(m) : NULL;
    int64_t at = 0;
#if VNNI
    if (fast(m) && from % GROUP == 0) {
#define UNPACK(bits) unpack_groups(bits, codes, part ? part + from / GROUP : NULL, whole, count / GROUP, out)
        FOR_BITS(m->bits, UNPACK)
        at = count / GROUP * GROUP;
        codes += at * m->bits / 8;
    }
#endif
    uint8_t decoded[PIECE + 8];
    const int most = (1 << (m->bits - 1)) - 1;
#define DECODE(bits) decode_some(bits, codes, count - at, decoded + at)
    FOR_BITS(m->bits, DECODE)
    for (int64_t end; at < count; at = end) {
        const int64_t group = (from + at) / m->group;
        const float unit = part ? part[group] / 255.0f * whole : whole;
        end = part ? least(count, (group + 1) * m->group - from) : count;
        for (int64_t i = at; i < end; i++)
            out[i] = (float)(decoded[i] - most) * unit;
    }
}

ALWAYS uint16_t brain(float value) { /* to bf16, to the nearest and to even in between */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

/* ---- products with rows ---- */

/* Activations of a group: q = round(x / scale), within +-32512, as 256 * high + low. Up to 4 bits, 2 groups share
registers of even and of odd elements, as their codes do; with more, a group has its own. */
static void quantise_group(const float *x, int64_t count, int bits, int64_t group, Inputs *in, int64_t token) {
    float padded[GROUP] = {0};
    int32_t largest = 0, sum = 0, q[GROUP];
    memcpy(padded, x, count * sizeof(float));
    for (int i = 0; i < GROUP; i++) { /* magnitudes are in the order of their bits, infinity and NaN above all */
        int32_t magnitude;
        memcpy(&magnitude, padded + i, 4);
        magnitude &= 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    float most;
    memcpy(&most, &largest, 4);
    int finite = largest < 0x7f800000;
    float inverse = finite && most > 1e-30f ? 32512.0f / most : 0.0f;
    for (int i = 0; i < GROUP; i++) {
        q[i] = finite ? (int32_t)rintf(padded[i] * inverse) : 0;
        sum += q[i];
    }
    float scale = !finite ? NAN : inverse > 0 ? most / 32512.0f : 0.0f;
    in->scale[token * (in->padded / GROUP) + group] = scale;
    in->shift[token * (in->padded / GROUP) + group] = -(float)((1 << (bits - 1)) - 1) * (float)sum * scale;
    int8_t *out = in->q + token * 2 * in->padded;
    if (bits <= 4) {
        out += group / 2 * 256 + group % 2 * 32;
        for (int i = 0; i < GROUP / 2; i++) {
            int32_t even = (q[2 * i] + 128) >> 8, odd = (q[2 * i + 1] + 128) >> 8;
            out[i] = even, out[64 + i] = odd;
            out[128 + i] = q[2 * i] - 256 * even, out[192 + i] = q[2 * i + 1] - 256 * odd;
        }
    } else {
        out += group * 128;
        for (int i = 0; i < GROUP; i++) {
            int32_t high = (q[i] + 128) >> 8;
            out[i] = high, out[64 + i] = q[i] - 256 * high;
        }
    }
}

static void quantise(const Matrix *m, Inputs *in, int64_t token) {
    if (!fast(m))
        return;
    for (int64_t at = 0; at < in->padded; at += GROUP) {
        int64_t count = at < in->width ? least(GROUP, in->width - at) : 0;
        quantise_group(in->x + token * in->width + (count ? at : 0), count, m->bits, at / GROUP, in, token);
    }
}

static int open_inputs(const Matrix *m, const float *x, int64_t n, Inputs *in) {
    int64_t padded = upto(m->width, BLOCK) * BLOCK;
    *in = (Inputs){.width = m->width, .padded = padded, .step = 1, .x = x};
    if (!fast(m))
        return 0;
    in->q = room(n * padded * 2 + n * padded / GROUP * 2 * sizeof(float));
    in->scale = (float *)(in->q + n * padded * 2);
    in->shift = in->scale + n * padded / GROUP;
    return in->q == NULL;
}

/* One token of every `step`, from `first` on. */
static Inputs every_input(Inputs in, int64_t first, int64_t step) {
    in.step = step;
    in.x += first * in.width;
    if (in.q) {
        in.q += first * 2 * in.padded;
        in.scale += first * in.padded / GROUP, in.shift += first * in.padded / GROUP;
    }
    return in;
}

#if VNNI
/* y[t * stride + row] for `tokens` tokens from number t on. bits, tokens and careful are constants: this is written out
for each. Loads are of 64 bytes of codes and of 16 part scales. What they read beyond a row meets activations and scales
that are 0; not to read beyond the matrix too, its last rows are read with a mask, which takes twice the time. */
ALWAYS void row_vnni(const int bits, const int tokens, const int careful, const Matrix *m, const Inputs *in, int64_t t,
                     int64_t row, float *y, int64_t stride) {
    const int pairs = bits <= 4;
    const __m512i mask = _mm512_set1_epi8((1 << bits) - 1), zero = _mm512_setzero_si512();
    const int64_t bytes = row_bytes(m), groups = upto(m->width, GROUP), each = in->padded / GROUP;
    const uint8_t *codes = m->codes + row * bytes, *part = m->part + row * groups;
    __m512 sum[4];
    for (int k = 0; k < tokens; k++)
        sum[k] = _mm512_setzero_ps();
    for (int64_t block = 0; block < groups; block += 16) { /* the scales of 16 groups fill a register */
        const int64_t left = least(16, groups - block);
        const __m512 parts = !m->part ? _mm512_set1_ps(1)
                                      : _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                                            careful ? _mm_maskz_loadu_epi8((1 << left) - 1, part + block)
                                                    : _mm_loadu_si128((const __m128i *)(part + block))));
        __m512 scale[4];
        const int8_t *q[4];
        for (int k = 0; k < tokens; k++) {
            const int64_t token = (t + k) * in->step;
            q[k] = in->q + token * 2 * in->padded + block * 2 * GROUP;
            scale[k] = _mm512_mul_ps(parts, _mm512_loadu_ps(in->scale + token * each + block));
            sum[k] = _mm512_fmadd_ps(parts, _mm512_loadu_ps(in->shift + token * each + block), sum[k]);
        }
        __m512i lane = pairs ? _mm512_mask_blend_epi32(0xff00, zero, _mm512_set1_epi32(1)) : zero;
#pragma GCC unroll 8
        for (int64_t g = 0; g < left; g += 1 + pairs) {
            const int64_t start = (block + g) * 8 * bits;
            __m512i v = careful ? _mm512_maskz_loadu_epi8(first_bytes(bytes - start), codes + start)
                                : _mm512_loadu_si512(codes + start);
            __m512i odd = zero;
            _mm_prefetch((const char *)codes + start + AHEAD, _MM_HINT_T0);
            if (bits == 4) {
                odd = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
                v = _mm512_and_si512(v, mask);
            } else if (pairs) {
                v = _mm512_permutexvar_epi8(every(2 * bits, 0, 0), v);
                odd = _mm512_and_si512(_mm512_multishift_epi64_epi8(every(0, bits, 2 * bits), v), mask);
                v = _mm512_and_si512(_mm512_multishift_epi64_epi8(every(0, 0, 2 * bits), v), mask);
            } else {
                v = spread(bits, v);
            }
            for (int k = 0; k < tokens; k++) {
                const int8_t *at = q[k] + g * 2 * GROUP;
                __m512i dot = _mm512_dpbusd_epi32(zero, v, _mm512_loadu_si512(at));
                if (pairs)
                    dot = _mm512_dpbusd_epi32(dot, odd, _mm512_loadu_si512(at + 64));
                dot = _mm512_slli_epi32(dot, 8);
                dot = _mm512_dpbusd_epi32(dot, v, _mm512_loadu_si512(at + (pairs ? 128 : 64)));
                if (pairs)
                    dot = _mm512_dpbusd_epi32(dot, odd, _mm512_loadu_si512(at + 192));
                sum[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lane, scale[k]), sum[k]);
            }
            lane = _mm512_add_epi32(lane, _mm512_set1_epi32(1 + pairs));
        }
    }
    const float whole = half(m->whole[row]) * (m->part ? 1 / 255.0f : 1.0f);
    for (int k = 0; k < tokens; k++)
        y[(t + k) * stride + row] = _mm512_reduce_add_ps(sum[k]) * whole;
}

ALWAYS void rows_vnni(const int bits, const int tokens, const Matrix *m, const Inputs *in, int64_t t, int64_t from,
                      int64_t to, float *y, int64_t stride) {
    const int64_t last = upto(64, row_bytes(m)), last_parts = m->part ? upto(16, row_groups(m)) : 0;
    const int64_t careful = m->count - (last > last_parts ? last : last_parts);
    for (; from < least(to, careful); from++)
        row_vnni(bits, tokens, 0, m, in, t, from, y, stride);
    for (; from < to; from++)
        row_vnni(bits, tokens, 1, m, in, t, from, y, stride);
}

#define TOKENS(bits) \
    for (int64_t t = 0; t < n;) { \
        if (n - t >= 4) \
            rows_vnni(bits, 4, m, in, t, from, to, y, stride), t += 4; \
        else if (n - t >= 2) \
            rows_vnni(bits, 2, m, in, t, from, to, y, stride), t += 2; \
        else \
            rows_vnni(bits, 1, m, in, t, from, to, y, stride), t += 1; \
    }
#endif

/* y[t * stride + row] for n tokens and the rows from, ..., to - 1 */
static void rows(const Matrix *m, const Inputs *in, int64_t n, int64_t from, int64_t to, float *y, int64_t stride) {
#if VNNI
    if (fast(m)) {
        FOR_BITS(m->bits, TOKENS)
        return;
    }
#endif
    float weights[PIECE];
    for (int64_t row = from; row < to; row++)
        for (int64_t at = 0; at < m->width; at += PIECE) {
            int64_t count = least(PIECE, m->width - at);
            unpack_piece(m, row, at, count, weights);
            for (int64_t t = 0; t < n; t++) {
                const float *x = in->x + t * in->step * in->width + at;
                float sum[16] = {0}, all = at ? y[t * stride + row] : 0;
                int64_t i = 0;
                for (; i + 16 <= count; i += 16)
                    for (int k = 0; k < 16; k++)
                        sum[k] += weights[i + k] * x[i + k];
                for (; i < count; i++)
                    all += weights[i] * x[i];
                for (int k = 0; k < 16; k++)
                    all += sum[k];
                y[t * stride + row] = all;
            }
        }
}

/* ---- threads ---- */

#define THREADS 64
typedef struct { /* tasks 0, ..., count - 1: each thread has a run of them, as memory is read best in a row */
    int64_t count, threads;
    _Atomic int64_t done; /* threads that found no more */
    struct { _Alignas(64) _Atomic int64_t next; } at[THREADS];
} Tasks;

static void share(Tasks *tasks, int64_t count, int threads) {
    tasks->count = count;
    tasks->done = 0;
    tasks->threads = least(threads, THREADS);
    for (int64_t k = 0; k < tasks->threads; k++)
        tasks->at[k].next = count * k / tasks->threads;
}

/* A task of this thread's run, and when it is done one of another's, whose thread may be waiting for a processor. */
static int64_t next_task(Tasks *tasks, int thread) {
    for (int64_t k = 0; k < tasks->threads; k++) {
        int64_t owner = (thread + k) % tasks->threads, end = tasks->count * (owner + 1) / tasks->threads;
        if (tasks->at[owner].next < end) {
            int64_t task = tasks->at[owner].next++;
            if (task < end)
                return task;
        }
    }
    return -1;
}

/* Waits for the other threads, and gives them the processor: where the system is busy, one may not have begun, and
OpenMP's own wait would keep the processor from it. */
static void meet(Tasks *tasks) {
    tasks->done++;
    while (tasks->done < omp_get_num_threads())
        sched_yield();
}

/* ---- what is called ---- */

#define MATRIX const uint8_t *codes, const uint8_t *part, const uint16_t *whole, int64_t count, int64_t width, \
               int64_t bits, int64_t group
#define AS_MATRIX {codes, part, whole, count, width, bits, group}

int packed_vnni(void) { return VNNI; }

/* y [n, count] = x [n, width] by a matrix [count, width] */
int packed_matvec(MATRIX, const float *x, int64_t n, float *y, int threads) {
    const Matrix m = AS_MATRIX;
    Inputs in;
    if (open_inputs(&m, x, n, &in))
        return 1;
    for (int64_t t = 0; t < n; t++)
        quantise(&m, &in, t);
    const int64_t chunk = chunk_rows(&m);
    Tasks tasks;
    share(&tasks, upto(count, chunk), threads);
#pragma omp parallel num_threads(threads) if (count > chunk)
    {
        for (int64_t task; (task = next_task(&tasks, omp_get_thread_num())) >= 0;)
            rows(&m, &in, n, task * chunk, least(count, (task + 1) * chunk), y, count);
        meet(&tasks);
    }
    free(in.q);
    return 0;
}

static void unpack_row(const Matrix *m, int64_t row, void *out, int bf16) {
    float piece[PIECE];
    for (int64_t at = 0; at < m->width; at += PIECE) {
        const int64_t size = least(PIECE, m->width - at), start = row * m->width + at;
        unpack_piece(m, row, at, size, bf16 ? piece : (float *)out + start);
        for (int64_t i = 0; bf16 && i < size; i++)
            ((uint16_t *)out)[start + i] = brain(piece[i]);
    }
}

/* Rows of a matrix [count, width] as fp32, or as bf16. */
int packed_unpack(MATRIX, void *out, int bf16, int threads) {
    const Matrix m = AS_MATRIX;
    const int64_t chunk = chunk_rows(&m);
    Tasks tasks;
    share(&tasks, upto(count, chunk), threads);
#pragma omp parallel num_threads(threads) if (count > chunk)
    {
        for (int64_t task; (task = next_task(&tasks, omp_get_thread_num())) >= 0;)
            for (int64_t row = task * chunk; row < least(count, (task + 1) * chunk); row++)
                unpack_row(&m, row, out, bf16);
        meet(&tasks);
    }
    return 0;
}

#define LIFTED 256 /* columns that are lifted at once */

static void lift_piece(const Matrix *m, int64_t h, int64_t at, int64_t heads, int64_t first, int64_t size,
                       const float *x, int64_t n, float *y) {
    const int64_t count = least(LIFTED, m->width - at), row = m->count / heads * h + first;
    float weights[4][LIFTED];
    for (int64_t t = 0; t < n; t++)
        memset(y + (t * heads + h) * m->width + at, 0, count * sizeof(float));
    for (int64_t i = 0; i < size; i += 4) { /* 4 rows at once, as a sum is read and written each time */
        for (int64_t k = 0; k < 4; k++)
            if (i + k < size)
                unpack_piece(m, row + i + k, at, count, weights[k]);
            else
                memset(weights[k], 0, count * sizeof(float));
        for (int64_t t = 0; t < n; t++) {
            float factor[4] = {0}, *restrict out = y + (t * heads + h) * m->width + at;
            memcpy(factor, x + (t * heads + h) * size + i, least(4, size - i) * sizeof(float));
            for (int64_t c = 0; c < count; c++)
                out[c] += factor[0] * weights[0][c] + factor[1] * weights[1][c] + factor[2] * weights[2][c] +
                          factor[3] * weights[3][c];
        }
    }
}

/* y [n, heads, width]: sum over i < size of x [n, heads, size] times row h * stride + first + i */
int packed_lift(MATRIX, int64_t heads, int64_t first, int64_t size, const float *x, int64_t n, float *y,
                int threads) {
    const Matrix m = AS_MATRIX;
    const int64_t pieces = upto(width, LIFTED);
    Tasks tasks;
    share(&tasks, heads * pieces, threads);
#pragma omp parallel num_threads(threads) if (heads * size * width > CHUNK)
    {
        for (int64_t task; (task = next_task(&tasks, omp_get_thread_num())) >= 0;)
            lift_piece(&m, task / pieces, task % pieces * LIFTED, heads, first, size, x, n, y);
        meet(&tasks);
    }
    return 0;
}

/* y [n, heads, size]: x [n, heads, width] by rows h * stride + first + i, i < size */
int packed_lower(MATRIX, int64_t heads, int64_t first, int64_t size, const float *x, int64_t n, float *y,
                 int threads) {
    Inputs in;
    const Matrix all = AS_MATRIX;
    const int64_t stride = count / heads;
    if (open_inputs(&all, x, n * heads, &in))
        return 1;
    Tasks tasks;
    share(&tasks, heads, threads);
#pragma omp parallel num_threads(threads) if (heads * size * width > CHUNK)
    {
        for (int64_t h; (h = next_task(&tasks, omp_get_thread_num())) >= 0;) {
            const int64_t row = h * stride + first;
            const Inputs own = every_input(in, h, heads);
            for (int64_t t = 0; t < n; t++)
                quantise(&all, &in, t * heads + h);
            const Matrix m = {codes + row * row_bytes(&all), part ? part + row * row_groups(&all) : NULL, whole + row,
                              count - row, width, bits, group};
            rows(&m, &own, n, 0, size, y + h * size, heads * size);
        }
        meet(&tasks);
    }
    free(in.q);
    return 0;
}

typedef struct { /* a stack of matrices: one every so many bytes */
    Matrix first;
    int64_t codes_step, part_step, whole_step;
} Stack;

static Matrix pick(const Stack *stack, int64_t slot) {
    Matrix m = stack->first;
    m.codes += slot * stack->codes_step;
    m.part = m.part ? m.part + slot * stack->part_step : NULL;
    m.whole = (const uint16_t *)((const uint8_t *)m.whole + slot * stack->whole_step);
    return m;
}

/* y [count, D]: what the experts in those slots make of one token x [D]. gate_up: matrices [2 I, D], gate rows first;
down: [D, I]. Nobody waits for all: an expert's middle is ready when the last of its own rows is. */
int packed_experts(const Stack *gate_up, const Stack *down, const int64_t *slots, int64_t count, const float *x,
                   float *y, int threads) {
    const int64_t hidden = gate_up->first.width, width = down->first.width;
    const int64_t up_chunk = chunk_rows(&gate_up->first), up_chunks = upto(width, up_chunk);
    const int64_t down_chunk = chunk_rows(&down->first), down_chunks = upto(hidden, down_chunk);
    float *middle = room(2 * count * width * sizeof(float)); /* gate, then up, of each */
    _Atomic int64_t *unfinished = room(count * sizeof(int64_t)); /* tasks before an expert's middle is; then -1 */
    Inputs in = {0}, inner = {0};
    int failed = !middle || !unfinished || open_inputs(&gate_up->first, x, 1, &in) ||
                 open_inputs(&down->first, middle, count, &inner);
    if (!failed) {
        Tasks first, second;
        share(&first, count * up_chunks, threads);
        share(&second, count * down_chunks, threads);
        for (int64_t k = 0; k < count; k++)
            unfinished[k] = up_chunks;
        quantise(&gate_up->first, &in, 0);
#pragma omp parallel num_threads(threads)
        {
            for (int64_t task; (task = next_task(&first, omp_get_thread_num())) >= 0;) {
                const int64_t k = task / up_chunks, from = task % up_chunks * up_chunk;
                const int64_t to = least(width, from + up_chunk);
                const Matrix m = pick(gate_up, slots[k]);
                float *gate = middle + k * width, *up = middle + (count + k) * width;
                rows(&m, &in, 1, from, to, gate, 0);
                rows(&m, &in, 1, width + from, width + to, up - width, 0);
                for (int64_t i = from; i < to; i++)
                    gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
                if (--unfinished[k] == 0) {
                    quantise(&down->first, &inner, k);
                    unfinished[k] = -1;
                }
            }
            for (int64_t task; (task = next_task(&second, omp_get_thread_num())) >= 0;) {
                const int64_t k = task / down_chunks, from = task % down_chunks * down_chunk;
                const Matrix m = pick(down, slots[k]);
                const Inputs own = every_input(inner, k, 1);
                while (unfinished[k] >= 0)
                    sched_yield();
                rows(&m, &own, 1, from, least(hidden, from + down_chunk), y + k * hidden, 0);
            }
            meet(&second);
        }
    }
    free(in.q), free(inner.q), free(middle), free(unfinished);
    return failed;
}
