/* Stored words -> window codes, by one table. */

#include "ich.h"

enum { STEP = 16 };

/* Byte `window` of each of sixteen entries. */
static void put_plane(const uint32_t *entries, int window, uint8_t *plane) {
#ifdef ICH_SSE2
    const __m128i mask = _mm_set1_epi32(255);
    __m128i codes[4];
    for (int part = 0; part < 4; part++) {
        __m128i some = _mm_load_si128((const __m128i *)entries + part);
        codes[part] = _mm_and_si128(_mm_srli_epi32(some, 8 * window), mask);
    }
    __m128i first = _mm_packs_epi32(codes[0], codes[1]), second = _mm_packs_epi32(codes[2], codes[3]);
    _mm_storeu_si128((__m128i *)plane, _mm_packus_epi16(first, second));
#else
    for (int at = 0; at < STEP; at++) {
        plane[at] = (uint8_t)(entries[at] >> 8 * window);
    }
#endif
}

void ich_windows(const uint16_t *words, size_t count, const uint32_t *table, int windows, uint8_t *out) {
    _Alignas(16) uint32_t entries[STEP];
    size_t at = 0;
    for (; at + STEP <= count; at += STEP) {
        for (int pixel = 0; pixel < STEP; pixel++) {
            entries[pixel] = table[words[at + pixel]];
        }
        for (int window = 0; window < windows; window++) {
            put_plane(entries, window, out + (size_t)window * count + at);
        }
    }
    for (; at < count; at++) {
        for (int window = 0; window < windows; window++) {
            out[(size_t)window * count + at] = (uint8_t)(table[words[at]] >> 8 * window);
        }
    }
}
