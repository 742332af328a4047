/* One forward pass of a model with plain weights and any cache, on the processor. `workbench/compiled.py` compiles this
file, `workbench/fused.py` calls it; what is computed is `Model.forward` of `workbench/model.py`, always in the absorbed
form.

A small model spends its time between operations: pocket's weights pass through a core in a tenth of the time that
PyTorch takes to be asked for them. Here a pass is one call, and each of its steps is cut into tasks that threads take.
The thread that called goes on as soon as the last task of a step is done: it never waits for a thread that has none,
which on a busy machine may not have a processor either.

Every number is summed in one order, whatever the number of threads, of tokens in a pass, or of sequences beside it:
sixteen partial sums along a row, keys in blocks of 64 by position. So a token has the same bits alone, in a batch, in a
prompt, or after one. In bf16 a value is rounded where the reference rounds it.

N tokens of B sequences, T each; D hidden, H heads, Q query latent, C latent, W = C + R a cached row, E experts, K
chosen, I expert width. */

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "rows.h"

#define TOGETHER 36  /* tokens that meet a row of weights while it is near */
#define QUERIES 32   /* tokens of one head that read the cache together */
#define NEAR 8       /* rows of weights that all tokens meet before the next are read */
#define ROWS 16      /* at least so many rows of weights are a task */
#define CHUNK 16384  /* or as many as have so many bytes */
#define FAR 2048     /* bytes of a row from which on one token reads row after row, as one stream: they come from memory */
#define AHEAD 8192   /* bytes ahead of which it is asked for: hardware stops at a page */
#define SPINS 2000   /* looks at the others before the processor is given away */
#define IDLE 200000  /* nanoseconds after which a thread without a task sleeps */
#define PATIENCE 300000 /* and before the processor is given away for want of the last tasks */
#define THREADS 64

typedef struct { /* [rows, width], row after row; at is NULL where there is none */
    const void *at;
    int64_t rows, width;
} Weight;

typedef struct {
    const void *attention_norm, *q_norm, *kv_norm, *mlp_norm;
    Weight down, q_up, kv_up, out;
    Weight router;                /* at is NULL in a dense layer */
    Weight gate_up, shut;         /* of the dense layer, or of the shared experts */
    Weight experts_up, experts_down; /* [E 2 I, D] and [E D, I] */
} Layer;

typedef struct {
    int64_t bf16; /* weights and roundings; else fp32 */
    int64_t layers, hidden, heads, content, rope, value, latent;
    int64_t experts, chosen, groups, kept, normed; /* groups is 0 where there are none */
    float eps, scale, factor;
    const Layer *layer;
    const void *norm;
    Weight head;
} Net;

typedef struct {
    Form form;
    int64_t in_place, most, recent; /* plain rows are read where they are; blocks of the longest; see windows */
    const int64_t *before;          /* [B] tokens in the cache */
    const int64_t *table;           /* [B, most] where block by block a sequence is */
    void *const *pool;              /* [layers, parts of a row], each [any, its width] */
    void *const *windows;           /* [layers, B] last tokens in bf16, [recent, W]: position p is at p % recent */
    const int64_t *since;           /* [B] the first position that is there; nothing where recent is 0 */
} Cache;

typedef struct {
    int64_t sequences, new; /* B, T */
    const float *rotations; /* [N, R / 2, 2] cosine, sine */
    Cache cache;
    float *x;               /* [N, D] embedded tokens; in the end the residual stream */
    int64_t *ids;           /* [MoE layers, N, K] */
    float *gates, *scores;  /* [MoE layers, N, K] and [MoE layers, N, K + 1] */
    int64_t every;          /* logits of all tokens, else of the last of each sequence */
    float *logits;
} Pass;

typedef struct { /* of a pass, see `fused_room` */
    float *normed, *down, *query, *row, *z, *added, *inner, *probs, *one, *outputs, *mine;
    int64_t *order, *first, private;
} Room;

/* ---- products ---- */

/* y[t, r] = x[t] . w[r] for T tokens and R rows, each along the whole width */
ALWAYS void tile(const int T, const int R, const int bf16, const float *const *x, const void *w, int64_t width,
                 int64_t row, float *const *y) {
    Lanes sum[6][8];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            sum[t][r] = (Lanes){0};
    int64_t k = 0;
    for (; k + 16 <= width; k += 16) {
        Lanes weights[8];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            weights[r] = load(w, (row + r) * width + k, bf16);
        if (T == 1 && R == 1)
            __builtin_prefetch((const char *)w + (row * width + k) * (bf16 ? 2 : 4) + AHEAD, 0, 2);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const Lanes value = load(x[t], k, 0);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sum[t][r] = add_product(sum[t][r], value, weights[r]);
        }
    }
    if (k < width)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sum[t][r] = add_product(sum[t][r], load_some(x[t], k, width - k, 0),
                                        load_some(w, (row + r) * width + k, width - k, bf16));
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        if (R == 1)
            y[t][row] = total(sum[t][0]);
        else
#pragma GCC unroll 8
            for (int r = 0; r + 4 <= R; r += 4)
                totals(sum[t][r], sum[t][r + 1], sum[t][r + 2], sum[t][r + 3], y[t] + row + r);
    }
}

#define TILES(T) \
    static void tiles_##T(int bf16, const float *const *x, const void *w, int64_t width, int64_t from, int64_t to, \
                          float *const *y) { \
        const int64_t far = T == 1 && width * (bf16 ? 2 : 4) >= FAR; \
        int64_t r = from; \
        if (bf16) { \
            for (; !far && r + (T == 1 ? 8 : 4) <= to; r += T == 1 ? 8 : 4) \
                tile(T, T == 1 ? 8 : 4, 1, x, w, width, r, y); \
            for (; r < to; r++) \
                tile(T, 1, 1, x, w, width, r, y); \
        } else { \
            for (; !far && r + (T == 1 ? 8 : 4) <= to; r += T == 1 ? 8 : 4) \
                tile(T, T == 1 ? 8 : 4, 0, x, w, width, r, y); \
            for (; r < to; r++) \
                tile(T, 1, 0, x, w, width, r, y); \
        } \
    }
TILES(1)
TILES(2)
TILES(3)
TILES(4)
TILES(5)
TILES(6)

static void by_tokens(const void *w, int bf16, int64_t width, const float *const *x, int64_t n, int64_t from, int64_t to,
                      float *const *y) {
    int64_t t = 0;
    for (; t + 6 <= n; t += 6)
        tiles_6(bf16, x + t, w, width, from, to, y + t);
    switch (n - t) {
    case 1: tiles_1(bf16, x + t, w, width, from, to, y + t); break;
    case 2: tiles_2(bf16, x + t, w, width, from, to, y + t); break;
    case 3: tiles_3(bf16, x + t, w, width, from, to, y + t); break;
    case 4: tiles_4(bf16, x + t, w, width, from, to, y + t); break;
    case 5: tiles_5(bf16, x + t, w, width, from, to, y + t); break;
    }
}

/* The rows from, ..., to - 1 of a matrix, by n <= TOGETHER tokens: y[t][row]. A few rows stay near while all tokens meet
them; in fp32 then, where more than one tile would widen them. */
static void product(const void *w, int bf16, int64_t width, const float *const *x, int64_t n, int64_t from, int64_t to,
                    float *const *y) {
    if (n == 1) {
        by_tokens(w, bf16, width, x, n, from, to, y);
        return;
    }
    float wide[bf16 && n > 6 ? NEAR * width : 1];
    for (int64_t r = from; r < to; r += NEAR) {
        const int64_t end = least(to, r + NEAR);
        if (bf16 && n > 6) {
            for (int64_t k = 0; k < (end - r) * width; k++)
                wide[k] = from_half(((const uint16_t *)w)[r * width + k]);
            by_tokens(wide - r * width, 0, width, x, n, r, end, y);
        } else
            by_tokens(w, bf16, width, x, n, r, end, y);
    }
}

/* y[t, c] += sum over s of p[t, s] * row s [c], s in order, for T tokens and V times 16 columns */
ALWAYS void mix_some(const int T, const int V, const int bf16, const float *p, int64_t p_step, const void *rows,
                     int64_t step, int64_t count, int64_t c, float *y, int64_t y_step) {
    Lanes sum[4][8];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            sum[t][v] = load(y + t * y_step, c + 16 * v, 0);
    for (int64_t s = 0; s < count; s++) {
        Lanes row[8];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            row[v] = load(rows, s * step + c + 16 * v, bf16);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const Lanes weight = all(p[t * p_step + s]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                sum[t][v] = add_product(sum[t][v], weight, row[v]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            memcpy(y + t * y_step + c + 16 * v, &sum[t][v], 64);
}

ALWAYS void mix_typed(const int bf16, const float *p, int64_t p_step, int64_t n, const void *rows, int64_t step,
                      int64_t count, int64_t width, float *y, int64_t y_step) {
    int64_t t = 0;
    for (; t + 4 <= n; t += 4) {
        int64_t c = 0;
        for (; c + 64 <= width; c += 64)
            mix_some(4, 4, bf16, p + t * p_step, p_step, rows, step, count, c, y + t * y_step, y_step);
        for (; c + 16 <= width; c += 16)
            mix_some(4, 1, bf16, p + t * p_step, p_step, rows, step, count, c, y + t * y_step, y_step);
    }
    for (; t < n; t++) {
        int64_t c = 0;
        for (; c + 128 <= width; c += 128)
            mix_some(1, 8, bf16, p + t * p_step, p_step, rows, step, count, c, y + t * y_step, y_step);
        for (; c + 64 <= width; c += 64)
            mix_some(1, 4, bf16, p + t * p_step, p_step, rows, step, count, c, y + t * y_step, y_step);
        for (; c + 16 <= width; c += 16)
            mix_some(1, 1, bf16, p + t * p_step, p_step, rows, step, count, c, y + t * y_step, y_step);
    }
    for (int64_t c = width / 16 * 16; c < width; c++)
        for (t = 0; t < n; t++)
            for (int64_t s = 0; s < count; s++)
                y[t * y_step + c] += p[t * p_step + s] * one_of(rows, s * step + c, bf16);
}

/* y [n, width] += p [n, count] by rows [count, width] that lie `step` elements from each other */
static void mix(const float *p, int64_t p_step, int64_t n, const void *rows, int bf16, int64_t step, int64_t count,
                int64_t width, float *y, int64_t y_step) {
    if (bf16)
        mix_typed(1, p, p_step, n, rows, step, count, width, y, y_step);
    else
        mix_typed(0, p, p_step, n, rows, step, count, width, y, y_step);
}

static void norm(const float *x, const void *weight, int64_t width, float eps, int bf16, float *y) {
    Lanes sum = {0};
    int64_t k = 0;
    for (; k + 16 <= width; k += 16)
        sum = add_product(sum, load(x, k, 0), load(x, k, 0));
    if (k < width)
        sum = add_product(sum, load_some(x, k, width - k, 0), load_some(x, k, width - k, 0));
    const float by = 1.0f / sqrtf(total(sum) / width + eps);
    for (k = 0; k < width; k++)
        y[k] = rounded(rounded(x[k] * by, bf16) * one_of(weight, k, bf16), bf16);
}

static void turn(float *x, const float *rotations, int64_t width, int bf16) {
    for (int64_t k = 0; k < width; k += 2) {
        const float re = x[k], im = x[k + 1], cosine = rotations[k], sine = rotations[k + 1];
        x[k] = rounded(re * cosine - im * sine, bf16);
        x[k + 1] = rounded(re * sine + im * cosine, bf16);
    }
}

static void round_all(float *x, int64_t count, int bf16) {
    if (bf16)
        for (int64_t k = 0; k < count; k++)
            x[k] = rounded(x[k], 1);
}

/* ---- threads ---- */

typedef struct Run Run;
typedef void Step(const Run *run, int64_t task, float *own);

struct Run { /* a pass, and where it is */
    const Net *net;
    const Pass *pass;
    Room room;
    int64_t layer, mixture, tokens, threads;
    Step *step;
};

static struct { /* the threads of this process: one pass at a time has them */
    pthread_mutex_t mine, sleeping;
    pthread_cond_t woken;
    int started;
    const Run *run;
    _Atomic int64_t threads;
    _Alignas(64) _Atomic uint64_t offer; /* number of the step << 32 | tasks that nobody has taken */
    _Alignas(64) _Atomic int64_t open;   /* tasks that are not done */
    _Alignas(64) _Atomic int sleepers;
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER};

/* Takes a task of the step on offer and does it; 0 where there is none. Only who has a task may look at the run. */
static int take(int64_t number) {
    uint64_t offer = pool.offer;
    while ((uint32_t)offer && number < pool.threads) /* in this order: they are set before the offer is made */
        if (atomic_compare_exchange_weak(&pool.offer, &offer, offer - 1)) {
            const Run *run = pool.run;
            run->step(run, (uint32_t)offer - 1, run->room.mine + number * run->room.private);
            pool.open--;
            return 1;
        }
    return 0;
}

ALWAYS void pause(void) {
#ifdef __AVX512F__
    _mm_pause();
#endif
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

static void *work(void *argument) {
    const int64_t number = (int64_t)argument;
    for (int64_t looks = 0, since = now();;) {
        if (take(number)) {
            looks = 0, since = now();
            continue;
        }
        if (++looks % SPINS) {
            pause();
            continue;
        }
        sched_yield();
        if (now() - since < IDLE)
            continue;
        pthread_mutex_lock(&pool.sleeping);
        pool.sleepers++;
        while (!(uint32_t)pool.offer)
            pthread_cond_wait(&pool.woken, &pool.sleeping);
        pool.sleepers--;
        pthread_mutex_unlock(&pool.sleeping);
        looks = 0, since = now();
    }
    return NULL;
}

static void after_fork(void) { /* the child has one thread, and whatever state its parent's were in */
    pool.mine = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.sleeping = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.woken = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.started = pool.sleepers = 0;
    pool.offer = pool.open = 0;
}

/* The pool for this run, with as many threads as it wants if they can be had; 0 where another pass has it. */
static int enter(const Run *run) {
    static int forks;
    if (run->threads < 2 || pthread_mutex_trylock(&pool.mine))
        return 0;
    if (!forks)
        forks = 1, pthread_atfork(NULL, NULL, after_fork);
    for (; pool.started < run->threads - 1; pool.started++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(int64_t)(pool.started + 1)))
            break;
        pthread_detach(thread);
    }
    pool.run = run;
    pool.threads = run->threads;
    return 1;
}

/* All tasks of a step, the last first. */
static void all_of(Run *run, int shared, Step *step, int64_t tasks) {
    run->step = step;
    if (!shared || tasks < 2) {
        while (tasks--)
            step(run, tasks, run->room.mine);
        return;
    }
    pool.open = tasks;
    pool.offer = (((pool.offer >> 32) + 1) << 32) + tasks;
    if (pool.sleepers) {
        pthread_mutex_lock(&pool.sleeping);
        pthread_cond_broadcast(&pool.woken);
        pthread_mutex_unlock(&pool.sleeping);
    }
    while (take(0))
        ;
    for (int64_t looks = 1, since = 0; pool.open; looks++) {
        pause();
        if (looks % SPINS)
            continue;
        if (!since)
            since = now();
        else if (now() - since > PATIENCE) /* who gives its processor away is without one for milliseconds */
            sched_yield();
    }
}

/* Rows of weights as tasks: how many each has. */
ALWAYS int64_t rows_each(int64_t rows, int64_t width, int64_t n) {
    const int64_t chunk = CHUNK / (4 * width) / 8 * 8;
    const int64_t large = least(rows / 256 * 8, most_of(32, 16 * chunk)); /* as long as there are 32 tasks */
    return n > 1 ? ROWS : most_of(8, least(upto(rows, 8) * 8, most_of(chunk, large)));
}

/* Tokens of a block as the products want them. */
ALWAYS void point(const float **to, const float *x, int64_t step, int64_t from, int64_t n) {
    for (int64_t t = 0; t < n; t++)
        to[t] = x + (from + t) * step;
}

/* One task of y [N, rows] = x [N, width] by a matrix: some of its rows, by some of the tokens. */
typedef struct {
    int64_t each, parts, blocks; /* tasks are parts times blocks */
} Split;

ALWAYS Split split(int64_t rows, int64_t width, int64_t n) {
    if (!rows)
        return (Split){1, 0, 0};
    const int64_t each = rows_each(rows, width, n);
    return (Split){each, upto(rows, each), upto(n, TOGETHER)};
}

ALWAYS int64_t tasks_of(Split by) { return by.parts * by.blocks; }

static void linear_task(const Weight *w, int bf16, const float *x, int64_t n, float *y, Split by, int64_t task) {
    const int64_t from = task % by.parts * by.each, to = least(w->rows, from + by.each);
    const int64_t first = task / by.parts * TOGETHER, count = least(TOGETHER, n - first);
    const float *in[TOGETHER];
    float *out[TOGETHER];
    point(in, x, w->width, first, count);
    point((const float **)out, y, w->rows, first, count);
    product(w->at, bf16, w->width, in, count, from, to, out);
    if (bf16)
        for (int64_t t = 0; t < count; t++)
            round_all(out[t] + from, to - from, 1);
}

/* silu(gate) * up for some inner columns: both rows of each, by these tokens; out [t][I] */
static void gated(const Weight *w, int bf16, int64_t base, int64_t inner, int64_t from, int64_t to, const float **in,
                  int64_t n, float **out, float *own) {
    float *gate[TOGETHER], *up[TOGETHER];
    const int64_t count = to - from;
    for (int64_t t = 0; t < n; t++) {
        gate[t] = own + 2 * t * count - (base + from);
        up[t] = own + (2 * t + 1) * count - (base + inner + from);
    }
    product(w->at, bf16, w->width, in, n, base + from, base + to, gate);
    product(w->at, bf16, w->width, in, n, base + inner + from, base + inner + to, up);
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < count; i++) {
            const float a = rounded(own[2 * t * count + i], bf16), b = rounded(own[(2 * t + 1) * count + i], bf16);
            out[t][from + i] = rounded(rounded(a / (1.0f + exponential(-a)), bf16) * b, bf16);
        }
}

/* ---- attention ---- */

ALWAYS void *const *parts_in(const Pass *pass, int64_t layer) {
    return pass->cache.pool + layer * (parts_of(&pass->cache.form.latent) + parts_of(&pass->cache.form.rope));
}

ALWAYS int64_t first_row(const Pass *pass, int64_t b, int64_t block) {
    return pass->cache.table[b * pass->cache.most + block] * BLOCK;
}

ALWAYS uint16_t *wide_row(const Pass *pass, int64_t layer, int64_t b, int64_t position, int64_t width) {
    return (uint16_t *)pass->cache.windows[layer * pass->sequences + b] + position % pass->cache.recent * width;
}

/* Normed latent and turned key of token i, put into the cache. */
static void keep(const Net *net, const Layer *l, const Pass *pass, const Room *room, int64_t layer, int64_t i) {
    const int64_t b = i / pass->new, at = pass->cache.before[b] + i % pass->new, width = net->latent + net->rope;
    const float *from = room->down + i * l->down.rows + l->down.rows - width;
    const Form *form = &pass->cache.form;
    void *const *parts = parts_in(pass, layer);
    float *row = room->row + i * width;
    norm(from, l->kv_norm, net->latent, net->eps, net->bf16, row);
    memcpy(row + net->latent, from + net->latent, 4 * net->rope);
    turn(row + net->latent, pass->rotations + i * net->rope, net->rope, net->bf16);
    const int64_t to = first_row(pass, b, at / BLOCK) + at % BLOCK;
    pack_vector(&form->latent, row, parts, to);
    pack_vector(&form->rope, row + form->latent.width, parts + parts_of(&form->latent), to);
    if (pass->cache.recent && at >= pass->cache.since[b])
        for (int64_t k = 0; k < width; k++)
            wide_row(pass, layer, b, at, width)[k] = to_half(row[k]);
}

/* The rows of a block of sequence b as they are read: where they are, or in fp32 in `own`. */
static const void *keys_of(const Run *run, int64_t b, int64_t start, int64_t count, float *own) {
    const Net *net = run->net;
    const Pass *pass = run->pass;
    const Codec *latent = &pass->cache.form.latent, *rope = &pass->cache.form.rope;
    const int64_t width = net->latent + net->rope, first = first_row(pass, b, start / BLOCK);
    void *const *parts = parts_in(pass, run->layer);
    if (pass->cache.in_place)
        return (const char *)parts[0] + first * part_bytes(latent, 0);
    const int64_t packed = pass->cache.recent ? least(count, most_of(0, pass->cache.since[b] - start)) : count;
    unpack_vectors(latent, parts, first, packed, own, width, net->bf16);
    unpack_vectors(rope, parts + parts_of(latent), first, packed, own + latent->width, width, net->bf16);
    for (int64_t r = packed; r < count; r++) {
        const uint16_t *wide = wide_row(pass, run->layer, b, start + r, width);
        for (int64_t k = 0; k < width; k++)
            own[r * width + k] = from_half(wide[k]);
    }
    return own;
}

/* Scores of one query with a block of keys, of which it sees `seen`, become weights; what was summed before by weights
that were relative to a smaller score is scaled down. */
static void weigh(float *s, int64_t seen, float scale, int64_t width, float *largest, float *sum, float *out) {
    if (seen <= 0) {
        memset(s, 0, 4 * BLOCK);
        return;
    }
    for (int64_t k = seen; k < BLOCK; k++)
        s[k] = -INFINITY;
    Lanes most = all(-INFINITY), added = {0};
    for (int64_t k = 0; k < BLOCK; k += 16) {
        const Lanes scaled = load(s, k, 0) * all(scale);
        most = larger(most, scaled);
        memcpy(s + k, &scaled, 64);
    }
    float high = *largest;
    for (int64_t k = 0; k < 16; k++)
        high = most[k] > high ? most[k] : high;
    for (int64_t k = 0; k < BLOCK; k++)
        s[k] = exponential(s[k] - high);
    for (int64_t k = seen; k < BLOCK; k++)
        s[k] = 0;
    for (int64_t k = 0; k < BLOCK; k += 16)
        added += load(s, k, 0);
    if (high > *largest) {
        const float kept = *largest > -INFINITY ? exponential(*largest - high) : 0.0f;
        *sum *= kept;
        for (int64_t c = 0; c < width; c++)
            out[c] *= kept;
        *largest = high;
    }
    *sum += total(added);
}

/* Some heads of the tokens from, ..., to - 1 of sequence b: their queries, lifted into the latent, over the cache, and
back to values. Query q is of head `first_head + q / n` and token `from + q % n`. */
static void heads_task(const Run *run, int64_t b, int64_t first_head, int64_t heads, int64_t from, int64_t to, float *own) {
    const Net *net = run->net;
    const Pass *pass = run->pass;
    const Layer *l = net->layer + run->layer;
    const int64_t n = to - from, C = net->latent, W = C + net->rope, asked = net->content + net->rope;
    const int64_t first = b * pass->new + from, per_head = net->content + net->value, bf16 = net->bf16;
    const int64_t queries = heads * n, past = pass->cache.before[b] + from; /* position of the first of these tokens */
    const char *up = (const char *)l->kv_up.at + first_head * per_head * C * (bf16 ? 2 : 4);
    float *query = own, *lifted = query + QUERIES * asked, *scores = lifted + QUERIES * W, *out = scores + QUERIES * BLOCK;
    float *largest = out + QUERIES * C, *sums = largest + QUERIES, *keys = sums + QUERIES;
    const int narrow = pass->cache.in_place && pass->cache.form.latent.kind == BF16;
    const float *in[QUERIES];
    float *ends[QUERIES];
    memset(lifted, 0, 4 * queries * W);
    memset(out, 0, 4 * queries * C);
    for (int64_t h = 0; h < heads; h++) {
        const int64_t row = (first_head + h) * asked;
        float *mine = query + h * n * asked;
        if (l->q_up.at) {
            point(in, run->room.query, l->q_up.width, first, n);
            for (int64_t t = 0; t < n; t++)
                ends[t] = mine + t * asked - row;
            product(l->q_up.at, bf16, l->q_up.width, in, n, row, row + asked, ends);
            round_all(mine, n * asked, bf16);
        } else
            for (int64_t t = 0; t < n; t++)
                memcpy(mine + t * asked, run->room.down + (first + t) * l->down.rows + row, 4 * asked);
        mix(mine, asked, n, up + h * per_head * C * (bf16 ? 2 : 4), bf16, C, net->content, C, lifted + h * n * W, W);
    }
    for (int64_t q = 0; q < queries; q++) {
        float *position = query + q * asked + net->content;
        round_all(lifted + q * W, C, bf16);
        turn(position, pass->rotations + (first + q % n) * net->rope, net->rope, bf16);
        memcpy(lifted + q * W + C, position, 4 * net->rope);
        largest[q] = -INFINITY, sums[q] = 0;
        in[q] = lifted + q * W, ends[q] = scores + q * BLOCK;
    }
    for (int64_t start = 0; start < past + n; start += BLOCK) {
        const int64_t count = least(BLOCK, past + n - start);
        const void *rows = keys_of(run, b, start, count, keys);
        product(rows, narrow, W, in, queries, 0, count, ends);
        for (int64_t q = 0; q < queries; q++)
            weigh(ends[q], least(count, past + q % n + 1 - start), net->scale, C, largest + q, sums + q, out + q * C);
        mix(scores, BLOCK, queries, rows, narrow, W, count, C, out, C);
    }
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t t = 0; t < n; t++) {
            float *one = out + (h * n + t) * C;
            for (int64_t c = 0; c < C; c++)
                one[c] = rounded(one[c] / sums[h * n + t], bf16);
            in[t] = one;
            ends[t] = run->room.z + ((first + t) * net->heads + first_head + h) * net->value;
        }
        const char *values = up + (h * per_head + net->content) * C * (bf16 ? 2 : 4);
        product(values, bf16, C, in, n, 0, net->value, ends);
        for (int64_t t = 0; t < n; t++)
            round_all(ends[t], net->value, bf16);
    }
}

static void norm_step(const Run *run, int64_t i, float *own) {
    const Net *net = run->net;
    norm(run->pass->x + i * net->hidden, net->layer[run->layer].attention_norm, net->hidden, net->eps, net->bf16,
         run->room.normed + i * net->hidden);
}

static void down_step(const Run *run, int64_t task, float *own) {
    const Weight *w = &run->net->layer[run->layer].down;
    const Split by = split(w->rows, w->width, run->tokens);
    linear_task(w, run->net->bf16, run->room.normed, run->tokens, run->room.down, by, task);
}

static void keep_step(const Run *run, int64_t i, float *own) {
    const Net *net = run->net;
    const Layer *l = net->layer + run->layer;
    if (l->q_up.at)
        norm(run->room.down + i * l->down.rows, l->q_norm, l->q_up.width, net->eps, net->bf16,
             run->room.query + i * l->q_up.width);
    keep(net, l, run->pass, &run->room, run->layer, i);
}

static void project(Run *run, int shared) {
    const Weight *w = &run->net->layer[run->layer].down;
    all_of(run, shared, norm_step, run->tokens);
    all_of(run, shared, down_step, tasks_of(split(w->rows, w->width, run->tokens)));
    all_of(run, shared, keep_step, run->tokens);
}

/* ---- experts ---- */

/* Probabilities, groups, the best, gates: `ops.route`. */
static void choose(const Net *net, const Pass *pass, float *probs, int64_t mixture, int64_t i) {
    const int64_t n = pass->sequences * pass->new, E = net->experts, K = net->chosen;
    int64_t *ids = pass->ids + (mixture * n + i) * K;
    float *gates = pass->gates + (mixture * n + i) * K, *scores = pass->scores + (mixture * n + i) * (K + 1);
    float high = -INFINITY, sum = 0;
    for (int64_t e = 0; e < E; e++)
        high = probs[e] > high ? probs[e] : high;
    for (int64_t e = 0; e < E; e++)
        sum += probs[e] = exponential(probs[e] - high);
    for (int64_t e = 0; e < E; e++)
        probs[e] /= sum;
    if (net->groups) {
        const int64_t size = E / net->groups;
        float best[net->groups];
        for (int64_t g = 0; g < net->groups; g++) {
            best[g] = probs[g * size];
            for (int64_t e = 1; e < size; e++)
                best[g] = probs[g * size + e] > best[g] ? probs[g * size + e] : best[g];
        }
        for (int64_t k = 0; k < net->kept; k++) {
            int64_t at = 0;
            for (int64_t g = 1; g < net->groups; g++)
                at = best[g] > best[at] ? g : at;
            best[at] = -1; /* it stays */
        }
        for (int64_t g = 0; g < net->groups; g++)
            if (best[g] >= 0)
                memset(probs + g * size, 0, 4 * size);
    }
    float chosen = 0;
    for (int64_t k = 0; k <= K; k++) {
        int64_t at = 0;
        for (int64_t e = 1; e < E; e++)
            at = probs[e] > probs[at] ? e : at;
        scores[k] = k < E ? probs[at] : 0.0f;
        if (k == K)
            break;
        ids[k] = at;
        chosen += probs[at];
        probs[at] = -1;
    }
    for (int64_t k = 0; k < K; k++)
        gates[k] = net->normed && K > 1 ? scores[k] / (chosen + 1e-20f) : scores[k] * net->factor;
}

/* Which choices, i * K + k, each expert has: `order`, those of expert e from `first[e]` on. */
static void sort(const Net *net, const int64_t *ids, int64_t choices, const Room *room) {
    memset(room->first, 0, 8 * (net->experts + 1));
    for (int64_t c = 0; c < choices; c++)
        room->first[ids[c] + 1]++;
    for (int64_t e = 0; e < net->experts; e++)
        room->first[e + 1] += room->first[e];
    int64_t next[net->experts];
    memcpy(next, room->first, 8 * net->experts);
    for (int64_t c = 0; c < choices; c++)
        room->order[next[ids[c]]++] = c;
}

typedef struct { /* a task of the experts: rows of one of them, by the tokens that chose it, some at a time */
    int64_t expert, from, to, first, count;
} Piece;

/* The task of that number; of no expert where there are fewer, and then `first` says how many. */
static Piece piece(const Run *run, int64_t rows, int64_t each, int64_t task) {
    const int64_t parts = upto(rows, each), *first = run->room.first;
    int64_t before = 0;
    for (int64_t e = 0; e < run->net->experts; e++) {
        const int64_t count = first[e + 1] - first[e], tasks = parts * upto(count, TOGETHER);
        if (task < before + tasks) {
            const int64_t from = (task - before) % parts * each, begin = (task - before) / parts * TOGETHER;
            return (Piece){e, from, least(rows, from + each), first[e] + begin, least(TOGETHER, count - begin)};
        }
        before += tasks;
    }
    return (Piece){-1, 0, 0, before, 0};
}

static void router_step(const Run *run, int64_t task, float *own) {
    const Net *net = run->net;
    const int64_t first = task * TOGETHER, count = least(TOGETHER, run->tokens - first);
    const float *in[TOGETHER];
    float *out[TOGETHER];
    point(in, run->room.normed, net->hidden, first, count);
    point((const float **)out, run->room.probs, net->experts, first, count);
    product(net->layer[run->layer].router.at, net->bf16, net->hidden, in, count, 0, net->experts, out);
    for (int64_t t = 0; t < count; t++)
        choose(net, run->pass, out[t], run->mixture, first + t);
}

/* Both feed-forward steps: tasks of the dense or shared part, if there is one, then those of the experts. */
static void inner_step(const Run *run, int64_t task, float *own) {
    const Net *net = run->net;
    const Layer *l = net->layer + run->layer;
    const Room *room = &run->room;
    const int64_t n = run->tokens, D = net->hidden, shared = l->gate_up.rows / 2, I = l->experts_down.width;
    const Split by = split(shared, D, n);
    const float *in[TOGETHER];
    float *out[TOGETHER];
    if (task < tasks_of(by)) {
        const int64_t from = task % by.parts * by.each, first = task / by.parts * TOGETHER;
        const int64_t count = least(TOGETHER, n - first);
        point(in, room->normed, D, first, count);
        point((const float **)out, room->inner, shared, first, count);
        gated(&l->gate_up, net->bf16, 0, shared, from, least(shared, from + by.each), in, count, out, own);
        return;
    }
    const Piece p = piece(run, I, rows_each(I, D, n), task - tasks_of(by));
    for (int64_t t = 0; t < p.count; t++) {
        in[t] = room->normed + room->order[p.first + t] / net->chosen * D;
        out[t] = room->one + (p.first + t) * I;
    }
    gated(&l->experts_up, net->bf16, p.expert * 2 * I, I, p.from, p.to, in, p.count, out, own);
}

static void outer_step(const Run *run, int64_t task, float *own) {
    const Net *net = run->net;
    const Layer *l = net->layer + run->layer;
    const Room *room = &run->room;
    const int64_t n = run->tokens, D = net->hidden, I = l->experts_down.width;
    const Split by = split(l->shut.rows, l->shut.width, n);
    const float *in[TOGETHER];
    float *out[TOGETHER];
    if (task < tasks_of(by)) {
        linear_task(&l->shut, net->bf16, room->inner, n, room->added, by, task);
        return;
    }
    const Piece p = piece(run, D, rows_each(D, I, n), task - tasks_of(by));
    for (int64_t t = 0; t < p.count; t++) {
        in[t] = room->one + (p.first + t) * I;
        out[t] = room->outputs + room->order[p.first + t] * D - p.expert * D;
    }
    product(l->experts_down.at, net->bf16, I, in, p.count, p.expert * D + p.from, p.expert * D + p.to, out);
    for (int64_t t = 0; t < p.count; t++)
        round_all(out[t] + p.expert * D + p.from, p.to - p.from, net->bf16);
}

static void sum_step(const Run *run, int64_t i, float *own) {
    const Net *net = run->net;
    const Layer *l = net->layer + run->layer;
    const int64_t D = net->hidden, K = net->chosen;
    float *x = run->pass->x + i * D;
    const float *gates = run->pass->gates + (run->mixture * run->tokens + i) * K, *added = run->room.added + i * D;
    const float *outputs = run->room.outputs + i * K * D;
    for (int64_t d = 0; d < D; d++) {
        float sum = 0;
        if (l->router.at) {
            for (int64_t k = 0; k < K; k++)
                sum += gates[k] * outputs[k * D + d];
            sum = rounded(sum, net->bf16);
        }
        if (l->gate_up.at)
            sum = rounded(sum + added[d], net->bf16);
        x[d] = rounded(x[d] + sum, net->bf16);
    }
}

static void feed(Run *run, int shared) {
    const Net *net = run->net;
    const Layer *l = net->layer + run->layer;
    const int64_t n = run->tokens, D = net->hidden, I = l->experts_down.width;
    int64_t inner = tasks_of(split(l->gate_up.rows / 2, D, n)), outer = tasks_of(split(l->shut.rows, l->shut.width, n));
    if (l->router.at) {
        all_of(run, shared, router_step, upto(n, TOGETHER));
        sort(net, run->pass->ids + run->mixture * n * net->chosen, n * net->chosen, &run->room);
        inner += piece(run, I, rows_each(I, D, n), INT64_MAX).first;
        outer += piece(run, D, rows_each(D, I, n), INT64_MAX).first;
    }
    all_of(run, shared, inner_step, inner);
    all_of(run, shared, outer_step, outer);
    all_of(run, shared, sum_step, n);
}

/* ---- a layer, after its rows are in the cache ---- */

/* Heads that read the cache together: of a single token some, so that a row is read once for them; where rows have to
be unpacked, as many as may be, as long as every thread has a task. */
ALWAYS int64_t heads_each(const Run *run) {
    const Pass *pass = run->pass;
    const int64_t heads = run->net->heads, groups = pass->sequences < 4 * run->threads ? run->threads : 1;
    if (pass->cache.in_place)
        return pass->new == 1 ? least(4, heads) : 1;
    return most_of(1, least(upto(heads, groups), QUERIES / least(pass->new, QUERIES)));
}

ALWAYS int64_t heads_tasks(const Run *run) {
    return run->pass->sequences * upto(run->pass->new, QUERIES) * upto(run->net->heads, heads_each(run));
}

static void heads_step(const Run *run, int64_t task, float *own) {
    const int64_t each = heads_each(run), groups = upto(run->net->heads, each), blocks = upto(run->pass->new, QUERIES);
    const int64_t head = task % groups * each, from = task / groups % blocks * QUERIES;
    heads_task(run, task / groups / blocks, head, least(each, run->net->heads - head), from,
               least(run->pass->new, from + QUERIES), own);
}

static void out_step(const Run *run, int64_t task, float *own) {
    const Weight *w = &run->net->layer[run->layer].out;
    linear_task(w, run->net->bf16, run->room.z, run->tokens, run->room.added, split(w->rows, w->width, run->tokens), task);
}

static void add_step(const Run *run, int64_t i, float *own) {
    const Net *net = run->net;
    float *x = run->pass->x + i * net->hidden;
    for (int64_t d = 0; d < net->hidden; d++)
        x[d] = rounded(x[d] + run->room.added[i * net->hidden + d], net->bf16);
    norm(x, net->layer[run->layer].mlp_norm, net->hidden, net->eps, net->bf16, run->room.normed + i * net->hidden);
}

static void rest(Run *run, int shared) {
    const Weight *w = &run->net->layer[run->layer].out;
    all_of(run, shared, heads_step, heads_tasks(run));
    all_of(run, shared, out_step, tasks_of(split(w->rows, w->width, run->tokens)));
    all_of(run, shared, add_step, run->tokens);
    feed(run, shared);
}

static void last_step(const Run *run, int64_t i, float *own) {
    const Net *net = run->net;
    const int64_t new = run->pass->new, token = run->pass->every ? i : i * new + new - 1;
    norm(run->pass->x + token * net->hidden, net->norm, net->hidden, net->eps, net->bf16,
         run->room.normed + i * net->hidden);
}

static void logits_step(const Run *run, int64_t task, float *own) {
    const Weight *w = &run->net->head;
    const int64_t n = run->pass->every ? run->tokens : run->pass->sequences;
    linear_task(w, run->net->bf16, run->room.normed, n, run->pass->logits, split(w->rows, w->width, n), task);
}

static void unembed(Run *run, int shared) {
    const Weight *w = &run->net->head;
    const int64_t n = run->pass->every ? run->tokens : run->pass->sequences;
    all_of(run, shared, last_step, n);
    all_of(run, shared, logits_step, tasks_of(split(w->rows, w->width, n)));
}

/* Floats for `threads` threads and n tokens, in parts that begin at multiples of 16. */
static int64_t arrange(const Net *net, int64_t n, int threads, float *at, Room *room) {
    int64_t down = 0, query = 0, inner = 0, one = 0, used = 0;
    for (const Layer *l = net->layer; l < net->layer + net->layers; l++) {
        down = most_of(down, l->down.rows);
        query = most_of(query, l->q_up.at ? l->q_up.width : 0);
        inner = most_of(inner, l->gate_up.rows / 2);
        one = most_of(one, l->experts_down.width);
    }
    const int64_t asked = net->content + net->rope, W = net->latent + net->rope;
    const int64_t head = QUERIES * (asked + W + BLOCK + net->latent + 2) + BLOCK * W;
    room->private = upto(most_of(head, most_of(2 * TOGETHER * ROWS, CHUNK / 2)), 16) * 16;
#define PART(name, count) room->name = at + used, used += upto(count, 16) * 16
    PART(normed, n * net->hidden);
    PART(down, n * down);
    PART(query, n * query);
    PART(row, n * W);
    PART(z, n * net->heads * net->value);
    PART(added, n * net->hidden);
    PART(inner, n * inner);
    PART(probs, n * net->experts);
    PART(one, n * net->chosen * one);
    PART(outputs, n * net->chosen * net->hidden);
    PART(mine, threads * room->private);
    room->order = (int64_t *)(at + used), used += upto(2 * n * net->chosen, 16) * 16;
    room->first = (int64_t *)(at + used), used += upto(2 * (net->experts + 1), 16) * 16;
    return used;
}

/* ---- what is called ---- */

int64_t fused_room(const Net *net, int64_t tokens, int threads) {
    Room room;
    return arrange(net, tokens, threads, NULL, &room);
}

/* `at`: as many floats as `fused_room` says. */
void fused_pass(const Net *net, const Pass *pass, float *at, int threads) {
    Run run = {.net = net, .pass = pass, .tokens = pass->sequences * pass->new, .threads = least(threads, THREADS)};
    arrange(net, run.tokens, threads, at, &run.room);
    const int shared = enter(&run);
    for (run.layer = 0; run.layer < net->layers; run.layer++) {
        project(&run, shared);
        rest(&run, shared);
        run.mixture += net->layer[run.layer].router.at != NULL;
    }
    unembed(&run, shared);
    if (shared)
        pthread_mutex_unlock(&pool.mine);
}
