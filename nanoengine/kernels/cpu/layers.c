/* What is between the products of a layer, for float32: the norm of the residual stream, and the attention of rows of
 * one token over a paged cache. A result does not depend on the number of rows or threads. */
#include <stdlib.h>

#include "lanes.h"

enum { FEW = 1 << 13, MOST = 16 }; /* elements that one thread does alone; vectors of a head: up to 256 elements */

typedef struct {
    const float *x, *residual, *weight;
    float *total, *y;
    int64_t rows, width;
    float eps;
} norm_t;

static void norm_body(void *data, int thread, int threads) {
    const norm_t *p = data;
    for (int64_t row = p->rows * thread / threads; row < p->rows * (thread + 1) / threads; row++) {
        const float *x = p->x + row * p->width;
        float *y = p->y + row * p->width;
        if (p->residual) {
            float *total = p->total + row * p->width;
            for (int64_t i = 0; i < p->width; i++) total[i] = x[i] + p->residual[row * p->width + i];
            x = total;
        }
        int64_t whole = p->width / LANES * LANES;
        f16 sum = f_set(0);
        for (int64_t i = 0; i < whole; i += LANES) sum = f_fma(f_load(x + i), f_load(x + i), sum);
        float all = f_sum(sum);
        for (int64_t i = whole; i < p->width; i++) all += x[i] * x[i];
        float scale = 1.0f / sqrtf(all / (float)p->width + p->eps);
        for (int64_t i = 0; i < p->width; i++) y[i] = x[i] * scale * p->weight[i];
    }
}

/* total = x + residual, y = total / rms(total) * weight: all [rows, width]. Without a residual x is the total. */
void ne_add_rms_norm(const float *x, const float *residual, const float *weight, float eps, int64_t rows, int64_t width,
                     float *total, float *y, int threads) {
    norm_t p = {x, residual, weight, total, y, rows, width, eps};
    ne_parallel(norm_body, &p, rows * width < FEW ? 1 : threads);
}

/* One layer's attention of rows of one token each. */
typedef struct {
    const float *qkv;            /* [rows, heads + 2 kv_heads, size] */
    const float *cos, *sin;      /* [rows, rotated], sin negative for the first of each pair; null: nothing is rotated */
    const float *q_norm, *k_norm; /* [size], or null */
    float *k, *v;                /* the caches [blocks, kv_heads, block_size, size] */
    const int32_t *tables;       /* [rows, table_width], blocks of each row */
    const int32_t *lens;         /* [rows], with the new token */
    const int64_t *slots;        /* [rows], where the new token goes */
    const float *sinks;          /* [heads], or null */
    float *out;                  /* [rows, heads, size] */
    int64_t rows, heads, kv_heads, size, block_size, table_width, rotated, window; /* window 0: all keys */
    int64_t interleaved;
    float eps, scale, cap; /* cap 0: none */
} attend_t;

typedef struct {
    const attend_t *p;
    float *q, *scores; /* [rows, heads, size], rotated; [threads, heads of a KV head, longest] */
    int64_t longest;
    int ready;
} attending_t;

static void turn(const attend_t *p, const float *x, const float *norm, int64_t row, float *to) {
    float scale = 1.0f;
    if (norm) {
        f16 sum = f_set(0);
        for (int64_t i = 0; i < p->size; i += LANES) sum = f_fma(f_load(x + i), f_load(x + i), sum);
        scale = 1.0f / sqrtf(f_sum(sum) / (float)p->size + p->eps);
    }
    float own[MOST * LANES];
    for (int64_t i = 0; i < p->size; i++) own[i] = norm ? x[i] * scale * norm[i] : x[i];
    int64_t rotated = p->cos ? p->rotated : 0, half = rotated / 2;
    const float *cos = p->cos + row * p->rotated, *sin = p->sin + row * p->rotated;
    if (p->interleaved)
        for (int64_t i = 0; i < rotated; i++) to[i] = own[i] * cos[i] + own[i ^ 1] * sin[i];
    else {
        for (int64_t i = 0; i < half; i++) to[i] = own[i] * cos[i] + own[i + half] * sin[i];
        for (int64_t i = half; i < rotated; i++) to[i] = own[i] * cos[i] + own[i - half] * sin[i];
    }
    for (int64_t i = rotated; i < p->size; i++) to[i] = own[i];
}

/* Norms, rotation, and K and V of the new token to the cache. */
static void store(const attending_t *a, int64_t row) {
    const attend_t *p = a->p;
    const float *x = p->qkv + row * (p->heads + 2 * p->kv_heads) * p->size;
    for (int64_t h = 0; h < p->heads; h++, x += p->size)
        turn(p, x, p->q_norm, row, a->q + (row * p->heads + h) * p->size);
    int64_t block = p->slots[row] / p->block_size, offset = p->slots[row] % p->block_size;
    for (int64_t h = 0; h < p->kv_heads; h++, x += p->size) {
        int64_t to = ((block * p->kv_heads + h) * p->block_size + offset) * p->size;
        turn(p, x, p->k_norm, row, p->k + to);
        memcpy(p->v + to, x + p->kv_heads * p->size, (size_t)p->size * sizeof(float));
    }
}

/* Weights of the keys in place of their scores; returns 1 / their sum. */
static float softmax(float *scores, int64_t count, const float *sink) {
    float most = sink ? *sink : -INFINITY, sums[LANES] = {0};
    for (int64_t i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += scores[i + j] = exp1(scores[i + j] - most);
    for (; i < count; i++) sums[0] += scores[i] = exp1(scores[i] - most);
    float sum = sink ? exp1(*sink - most) : 0;
    for (int j = 0; j < LANES; j++) sum += sums[j];
    return 1.0f / sum;
}

/* A row's heads first to first + count of one KV head; `vectors` of a head and `count` are constants. */
INLINE void heads(const attending_t *a, int64_t row, int64_t first, const int count, const int vectors, float *scores) {
    const attend_t *p = a->p;
    int64_t kv = first / (p->heads / p->kv_heads), last = p->lens[row], begin = 0;
    const int32_t *table = p->tables + row * p->table_width;
    if (p->window && last > p->window) begin = last - p->window;
    const float *q = a->q + (row * p->heads + first) * p->size;
    int64_t head_bytes = p->block_size * p->size;
    for (int64_t key = begin; key < last;) {
        int64_t stop = (key / p->block_size + 1) * p->block_size;
        const float *k = p->k + (table[key / p->block_size] * p->kv_heads + kv) * head_bytes + key % p->block_size * p->size;
        for (stop = stop < last ? stop : last; key < stop; key++, k += p->size) {
            f16 sums[count];
            for (int h = 0; h < count; h++) sums[h] = f_set(0);
            for (int i = 0; i < vectors; i++) {
                f16 part = f_load(k + i * LANES);
                for (int h = 0; h < count; h++) sums[h] = f_fma(part, f_load(q + h * p->size + i * LANES), sums[h]);
            }
            for (int h = 0; h < count; h++) scores[h * a->longest + key - begin] = f_sum(sums[h]) * p->scale;
        }
    }
    float inverse[count];
    for (int h = 0; h < count; h++) {
        float *mine = scores + h * a->longest;
        if (p->cap > 0)
            for (int64_t i = 0; i < last - begin; i++)
                mine[i] = p->cap * (1.0f - 2.0f / (exp1(2.0f * mine[i] / p->cap) + 1.0f));
        inverse[h] = softmax(mine, last - begin, p->sinks ? p->sinks + first + h : NULL);
    }
    f16 mixed[count * vectors];
    for (int i = 0; i < count * vectors; i++) mixed[i] = f_set(0);
    for (int64_t key = begin; key < last;) {
        int64_t stop = (key / p->block_size + 1) * p->block_size;
        const float *v = p->v + (table[key / p->block_size] * p->kv_heads + kv) * head_bytes + key % p->block_size * p->size;
        for (stop = stop < last ? stop : last; key < stop; key++, v += p->size)
            for (int i = 0; i < vectors; i++) {
                f16 part = f_load(v + i * LANES);
                for (int h = 0; h < count; h++)
                    mixed[h * vectors + i] = f_fma(part, f_set(scores[h * a->longest + key - begin]), mixed[h * vectors + i]);
            }
    }
    float *out = p->out + (row * p->heads + first) * p->size;
    for (int h = 0; h < count; h++)
        for (int i = 0; i < vectors; i++) f_store(out + h * p->size + i * LANES, f_mul(mixed[h * vectors + i], f_set(inverse[h])));
}

#define HEADS(count)                                                                                     \
    static void heads_##count(const attending_t *a, int64_t row, int64_t first, float *scores) {         \
        switch (a->p->size / LANES) {                                                                    \
        case 4: heads(a, row, first, count, 4, scores); break;                                           \
        case 8: heads(a, row, first, count, 8, scores); break;                                           \
        default: heads(a, row, first, count, (int)(a->p->size / LANES), scores);                         \
        }                                                                                                \
    }
HEADS(1)
HEADS(2)
HEADS(3)

static void attend_body(void *data, int thread, int threads) {
    const attending_t *a = data;
    const attend_t *p = a->p;
    if (!a->ready) {
        for (int64_t row = thread; row < p->rows; row += threads) store(a, row);
        ne_barrier(threads);
    }
    /* heads of a KV head together, so that its keys are read once; single ones where threads would be left idle */
    int64_t group = p->heads / p->kv_heads, step = group % 3 == 0 ? 3 : group % 2 == 0 ? 2 : 1;
    if (p->rows * (p->heads / step) % threads && p->rows * (p->heads / step) < 4 * threads) step = 1;
    int64_t units = p->rows * (p->heads / step);
    float *scores = a->scores + thread * 3 * a->longest;
    for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; unit++) {
        int64_t row = unit / (p->heads / step), first = unit % (p->heads / step) * step;
        if (step == 3) heads_3(a, row, first, scores);
        else if (step == 2) heads_2(a, row, first, scores);
        else heads_1(a, row, first, scores);
    }
}

/* Stores the new tokens' K and V, and attends. Returns 0, or 1: there is no memory. size: a multiple of 16, up to 256. */
int ne_attend(const attend_t *p, int threads) {
    int64_t longest = 0;
    for (int64_t row = 0; row < p->rows; row++) longest = p->lens[row] > longest ? p->lens[row] : longest;
    longest = (longest + LANES - 1) / LANES * LANES;
    int64_t q = p->rows * p->heads * p->size;
    float *memory = malloc((size_t)(q + threads * 3 * longest) * sizeof(float));
    if (!memory) return 1;
    attending_t a = {p, memory, memory + q, longest, 0};
    if (q <= FEW || threads == 1) {
        for (int64_t row = 0; row < p->rows; row++) store(&a, row);
        a.ready = 1;
    }
    ne_parallel(attend_body, &a, threads);
    free(memory);
    return 0;
}
