/* Rows of the cache: packed as `workbench/codec.py` packs them, to the same bytes, and unpacked to what it unpacks.

A row is the latent and then the rotary key, each by a codec of its own; a plain row is one codec's. A codec stores a
vector as one to three parts, each a tensor of rows that lie in blocks. PyTorch rounds after every operation, so here no
product may be joined with the sum that follows it, and the errors of a group are summed in PyTorch's order. */

#include "lanes.h"

#define BLOCK 64  /* rows of a block */
#define BEYOND 32 /* bytes that may be read beyond a row of codes */
#define GROUP 16  /* codes that share a part of the scale: a vector */

enum { FP32, BF16, TILES, CODES, GROUPS };

typedef struct {
    int64_t kind, size, width; /* size: bits of a code, or elements of a tile; width 0 where there is nothing */
} Codec;

typedef struct {
    Codec latent, rope;
} Form;

ALWAYS int64_t parts_of(const Codec *c) { return !c->width ? 0 : c->kind == GROUPS ? 3 : c->kind < TILES ? 1 : 2; }

/* Bytes that a row takes in that part. */
ALWAYS int64_t part_bytes(const Codec *c, int64_t part) {
    switch (c->kind) {
    case FP32: return 4 * c->width;
    case BF16: return 2 * c->width;
    case TILES: return part ? 4 * upto(c->width, c->size) : c->width;
    case CODES: return part ? 2 : upto(c->width * c->size, 8);
    default: return part == 2 ? 2 : part ? upto(c->width, GROUP) : upto(c->width * c->size, 8);
    }
}

/* ---- numbers ---- */

ALWAYS float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

ALWAYS uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

ALWAYS float from_fp16(uint16_t half) { /* not negative */
    return half >= 0x7c00 ? (half > 0x7c00 ? NAN : INFINITY) : of_bits((uint32_t)half << 13) * 0x1p112f;
}

/* A scale as fp16, rounded up, never 0; not a number where fp16 cannot hold it. */
ALWAYS uint16_t to_fp16(float scale) {
    if (!(scale <= 65504.0f))
        return 0x7e00;
    if (scale < 0x1p-14f) {
        const float steps = ceilf(scale * 0x1p24f);
        return steps < 1 ? 1 : (uint16_t)steps;
    }
    return (bits_of(scale) - (112 << 23) + 0x1fff) >> 13;
}

ALWAYS uint8_t to_fp8(float value) { /* e4m3: to the nearest, ties to even; beyond it, not a number */
    const uint32_t sign = bits_of(value) >> 24 & 128;
    uint32_t bits = bits_of(value) & 0x7fffffff;
    if (bits >= 0x43f00000) /* 480 */
        return sign | 127;
    if (bits < 0x3c800000) /* 2^-6: the last bit of what is added is 2^-9 */
        return sign | (bits_of(of_bits(bits) + 0x1p14f) - bits_of(0x1p14f));
    return sign | (bits - (120 << 23) + 0x7ffff + (bits >> 20 & 1)) >> 20;
}

ALWAYS Lanes from_fp8(Words byte) {
    const Words magnitude = byte & 127, nan = (Words)(magnitude == 127) & 0x7fc00000;
    return (Lanes)((Words)((Lanes)(magnitude << 20) * 0x1p120f) | nan | (byte & 128) << 24);
}

/* A product that PyTorch rounds: no compiler sees through this to join it with a sum. */
ALWAYS Lanes apart(Lanes product) {
#ifdef __AVX512F__
    __asm__("" : "+v"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

ALWAYS Lanes nearest(Lanes v) { /* whole numbers, ties to even */
#ifdef __AVX512F__
    return (Lanes)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    for (int k = 0; k < 16; k++)
        v[k] = rintf(v[k]);
    return v;
#endif
}

ALWAYS Lanes above(Lanes v) { /* whole numbers, no smaller */
#ifdef __AVX512F__
    return (Lanes)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
#else
    for (int k = 0; k < 16; k++)
        v[k] = ceilf(v[k]);
    return v;
#endif
}

ALWAYS Lanes within(Lanes v, float low, float high) { return -larger(-larger(v, all(low)), all(-high)); }

ALWAYS Lanes chosen(Ints yes, Lanes a, Lanes b) { return (Lanes)((yes & (Ints)a) | (~yes & (Ints)b)); }

/* The largest magnitude; not a number if there is one that is not. */
ALWAYS float largest_of(const float *x, int64_t count) {
    uint32_t most = 0; /* magnitudes are in the order of their bits, infinity and NaN above all */
    for (int64_t k = 0; k < count; k++) {
        const uint32_t magnitude = bits_of(x[k]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    return of_bits(most);
}

/* ---- packing ---- */

/* Codes as a stream of bits, the lowest first. There is room for 8 codes beyond the count. */
static void put_codes(uint16_t *codes, int64_t count, int64_t bits, uint8_t *to) {
    const int64_t per = bits > 8 ? 4 : 8; /* they fill whole bytes */
    memset(codes + count, 0, 2 * per);
    for (int64_t at = 0; at < count; at += per, to += per * bits / 8) {
        uint64_t word = 0;
        for (int64_t k = 0; k < per; k++)
            word |= (uint64_t)codes[at + k] << (k * bits);
        memcpy(to, &word, upto(least(per, count - at) * bits, 8));
    }
}

static void pack_tiles(const Codec *c, const float *x, uint8_t *values, float *scales) {
    for (int64_t from = 0; from < c->width; from += c->size) {
        const int64_t count = least(c->size, c->width - from);
        const float scale = largest_of(x + from, count) / 448.0f, held = scale < 1e-12f ? 1e-12f : scale;
        for (int64_t k = from; k < from + count; k++)
            values[k] = to_fp8(x[k] / held);
        scales[from / c->size] = held;
    }
}

static void pack_codes(const Codec *c, const float *x, uint8_t *to, uint16_t *scale) {
    const float most = (1 << (c->size - 1)) - 1;
    uint16_t codes[c->width + 8];
    *scale = to_fp16(largest_of(x, c->width) / most);
    const float unit = from_fp16(*scale);
    for (int64_t k = 0; k < c->width; k++) {
        const float whole = rintf(x[k] / unit);
        codes[k] = most + (whole > most ? most : whole < -most ? -most : whole == whole ? whole : 0);
    }
    put_codes(codes, c->width, c->size, to);
}

/* Sixteen groups side by side: x[k] has element k of each. Their parts, with the least squared errors. */
ALWAYS Lanes best_parts(const Lanes *x, float most, float whole) {
    const float steps[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f}; /* STEPS of the codec */
    Lanes largest = {0}, least_error = {0}, best = {0};
    for (int k = 0; k < GROUP; k++)
        largest = larger(largest, larger(x[k], -x[k]));
    largest /= most;
    for (int i = 0; i < 6; i++) {
        const Lanes part = within(above(largest * steps[i] / whole * 255.0f), 1, 255), unit = part / 255.0f * whole;
        Lanes squares[GROUP], error;
        for (int k = 0; k < GROUP; k++) {
            const Lanes off = apart(within(nearest(x[k] / unit), -most, most) * unit) - x[k];
            squares[k] = apart(off * off);
        }
        error = squares[0] + squares[8];
        for (int k = 1; k < 8; k++)
            error += squares[k] + squares[8 + k];
        const Ints better = i ? error < least_error : (Ints){0} == 0;
        least_error = chosen(better, error, least_error);
        best = chosen(better, part, best);
    }
    return best;
}

static void pack_groups(const Codec *c, const float *x, uint8_t *to, uint8_t *parts, uint16_t *scale) {
    const int64_t groups = upto(c->width, GROUP), most = (1 << (c->size - 1)) - 1;
    uint16_t codes[upto(groups, 16) * 16 * GROUP + 8];
    *scale = to_fp16(largest_of(x, c->width) / most);
    const float whole = from_fp16(*scale);
    if (whole != whole) {
        memset(parts, 0, groups);
        for (int64_t k = 0; k < c->width; k++)
            codes[k] = most;
        put_codes(codes, c->width, c->size, to);
        return;
    }
    for (int64_t first = 0; first < groups; first += 16) {
        float turned[GROUP][16] = {{0}};
        Lanes wide[GROUP];
        const int64_t from = first * GROUP, count = least(16 * GROUP, c->width - from);
        for (int64_t k = 0; k < count; k++)
            turned[k % GROUP][k / GROUP] = x[from + k];
        memcpy(wide, turned, sizeof wide);
        const Lanes part = best_parts(wide, most, whole), unit = part / 255.0f * whole;
        for (int64_t k = 0; k < GROUP; k++) {
            const Lanes code = within(nearest(wide[k] / unit), -most, most) + (float)most;
            for (int64_t g = 0; g < 16; g++)
                codes[from + g * GROUP + k] = code[g];
        }
        for (int64_t g = 0; g < least(16, groups - first); g++)
            parts[first + g] = part[g];
    }
    put_codes(codes, c->width, c->size, to);
}

/* A vector becomes the row of that number. */
static void pack_vector(const Codec *c, const float *x, void *const *parts, int64_t row) {
    uint8_t *at[3] = {NULL};
    for (int64_t p = 0; p < parts_of(c); p++)
        at[p] = (uint8_t *)parts[p] + row * part_bytes(c, p);
    if (!c->width)
        return;
    switch (c->kind) {
    case FP32: memcpy(at[0], x, 4 * c->width); break;
    case BF16:
        for (int64_t k = 0; k < c->width; k++)
            ((uint16_t *)at[0])[k] = to_half(x[k]);
        break;
    case TILES: pack_tiles(c, x, at[0], (float *)at[1]); break;
    case CODES: pack_codes(c, x, at[0], (uint16_t *)at[1]); break;
    case GROUPS: pack_groups(c, x, at[0], at[1], (uint16_t *)at[2]); break;
    }
}

/* ---- unpacking ---- */

ALWAYS Words bytes_at(const uint8_t *at) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); /* compilers take bytes one by one */
#else
    Bytes some;
    memcpy(&some, at, 16);
    return __builtin_convertvector(some, Words);
#endif
}

/* Where in 2 * bits bytes the codes of a vector are: as bytes of each lane, and then as shifts. */
typedef struct {
    Words bytes, shifts, mask;
    int64_t bits;
} Places;

static Places places(int64_t bits) {
    Places found = {.bits = bits};
    for (int k = 0; k < 16; k++) {
        const uint32_t byte = k * bits / 8;
        found.bytes[k] = byte * 0x01010101 + 0x03020100, found.shifts[k] = k * bits % 8;
        found.mask[k] = (1 << bits) - 1;
    }
    return found;
}

ALWAYS Words codes_at(const uint8_t *at, Places where) { /* reads 32 bytes */
#ifdef __AVX512VBMI__
    const __m512i some = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)at));
    const __m512i each = _mm512_permutexvar_epi8((__m512i)where.bytes, some);
    return (Words)_mm512_srlv_epi32(each, (__m512i)where.shifts) & where.mask;
#else
    Words found;
    for (int k = 0; k < 16; k++) {
        uint32_t word;
        memcpy(&word, at + k * where.bits / 8, 4);
        found[k] = word;
    }
    return found >> where.shifts & where.mask;
#endif
}

/* Codes in vectors, each with its unit: what is read beyond the width is not written. */
ALWAYS void unpack_codes(Places where, const uint8_t *codes, const float *unit, int64_t every, int64_t width, float *to,
                         const int bf16) {
    const Ints most = (Ints)(where.mask >> 1);
    int64_t k = 0;
    Lanes value;
    for (; k + 16 <= width; k += 16, codes += 2 * where.bits, unit += every) {
        value = __builtin_convertvector((Ints)codes_at(codes, where) - most, Lanes) * all(*unit);
        value = rounded_lanes(value, bf16);
        memcpy(to + k, &value, 64);
    }
    if (k < width) {
        value = __builtin_convertvector((Ints)codes_at(codes, where) - most, Lanes) * all(*unit);
        value = rounded_lanes(value, bf16);
        memcpy(to + k, &value, 4 * (width - k));
    }
}

ALWAYS void unpack_tiles(const uint8_t *values, const float *scale, int64_t size, int64_t width, float *to,
                         const int bf16) {
    for (int64_t from = 0; from < width; from += size, scale++) {
        const int64_t end = least(width, from + size);
        int64_t k = from;
        Lanes value;
        for (; k + 16 <= end; k += 16) {
            value = rounded_lanes(from_fp8(bytes_at(values + k)) * all(*scale), bf16);
            memcpy(to + k, &value, 64);
        }
        if (k < end) {
            value = rounded_lanes(from_fp8(bytes_at(values + k)) * all(*scale), bf16);
            memcpy(to + k, &value, 4 * (end - k));
        }
    }
}

ALWAYS void unpack_plain(int64_t kind, const void *row, int64_t width, float *to, const int bf16) {
    if (kind == BF16)
        for (int64_t k = 0; k < width; k++)
            to[k] = from_half(((const uint16_t *)row)[k]);
    else
        for (int64_t k = 0; k < width; k++)
            to[k] = rounded(((const float *)row)[k], bf16);
}

/* What a code of each vector stands for, [BLOCK, groups] of the block that begins at row `first`: `every` 1; with one
scale for a row, [BLOCK], `every` 0. Scales lie one after the other, so that a block's are read together. */
ALWAYS void units_of(const Codec *c, void *const *parts, int64_t first, int64_t count, float *units) {
    const int64_t groups = upto(c->width, GROUP), scales = c->kind == GROUPS ? 2 : 1;
    float whole[BLOCK];
    for (int64_t r = 0; r < BLOCK; r++)
        whole[r] = from_fp16(((const uint16_t *)parts[scales])[first + r]);
    if (c->kind == CODES) {
        memcpy(units, whole, sizeof whole);
        return;
    }
    float shares[BLOCK * groups + 16]; /* the last vector of a row is read with what comes after it */
    const uint8_t *part = (const uint8_t *)parts[1] + first * groups;
    for (int64_t i = 0; i < BLOCK * groups; i += 16) {
        const Lanes share = __builtin_convertvector((Ints)bytes_at(part + i), Lanes) / 255.0f;
        memcpy(shares + i, &share, 64);
    }
    memset(shares + BLOCK * groups, 0, 64);
    for (int64_t r = 0; r < count; r++)
        for (int64_t g = 0; g < groups; g += 16) {
            const Lanes unit = load(shares, r * groups + g, 0) * all(whole[r]);
            memcpy(units + r * groups + g, &unit, 64);
        }
}

ALWAYS void unpack_typed(const Codec *c, void *const *parts, int64_t first, int64_t count, float *to, int64_t step,
                         const int bf16) {
    const int64_t bytes = part_bytes(c, 0), tiles = c->kind == TILES ? upto(c->width, c->size) : 0;
    const int64_t every = c->kind == GROUPS, groups = every ? upto(c->width, GROUP) : 1;
    const int64_t last = BLOCK - upto(BEYOND, bytes); /* from there on, what is beyond a row may be nobody's */
    const uint8_t *row = (const uint8_t *)parts[0] + first * bytes;
    const Places where = places(c->kind >= CODES ? c->size : 1);
    uint8_t room[bytes + BEYOND];
    float units[BLOCK * groups + 16];
    if (c->kind >= CODES)
        units_of(c, parts, first, count, units);
    for (int64_t r = 0; r < count; r++, to += step, row += bytes) {
        const uint8_t *at = r < last ? row : memcpy(room, row, bytes);
        if (c->kind >= CODES)
            unpack_codes(where, at, units + r * groups, every, c->width, to, bf16);
        else if (c->kind == TILES)
            unpack_tiles(at, (const float *)parts[1] + (first + r) * tiles, c->size, c->width, to, bf16);
        else
            unpack_plain(c->kind, row, c->width, to, bf16);
    }
}

/* The first rows of the block that begins at row `first`, `step` floats from each other. */
static void unpack_vectors(const Codec *c, void *const *parts, int64_t first, int64_t count, float *to, int64_t step,
                           int bf16) {
    if (c->width && bf16)
        unpack_typed(c, parts, first, count, to, step, 1);
    else if (c->width)
        unpack_typed(c, parts, first, count, to, step, 0);
}
