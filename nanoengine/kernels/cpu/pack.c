/* Weights from a GGUF file's blocks, or from codes with float32 scales, into the tiles that products read. */
#include "products.h"

static int nibble(const uint8_t *bytes, int i, int group) {
    return bytes[i / (2 * group) * group + i % group] >> (i % (2 * group) < group ? 0 : 4) & 15;
}

/* Code i of a block, with its offset. */
static int raw_code(int kind, const uint8_t *w, int i) {
    switch (kind) {
    case Q4_0: return nibble(w + 2, i, 16);
    case Q4_1: return nibble(w + 4, i, 16);
    case Q5_0: return nibble(w + 6, i, 16) | (w[2 + i / 8] >> i % 8 & 1) << 4;
    case Q5_1: return nibble(w + 8, i, 16) | (w[4 + i / 8] >> i % 8 & 1) << 4;
    case Q8_0: return w[2 + i];
    case Q4_K: return nibble(w + 16, i, 32);
    case Q5_K: return nibble(w + 48, i, 32) | (w[16 + i % 32] >> i / 32 & 1) << 4;
    default: return nibble(w, i, 64) | (w[128 + i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3) << 4;
    }
}

/* The byte that scales inputs from 32 n on (16 n of Q6_K), and the one of their minimum. */
static uint8_t raw_scale(int kind, const uint8_t *w, int n) {
    if (kind == Q6_K) return w[192 + n];
    w += 4;
    return n < 4 ? w[n] & 63 : (w[n + 4] & 15) | (w[n - 4] >> 6) << 4;
}

static uint8_t raw_minimum(const uint8_t *w, int n) {
    w += 4;
    return n < 4 ? w[n + 4] & 63 : w[n + 4] >> 4 | (w[n] >> 6) << 4;
}

static void put_code(kind_t k, uint8_t *tile, places_t at, int lane, int64_t b, int i, int code) {
    int quad = i / 4, byte = 4 * lane + i % 4;
    if (k.bits == 8) {
        tile[b * 512 + 64 * quad + byte] = (uint8_t)code;
        return;
    }
    tile[b * 256 + 64 * (quad % 4) + byte] |= (uint8_t)((code & 15) << (quad < 4 ? 0 : 4));
    for (int plane = 0; plane < k.bits - 4; plane++)
        tile[at.planes + (b * (k.bits - 4) + plane) * 64 + 8 * quad + byte / 8] |= (uint8_t)((code >> (4 + plane) & 1) << byte % 8);
}

typedef struct {
    const uint8_t *blocks;
    uint8_t *tiles;
    const float *scales, *minima;
    int64_t outputs, inputs, group;
    int kind;
} pack_t;

/* One row of GGUF blocks. */
static void pack_blocks(const pack_t *p, kind_t k, const uint8_t *w, uint8_t *tile, places_t at, int lane) {
    int unit = k.scales == SUPER ? 256 : BLOCK, size = raw_size[p->kind];
    for (int64_t u = 0; u < p->inputs / unit; u++, w += size) {
        int64_t first = u * unit / BLOCK, own = u * LANES + lane;
        for (int i = 0; i < unit; i++) put_code(k, tile, at, lane, first + i / BLOCK, i % BLOCK, raw_code(p->kind, w, i));
        if (k.scales == HALF) {
            memcpy(tile + at.scales + 2 * own, w, 2);
            if (k.minimum) memcpy(tile + at.minima + 2 * own, w + 2, 2);
            continue;
        }
        memcpy(tile + at.supers + 2 * own, w + (p->kind == Q6_K ? 208 : 0), 2);
        if (k.minimum) memcpy(tile + at.super_minima + 2 * own, w + 2, 2);
        for (int n = 0; n < 256 / k.each; n++)
            tile[at.scales + (u * (256 / k.each) + n) * LANES + lane] = raw_scale(p->kind, w, n);
        for (int n = 0; k.minimum && n < 8; n++) tile[at.minima + (u * 8 + n) * LANES + lane] = raw_minimum(w, n);
    }
}

/* One row of codes, a byte each, with scales (and minima) of `group` inputs. */
static void pack_codes(const pack_t *p, kind_t k, int64_t row, uint8_t *tile, places_t at, int lane) {
    const uint8_t *w = p->blocks + row * p->inputs;
    for (int64_t i = 0; i < p->inputs; i++) put_code(k, tile, at, lane, i / BLOCK, i % BLOCK, w[i]);
    for (int64_t b = 0; b < p->inputs / BLOCK; b++) {
        int64_t from = row * (p->inputs / p->group) + b * BLOCK / p->group, to = 4 * (b * LANES + lane);
        memcpy(tile + at.scales + to, p->scales + from, 4);
        if (k.minimum) memcpy(tile + at.minima + to, p->minima + from, 4);
    }
}

static void pack_body(void *data, int thread, int threads) {
    const pack_t *p = data;
    kind_t k = kinds[p->kind];
    places_t at = places(k, p->inputs / BLOCK);
    int64_t all = (p->outputs + LANES - 1) / LANES;
    for (int64_t g = all * thread / threads; g < all * (thread + 1) / threads; g++) {
        uint8_t *tile = p->tiles + g * at.size;
        memset(tile, 0, (size_t)at.size);
        for (int64_t row = g * LANES; row < (g + 1) * LANES && row < p->outputs; row++) {
            int lane = (int)(row - g * LANES);
            if (k.scales == SINGLE) pack_codes(p, k, row, tile, at, lane);
            else pack_blocks(p, k, p->blocks + row * (p->inputs / (k.scales == SUPER ? 256 : BLOCK)) * raw_size[p->kind], tile, at, lane);
        }
    }
}

/* blocks [outputs, bytes of a row] -> tiles [ceil(outputs / 16), ne_tile_bytes]; lanes without an output are zeros.
 * Kinds I8 and I4: blocks are codes [outputs, inputs], scales and minima float32 [outputs, inputs / group]. */
void ne_pack(const uint8_t *blocks, const float *scales, const float *minima, int64_t group, int64_t outputs,
             int64_t inputs, int kind, uint8_t *tiles, int threads) {
    pack_t p = {blocks, tiles, scales, minima, outputs, inputs, group, kind};
    ne_parallel(pack_body, &p, threads);
}

int64_t ne_tile_bytes(int kind, int64_t inputs) { return places(kinds[kind], inputs / BLOCK).size; }
