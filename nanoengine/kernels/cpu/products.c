/* Products of float rows with quantised weights, whose codes and scales lie in tiles of 16 outputs (see `tiles.py`).
 *
 * A row of x is quantised to signed bytes with a scale for each 32 inputs: d = max|x| / 127, q = round(x * (127 / max)).
 * Sums within a block are exact integers; blocks are summed in float32, in order, one output row a lane: a result does
 * not depend on the number of rows or threads.
 */
#include <stdlib.h>

#include "products.h"

enum { TILE = 8, CHUNK_BYTES = 1 << 18, FEW = 1 << 13, AHEAD = 8192 };

/* Rows of x, quantised. extra: float sums d * sum(q) a block where a kind has minima; else int32 -offset * sum(q), one
 * for each scale. */
typedef struct {
    int8_t *q;
    float *d;
    int32_t *extra;
    int64_t inputs, blocks, extras;
} rows_t;

typedef struct {
    const float *x, *norm, *bias, *add;
    const uint8_t *tiles;
    float *y;
    int64_t rows, inputs, outputs;
    float eps;
    int kind, gate, ready;
    rows_t quantised;
} product_t;

static void quantise(const float *x, int8_t *q, float *d, int32_t *extra, int64_t blocks, kind_t k) {
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, q += BLOCK) {
        int32_t bits[BLOCK], most = 0, codes_of[BLOCK];
        memcpy(bits, x, sizeof bits);
        for (int i = 0; i < BLOCK; i++) {
            int32_t magnitude = bits[i] & 0x7fffffff; /* as integers: what is no number is more than infinity */
            most = magnitude > most ? magnitude : most;
        }
        float largest;
        memcpy(&largest, &most, 4);
        float inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
        for (int i = 0; i < BLOCK; i++) codes_of[i] = round1(x[i] * inverse);
        if (most >= 0x7f800000) { /* the block's products are no numbers, and a failure is seen in the logits */
            for (int i = 0; i < BLOCK; i++) codes_of[i] = 0;
            inverse = NAN;
        }
        int32_t first = 0, second = 0;
        for (int i = 0; i < BLOCK / 2; i++) first += codes_of[i];
        for (int i = BLOCK / 2; i < BLOCK; i++) second += codes_of[i];
        for (int i = 0; i < BLOCK; i++) q[i] = (int8_t)codes_of[i];
        d[b] = most >= 0x7f800000 ? NAN : inverse == 0.0f ? 0.0f : largest / 127.0f;
        if (k.minimum) {
            float sum = d[b] * (float)(first + second) * (float)k.minimum;
            memcpy(extra + b, &sum, 4);
        } else if (k.each == BLOCK) {
            extra[b] = k.bits == 8 && SIGNED_BYTES ? 0 : -k.offset * (first + second);
        } else {
            extra[2 * b] = -k.offset * first, extra[2 * b + 1] = -k.offset * second;
        }
    }
}

static void prepare(product_t *p, int64_t row, float *normed) {
    kind_t k = kinds[p->kind];
    const float *x = p->x + row * p->inputs;
    rows_t *to = &p->quantised;
    if (p->norm) {
        f16 sum = f_set(0);
        for (int64_t i = 0; i < p->inputs; i += LANES) {
            f16 v = f_load(x + i);
            sum = f_fma(v, v, sum);
        }
        f16 scale = f_set(1.0f / sqrtf(f_sum(sum) / (float)p->inputs + p->eps));
        for (int64_t i = 0; i < p->inputs; i += LANES)
            f_store(normed + i, f_mul(f_mul(f_load(x + i), scale), f_load(p->norm + i)));
        x = normed;
    }
    quantise(x, to->q + row * p->inputs, to->d + row * to->blocks, to->extra + row * to->extras, to->blocks, k);
}

/* sums[t] = the products of 16 outputs with rows first to first + count of x; count and k are constants. */
INLINE void tile(const kind_t k, const int count, const uint8_t *w, const rows_t *x, int64_t first, f16 *sums) {
    const places_t at = places(k, x->blocks);
    const int8_t *q = x->q + first * x->inputs;
    const float *d = x->d + first * x->blocks;
    const int32_t *extra = x->extra + first * x->extras;
    for (int t = 0; t < count; t++) sums[t] = f_set(0);
    for (int64_t b = 0; b < x->blocks; b++, q += BLOCK) {
        codes v[8];
        for (int line = 0; line < (k.bits == 8 ? 8 : 4); line++) /* tiles follow each other: the next ones */
            __builtin_prefetch(w + b * (k.bits == 8 ? 512 : 256) + AHEAD + 64 * line);
        if (k.bits == 8) {
            for (int i = 0; i < 8; i++) v[i] = c_bytes(w + b * 512 + 64 * i);
        } else {
            for (int i = 0; i < 4; i++) v[i] = c_low(w + b * 256 + 64 * i), v[i + 4] = c_high(w + b * 256 + 64 * i);
            for (int plane = 0; plane < k.bits - 4; plane++)
                for (int i = 0; i < 8; i++)
                    v[i] = c_bits(v[i], w + at.planes + (b * (k.bits - 4) + plane) * 64 + 8 * i, (char)(16 << plane));
        }
        f16 scale[2], minimum = f_set(0);
        for (int h = 0; h < BLOCK / k.each; h++) {
            int64_t i = b * (BLOCK / k.each) + h;
            if (k.scales == HALF) scale[h] = f_half(w + at.scales + i * 2 * LANES);
            if (k.scales == SINGLE) scale[h] = f_load((const float *)(w + at.scales + i * 4 * LANES));
            if (k.scales == SUPER) {
                const uint8_t *bytes = w + at.scales + i * LANES;
                f16 own = k.each == BLOCK ? f_u8(bytes) : f_s8(bytes); /* Q6_K's scales have a sign */
                scale[h] = f_mul(own, f_half(w + at.supers + b / 8 * 2 * LANES));
            }
        }
        if (k.minimum) {
            if (k.scales == HALF) minimum = f_half(w + at.minima + b * 2 * LANES);
            if (k.scales == SINGLE) minimum = f_load((const float *)(w + at.minima + b * 4 * LANES));
            if (k.scales == SUPER)
                minimum = f_mul(f_u8(w + at.minima + b * LANES), f_half(w + at.super_minima + b / 8 * 2 * LANES));
        }
        for (int t = 0; t < count; t++) {
            int32_t four[8];
            memcpy(four, q + t * x->inputs, BLOCK);
            f16 each = f_set(d[t * x->blocks + b]);
            for (int h = 0; h < BLOCK / k.each; h++) {
                const int32_t *begin = extra + t * x->extras + b * (BLOCK / k.each) + h;
                i16 sum = i_set(k.minimum ? 0 : *begin);
                for (int i = h * 8 * k.each / BLOCK; i < (h + 1) * 8 * k.each / BLOCK; i++)
                    sum = k.bits == 8 ? i_dot_bytes(sum, v[i], four[i]) : i_dot(sum, v[i], four[i]);
                sums[t] = f_fma(f_mul(f_int(sum), each), scale[h], sums[t]);
            }
            if (k.minimum) {
                float moved;
                memcpy(&moved, extra + t * x->extras + b, 4);
                sums[t] = f_fma(minimum, f_set(moved), sums[t]);
            }
        }
    }
}

typedef void (*tile_fn)(const uint8_t *w, const rows_t *x, int64_t first, float *out);

#define ONE(kind, count)                                                                                  \
    static void tile_##kind##_##count(const uint8_t *w, const rows_t *x, int64_t first, float *out) {     \
        f16 sums[count];                                                                                  \
        tile(kinds[kind], count, w, x, first, sums);                                                      \
        for (int t = 0; t < count; t++) f_store(out + t * LANES, sums[t]);                                \
    }
#define ALL(kind) ONE(kind, 1) ONE(kind, 2) ONE(kind, 4) ONE(kind, 8)
#define NAMES(kind) {tile_##kind##_1, tile_##kind##_2, tile_##kind##_4, tile_##kind##_8}

ALL(Q4_0) ALL(Q4_1) ALL(Q5_0) ALL(Q5_1) ALL(Q8_0) ALL(Q4_K) ALL(Q5_K) ALL(Q6_K) ALL(I8) ALL(I4)

static const tile_fn tiles[KINDS][4] = {NAMES(Q4_0), NAMES(Q4_1), NAMES(Q5_0), NAMES(Q5_1), NAMES(Q8_0),
                                        NAMES(Q4_K), NAMES(Q5_K), NAMES(Q6_K), NAMES(I8),   NAMES(I4)};

/* The products of up to 8 rows with one tile: [count][16]. */
static void some(int kind, const uint8_t *w, const rows_t *x, int64_t first, int count, float *out) {
    for (int size = 8, which = 3; count; size /= 2, which--)
        for (; count >= size; count -= size, first += size, out += size * LANES) tiles[kind][which](w, x, first, out);
}

INLINE float act(float gate, float up, int kind) {
    if (kind == 1) return gate / (1.0f + exp1(-gate)) * up;
    if (kind == 2) { /* 0.5 g (1 + tanh(z)) = g / (1 + exp(-2 z)) */
        float z = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);
        return gate / (1.0f + exp1(-2.0f * z)) * up;
    }
    gate = gate > 7.0f ? 7.0f : gate;
    up = (up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up) + 1.0f;
    return gate / (1.0f + exp1(-1.702f * gate)) * up;
}

INLINE void gated(const float *gate, const float *up, float *out, int count, int kind) {
    for (int i = 0; i < count; i++) out[i] = act(gate[i], up[i], kind);
}

/* out = act(gate) * up; gate 1: SiLU, 2: GELU by tanh, 3: SwiGLU, clamped. */
static void gate_lanes(const float *gate, const float *up, float *out, int count, int kind) {
    if (kind == 1) gated(gate, up, out, count, 1);
    else if (kind == 2) gated(gate, up, out, count, 2);
    else gated(gate, up, out, count, 3);
}

INLINE void plus_bias(float *sums, const float *bias, int64_t from, int64_t stop) {
    for (int64_t i = from; bias && i < stop; i++) sums[i - from] += bias[i];
}

/* Outputs 16 g to 16 g + 16 of some rows: bias, gate and what is added, and to where they go. */
static void outputs(const product_t *p, int64_t g, int64_t row, int count) {
    int64_t width = p->gate ? p->outputs / 2 : p->outputs, from = g * LANES;
    int64_t stop = from + LANES < width ? from + LANES : width, bytes = places(kinds[p->kind], p->quantised.blocks).size;
    float sums[TILE * LANES], up[TILE * LANES];
    some(p->kind, p->tiles + g * bytes, &p->quantised, row, count, sums);
    if (p->gate) some(p->kind, p->tiles + (g + width / LANES) * bytes, &p->quantised, row, count, up);
    for (int t = 0; t < count; t++) {
        float *mine = sums + t * LANES, *to = p->y + (row + t) * width + from;
        plus_bias(mine, p->bias, from, stop);
        if (p->gate) {
            plus_bias(up + t * LANES, p->bias, width + from, width + stop);
            gate_lanes(mine, up + t * LANES, mine, LANES, p->gate);
        }
        if (p->add) plus_bias(mine, p->add + (row + t) * width, from, stop);
        memcpy(to, mine, (size_t)(stop - from) * sizeof(float));
    }
}

static void product_body(void *data, int thread, int threads) {
    product_t *p = data;
    if (!p->ready) {
        float *normed = p->norm ? malloc((size_t)p->inputs * sizeof(float)) : NULL;
        if (p->norm && !normed) abort();
        for (int64_t row = thread; row < p->rows; row += threads) prepare(p, row, normed);
        free(normed);
        ne_barrier(threads);
    }
    int64_t width = p->gate ? p->outputs / 2 : p->outputs, all = (width + LANES - 1) / LANES;
    int64_t begin = all * thread / threads, end = all * (thread + 1) / threads;
    int64_t chunk = CHUNK_BYTES / p->inputs / TILE * TILE;
    chunk = chunk < TILE ? TILE : chunk;
    for (int64_t row = 0; row < p->rows; row += chunk) {
        int64_t stop = row + chunk < p->rows ? row + chunk : p->rows;
        for (int64_t g = begin; g < end; g++)
            for (int64_t t = row; t < stop; t += TILE) outputs(p, g, t, stop - t < TILE ? (int)(stop - t) : TILE);
    }
}

/* y = act(norm(x) @ w.T + bias) + add. x [rows, inputs], y [rows, outputs], or [rows, outputs / 2] with a gate, whose
 * half is a multiple of 16. Null: no norm, bias, nothing to add. Returns 0, or 1: there is no memory. */
int ne_product(const float *x, int64_t rows, int64_t inputs, int64_t outputs_, const uint8_t *packed, int kind,
               const float *norm, float eps, const float *bias, int gate, const float *add, float *y, int threads) {
    kind_t k = kinds[kind];
    int64_t blocks = inputs / BLOCK, extras = k.minimum ? blocks : blocks * (BLOCK / k.each);
    size_t codes_size = (size_t)((rows * inputs + 63) / 64 * 64), d_size = (size_t)(rows * blocks) * 4;
    uint8_t *memory = malloc(codes_size + d_size + (size_t)(rows * extras) * 4 + 64);
    float *normed = norm ? malloc((size_t)inputs * sizeof(float)) : NULL;
    if (!memory || (norm && !normed)) return free(memory), free(normed), 1;
    uint8_t *begin = (uint8_t *)(((uintptr_t)memory + 63) / 64 * 64);
    product_t p = {x, norm, bias, add, packed, y, rows, inputs, outputs_, eps, kind, gate, 0,
                   {(int8_t *)begin, (float *)(begin + codes_size), (int32_t *)(begin + codes_size + d_size), inputs,
                    blocks, extras}};
    if (rows * inputs <= FEW || threads == 1) {
        for (int64_t row = 0; row < rows; row++) prepare(&p, row, normed);
        p.ready = 1;
    }
    ne_parallel(product_body, &p, threads);
    free(memory), free(normed);
    return 0;
}

typedef struct {
    float scale, minimum;
} scale_t;

/* Of the inputs from 16 n on of a row that is one lane of a tile. */
static scale_t scale_of(kind_t k, const uint8_t *w, places_t at, int lane, int64_t n) {
    int64_t block = n / 2, i = (k.each == BLOCK ? block : n) * LANES + lane, j = block * LANES + lane;
    int64_t super = block / 8 * LANES + lane;
    scale_t s = {0, 0};
    if (k.scales == SINGLE) {
        memcpy(&s.scale, w + at.scales + 4 * i, 4);
        if (k.minimum) memcpy(&s.minimum, w + at.minima + 4 * j, 4);
    } else if (k.scales == HALF) {
        s.scale = half1(w + at.scales + 2 * i);
        if (k.minimum) s.minimum = half1(w + at.minima + 2 * j);
    } else {
        uint8_t own = w[at.scales + i];
        s.scale = half1(w + at.supers + 2 * super) * (k.each == BLOCK ? (float)own : (float)(int8_t)own);
        if (k.minimum) s.minimum = half1(w + at.super_minima + 2 * super) * (float)w[at.minima + j];
    }
    return s;
}

static int code_of(kind_t k, const uint8_t *w, places_t at, int lane, int64_t b, int i) {
    int quad = i / 4, byte = 4 * lane + i % 4;
    if (k.bits == 8) return (int8_t)w[b * 512 + 64 * quad + byte];
    int code = w[b * 256 + 64 * (quad % 4) + byte] >> (quad < 4 ? 0 : 4) & 15;
    for (int plane = 0; plane < k.bits - 4; plane++)
        code |= (w[at.planes + (b * (k.bits - 4) + plane) * 64 + 8 * quad + byte / 8] >> byte % 8 & 1) << (4 + plane);
    return code;
}

/* Rows `ids` of the dequantised weight: out [count, inputs]. */
void ne_rows(const int64_t *ids, int64_t count, int64_t inputs, const uint8_t *packed, int kind, float *out) {
    kind_t k = kinds[kind];
    int64_t blocks = inputs / BLOCK;
    places_t at = places(k, blocks);
    int offset = k.minimum || k.bits == 8 ? 0 : k.offset;
    for (int64_t n = 0; n < count; n++) {
        const uint8_t *w = packed + ids[n] / LANES * at.size;
        int lane = (int)(ids[n] % LANES);
        for (int64_t part = 0; part < 2 * blocks; part++) {
            scale_t s = scale_of(k, w, at, lane, part);
            for (int i = 0; i < 16; i++) {
                int code = code_of(k, w, at, lane, part / 2, (int)(part % 2) * 16 + i);
                *out++ = (float)(code - offset) * s.scale + (float)k.minimum * s.minimum;
            }
        }
    }
}

static void gate_body(void *data, int thread, int threads) {
    const product_t *p = data;
    for (int64_t row = p->rows * thread / threads; row < p->rows * (thread + 1) / threads; row++) {
        const float *gate = p->x + row * 2 * p->outputs;
        float *to = p->y + row * p->outputs;
        int64_t i = 0;
        for (; i + LANES <= p->outputs; i += LANES) gate_lanes(gate + i, gate + p->outputs + i, to + i, LANES, p->gate);
        if (i < p->outputs) gate_lanes(gate + i, gate + p->outputs + i, to + i, (int)(p->outputs - i), p->gate);
    }
}

/* x [rows, 2 width], gates first -> y [rows, width]. */
void ne_act_and_mul(const float *x, int64_t rows, int64_t width, int gate, float *y, int threads) {
    product_t p = {.x = x, .y = y, .rows = rows, .outputs = width, .gate = gate};
    ne_parallel(gate_body, &p, rows * width < FEW ? 1 : threads);
}
