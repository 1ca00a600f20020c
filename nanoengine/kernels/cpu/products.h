/* Kinds of quantised weights, and where a tile of 16 rows has its codes and scales.
 *
 * A block is 32 inputs of the 16 rows: eight vectors of 64 bytes, four inputs of each row in turn. Of codes of four bits
 * the first four vectors are the low halves of 256 bytes, the others the high halves. Further bits are in planes, a bit
 * for each byte of the vectors. Behind all codes of the tile are its planes, its scales, and its minima.
 */
#ifndef NE_PRODUCTS_H
#define NE_PRODUCTS_H

#include "lanes.h"

enum { BLOCK = 32 };

/* How the numbers of a kind are stored. */
typedef struct {
    int bits;    /* of a code: 4, 5, 6 (two or four bits more in planes), or 8, signed */
    int offset;  /* a value is (code - offset) * scale, or code * scale - minimum where `minimum` */
    int minimum; /* 1: a minimum is added, -1: subtracted, 0: there is none */
    int scales;  /* a block's scales: HALF: a float16; SUPER: a byte, times the float16 of 8 blocks; SINGLE: a float32 */
    int each;    /* inputs of a scale: 32, or 16 */
} kind_t;

enum { HALF, SUPER, SINGLE };
enum { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, I8, I4, KINDS };

static const kind_t kinds[KINDS] = {
    [Q4_0] = {4, 8, 0, HALF, 32},
    [Q4_1] = {4, 0, 1, HALF, 32},
    [Q5_0] = {5, 16, 0, HALF, 32},
    [Q5_1] = {5, 0, 1, HALF, 32},
    [Q8_0] = {8, 128, 0, HALF, 32},
    [Q4_K] = {4, 0, -1, SUPER, 32},
    [Q5_K] = {5, 0, -1, SUPER, 32},
    [Q6_K] = {6, 32, 0, SUPER, 16},
    [I8] = {8, 128, 0, SINGLE, 32}, /* signed bytes with a float32 scale */
    [I4] = {4, 0, 1, SINGLE, 32}, /* codes with a float32 scale and minimum */
};

/* Bytes of a block in a GGUF file. */
static const int raw_size[KINDS] = {18, 20, 22, 24, 34, 144, 176, 210, 0, 0};

/* Where the parts of a tile of 16 rows of `blocks` blocks begin, in bytes. */
typedef struct {
    int64_t planes, scales, minima, supers, super_minima, size;
} places_t;

INLINE places_t places(kind_t k, int64_t blocks) {
    places_t p;
    int64_t scale = (k.scales == HALF ? 2 : k.scales == SINGLE ? 4 : 1) * LANES * (BLOCK / k.each);
    p.planes = blocks * LANES * BLOCK / (k.bits == 8 ? 1 : 2);
    p.scales = p.planes + (k.bits == 8 ? 0 : (k.bits - 4) * blocks * LANES * BLOCK / 8);
    p.minima = p.scales + blocks * scale;
    p.supers = p.minima + (k.minimum ? blocks * scale : 0);
    p.super_minima = p.supers + (k.scales == SUPER ? blocks / 8 * 2 * LANES : 0);
    p.size = p.super_minima + (k.scales == SUPER && k.minimum ? blocks / 8 * 2 * LANES : 0);
    return p;
}

#endif
