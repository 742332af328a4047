/* What the C files of this folder share. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ALWAYS int64_t upto(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* e^x, within 2e-7 of it for x from -87 to 88 and held there outside: a form that compilers vectorise */
ALWAYS float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = rintf(x * 1.44269504f), rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691e-4f;
    sum = sum * rest + 1.3981999e-3f;
    sum = sum * rest + 8.3334519e-3f;
    sum = sum * rest + 4.1665796e-2f;
    sum = sum * rest + 1.6666665e-1f;
    sum = sum * rest + 5.0000001e-1f;
    uint32_t power = (uint32_t)((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &power, 4);
    return (sum * rest * rest + rest + 1.0f) * scale;
}
