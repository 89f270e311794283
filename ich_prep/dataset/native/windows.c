/* Stored values -> window codes, by one table. */

#include "ich.h"

enum { STEP = 16 };

/* Write byte `window` of each of STEP entries. */
static void write_plane(const uint32_t *entries, int window, uint8_t *plane) {
#ifdef ICH_SSE2
    const __m128i mask = _mm_set1_epi32(255);
    __m128i codes[4];
    for (int part = 0; part < 4; part++) {
        __m128i quad = _mm_load_si128((const __m128i *)entries + part);
        codes[part] = _mm_and_si128(_mm_srli_epi32(quad, 8 * window), mask);
    }
    __m128i first = _mm_packs_epi32(codes[0], codes[1]), second = _mm_packs_epi32(codes[2], codes[3]);
    _mm_storeu_si128((__m128i *)plane, _mm_packus_epi16(first, second));
#else
    for (int i = 0; i < STEP; i++) {
        plane[i] = (uint8_t)(entries[i] >> 8 * window);
    }
#endif
}

void ich_windows(const uint16_t *stored, size_t count, const uint32_t *table, int windows, uint8_t *out) {
    _Alignas(16) uint32_t entries[STEP];
    size_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        for (int pixel = 0; pixel < STEP; pixel++) {
            entries[pixel] = table[stored[i + pixel]];
        }
        for (int window = 0; window < windows; window++) {
            write_plane(entries, window, out + (size_t)window * count + i);
        }
    }
    for (; i < count; i++) {
        for (int window = 0; window < windows; window++) {
            out[(size_t)window * count + i] = (uint8_t)(table[stored[i]] >> 8 * window);
        }
    }
}
