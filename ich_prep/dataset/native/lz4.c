/* LZ4 blocks (lz4_Block_format.md of the LZ4 project) of images.

   The encoder looks for one kind of match: ROW_MATCH_MIN or more bytes that equal those one row above. CT consists of noise,
   of air, and of windows that are black or white. In noise, a general encoder finds matches of four or five bytes; they save
   5 to 12% of the frame and cost the decoder as much as long matches do. */

#include "lz4.h"

enum {
    MIN_MATCH = 4,     /* shortest match that the format can express */
    ROW_MATCH_MIN = 8, /* shortest match that this encoder uses */
    LAST_LITERALS = 5, /* the last bytes of a block are always literals */
    MF_LIMIT = 12,     /* no match starts closer than this to the end of a block */
    MAX_DISTANCE = 65535,
    WILD_COPY = 32, /* bytes per step of wild_copy */
};

size_t lz4_bound(size_t length) {
    return length + length / 255 + 16;
}

size_t lz4_scratch(size_t length) {
    return (length / 64 + 2) * sizeof(uint64_t);
}

/* Compare 64 bytes with those one row above: bit i is set if byte i is equal. */
static uint64_t equal_mask(const uint8_t *data, size_t row) {
    uint64_t mask = 0;
#ifdef ICH_SSE2
    for (int part = 0; part < 4; part++) {
        __m128i here = _mm_loadu_si128((const __m128i *)(data + 16 * part));
        __m128i above = _mm_loadu_si128((const __m128i *)(data + 16 * part - row));
        mask |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(here, above)) << 16 * part;
    }
#else
    const uint64_t low_bits = UINT64_C(0x7f7f7f7f7f7f7f7f);
    for (int part = 0; part < 8; part++) {
        uint64_t here, above;
        memcpy(&here, data + 8 * part, 8);
        memcpy(&above, data + 8 * part - row, 8);
        uint64_t diff = here ^ above;
        uint64_t equal = ~(((diff & low_bits) + low_bits) | diff | low_bits);  /* the high bit of each byte that is 0 */
        mask |= (equal >> 7) * UINT64_C(0x0102040810204080) >> 56 << 8 * part; /* gathers 8 bits; little-endian only */
    }
#endif
    return mask;
}

/* Write the bytes that extend a length of 15. */
static uint8_t *write_length(uint8_t *out, size_t rest) {
    for (; rest >= 255; rest -= 255) {
        *out++ = 255;
    }
    *out++ = (uint8_t)rest;
    return out;
}

/* Write a token and its literals; `match_bits` is the low half of the token. */
static uint8_t *write_literals(uint8_t *out, const uint8_t *literals, size_t count, unsigned match_bits) {
    *out++ = (uint8_t)((count < 15 ? count : 15) << 4 | match_bits);
    if (count >= 15) {
        out = write_length(out, count - 15);
    }
    memcpy(out, literals, count);
    return out + count;
}

/* Write literals and the match that follows them. */
static uint8_t *write_sequence(uint8_t *out, const uint8_t *literals, size_t count, size_t distance, size_t match) {
    size_t code = match - MIN_MATCH;
    out = write_literals(out, literals, count, code < 15 ? (unsigned)code : 15);
    *out++ = (uint8_t)distance;
    *out++ = (uint8_t)(distance >> 8);
    return code < 15 ? out : write_length(out, code - 15);
}

size_t lz4_encode(const uint8_t *data, size_t length, size_t row, uint8_t *out, uint64_t *scratch) {
    const uint8_t *const out_start = out;
    uint64_t *const equal = scratch; /* bit i % 64 of word i / 64: does byte i equal the one above it? */
    size_t words = row <= MAX_DISTANCE && length > MF_LIMIT ? (length - LAST_LITERALS) / 64 : 0;
    for (size_t word = 0; word < words; word++) {
        equal[word] = 64 * word >= row ? equal_mask(data + 64 * word, row) : 0;
    }
    equal[words] = 0; /* a sentinel: ends every match and starts none */
    size_t anchor = 0, word = 0;
    while (word < words) {
        uint64_t here = equal[word] & ~UINT64_C(0) << (anchor > 64 * word ? anchor - 64 * word : 0);
        uint64_t next = equal[word + 1];
        /* Keep bit i where bits i to i + ROW_MATCH_MIN - 1 are set. */
        uint64_t starts = here;
        for (int run = 1; run < ROW_MATCH_MIN; run *= 2) {
            starts &= starts >> run | next << (64 - run);
            next &= next >> run;
        }
        if (!starts) {
            word++;
            continue;
        }
        size_t start = 64 * word + (size_t)__builtin_ctzll(starts);
        if (start > length - MF_LIMIT) {
            break;
        }
        uint64_t ends = ~equal[word] & ~UINT64_C(0) << start % 64;
        while (!ends) {
            ends = ~equal[++word]; /* stops at the sentinel */
        }
        size_t end = 64 * word + (size_t)__builtin_ctzll(ends);
        out = write_sequence(out, data + anchor, start - anchor, row, end - start);
        anchor = end;
    }
    return (size_t)(write_literals(out, data + anchor, length - anchor, 0) - out_start);
}

/* Add the bytes that extend a length of 15; return 0 if the block ends before they do. */
static int read_length(const uint8_t **in, const uint8_t *end, size_t *length) {
    uint8_t byte;
    do {
        if (*in == end) {
            return 0;
        }
        byte = *(*in)++;
        *length += byte;
    } while (byte == 255);
    return 1;
}

/* Copy `length` bytes and up to WILD_COPY more. `from` may overlap `out` if it lies 16 or more bytes before it. */
static void wild_copy(uint8_t *out, const uint8_t *from, size_t length) {
    uint8_t *const stop = out + length;
    do {
        memcpy(out, from, 16);
        memcpy(out + 16, from + 16, 16);
        out += WILD_COPY;
        from += WILD_COPY;
    } while (out < stop);
}

/* Copy exactly `length` bytes from `distance` bytes before `out`; where they overlap, the pattern repeats. */
static void overlap_copy(uint8_t *out, size_t distance, size_t length) {
    uint8_t *const stop = out + length;
    while ((size_t)(stop - out) > distance) {
        memcpy(out, out - distance, distance);
        out += distance;
        distance *= 2; /* a pattern of n bytes is also one of 2 n */
    }
    memcpy(out, out - distance, (size_t)(stop - out));
}

int lz4_decode(const uint8_t *in, size_t in_length, uint8_t *out, size_t length) {
    const uint8_t *const in_end = in + in_length;
    const uint8_t *const out_start = out;
    uint8_t *const end = out + length;
    while (in < in_end) {
        unsigned token = *in++;
        size_t count = token >> 4;
        if (count == 15 && !read_length(&in, in_end, &count)) {
            return 0;
        }
        size_t in_left = (size_t)(in_end - in), left = (size_t)(end - out);
        if (count > in_left || count > left) {
            return 0;
        }
        if (in_left >= count + WILD_COPY && left >= count + WILD_COPY) {
            wild_copy(out, in, count);
        } else {
            memcpy(out, in, count);
        }
        in += count;
        out += count;
        if (in == in_end) {
            return out == end;
        }
        if (in_end - in < 2) {
            return 0;
        }
        size_t distance = in[0] | (size_t)in[1] << 8, match = (token & 15) + MIN_MATCH;
        in += 2;
        if (match == 15 + MIN_MATCH && !read_length(&in, in_end, &match)) {
            return 0;
        }
        left = (size_t)(end - out);
        if (distance == 0 || distance > (size_t)(out - out_start) || match > left) {
            return 0;
        }
        if (distance >= 16 && left >= match + WILD_COPY) {
            wild_copy(out, out - distance, match);
        } else {
            overlap_copy(out, distance, match);
        }
        out += match;
    }
    return 0;
}
