/* LZ4 blocks (lz4_Block_format.md of the LZ4 project) of pictures.

   The encoder finds one kind of match: at least LEAST_MATCH bytes that equal those one row above. CT is noise, air and
   windows that are black or white; what a general encoder finds in the noise besides are matches of four or five bytes,
   which save a twentieth to an eighth of the frame and cost the decoder as much as long ones. */

#include "lz4.h"

enum {
    LEAST_MATCH = 8,
    SHORTEST = 4,       /* match that a token can tell of */
    LAST_LITERALS = 5,  /* a block ends in so many bytes, at least, that are no match */
    LAST_START = 12,    /* and no match starts so near to its end */
    FURTHEST = 65535,
    SPARE = 32, /* bytes copied at a time where there is room for them */
};

size_t lz4_room(size_t length) {
    return length + length / 255 + 16;
}

size_t lz4_scratch(size_t length) {
    return (length / 64 + 2) * sizeof(uint64_t);
}

/* Which of 64 bytes equal those `row` before: bit i for byte i. */
static uint64_t equal_64(const uint8_t *data, size_t row) {
    uint64_t bits = 0;
#ifdef ICH_SSE2
    for (int part = 0; part < 4; part++) {
        __m128i here = _mm_loadu_si128((const __m128i *)(data + 16 * part));
        __m128i above = _mm_loadu_si128((const __m128i *)(data + 16 * part - row));
        bits |= (uint64_t)(uint32_t)_mm_movemask_epi8(_mm_cmpeq_epi8(here, above)) << 16 * part;
    }
#else
    const uint64_t low_bits = UINT64_C(0x7f7f7f7f7f7f7f7f);
    for (int part = 0; part < 8; part++) {
        uint64_t here, above;
        memcpy(&here, data + 8 * part, 8);
        memcpy(&above, data + 8 * part - row, 8);
        uint64_t other = here ^ above;
        uint64_t same = ~(((other & low_bits) + low_bits) | other | low_bits); /* the high bit of each byte that is 0 */
        bits |= (same >> 7) * UINT64_C(0x0102040810204080) >> 56 << 8 * part; /* gathered, on a little-endian machine */
    }
#endif
    return bits;
}

static uint8_t *put_length(uint8_t *out, size_t rest) {
    for (; rest >= 255; rest -= 255) {
        *out++ = 255;
    }
    *out++ = (uint8_t)rest;
    return out;
}

/* A token, literals, and room for what follows it. */
static uint8_t *put_literals(uint8_t *out, const uint8_t *literals, size_t count, unsigned match_bits) {
    *out++ = (uint8_t)((count < 15 ? count : 15) << 4 | match_bits);
    if (count >= 15) {
        out = put_length(out, count - 15);
    }
    memcpy(out, literals, count);
    return out + count;
}

static uint8_t *put_sequence(uint8_t *out, const uint8_t *literals, size_t count, size_t row, size_t match) {
    size_t more = match - SHORTEST;
    out = put_literals(out, literals, count, more < 15 ? (unsigned)more : 15);
    *out++ = (uint8_t)row;
    *out++ = (uint8_t)(row >> 8);
    return more < 15 ? out : put_length(out, more - 15);
}

size_t lz4_encode(const uint8_t *data, size_t length, size_t row, uint8_t *out, uint64_t *equal) {
    const uint8_t *begin = out;
    size_t words = row <= FURTHEST && length > LAST_START ? (length - LAST_LITERALS) / 64 : 0;
    for (size_t word = 0; word < words; word++) {
        equal[word] = 64 * word >= row ? equal_64(data + 64 * word, row) : 0;
    }
    equal[words] = 0;
    size_t done = 0, word = 0;
    while (word < words) {
        uint64_t here = equal[word] & ~UINT64_C(0) << (done > 64 * word ? done - 64 * word : 0), next = equal[word + 1];
        /* Bit i stays where the bits i to i + LEAST_MATCH - 1 are set. */
        uint64_t starts = here;
        for (int run = 1; run < LEAST_MATCH; run *= 2) {
            starts &= starts >> run | next << (64 - run);
            next &= next >> run;
        }
        if (!starts) {
            word++;
            continue;
        }
        size_t start = 64 * word + (size_t)__builtin_ctzll(starts);
        if (start > length - LAST_START) {
            break;
        }
        uint64_t ends = ~equal[word] & ~UINT64_C(0) << start % 64;
        while (!ends) {
            ends = ~equal[++word]; /* the word behind the last one has no bit set */
        }
        size_t end = 64 * word + (size_t)__builtin_ctzll(ends);
        out = put_sequence(out, data + done, start - done, row, end - start);
        done = end;
    }
    return (size_t)(put_literals(out, data + done, length - done, 0) - begin);
}

/* Reads what goes on from a length of 15; returns 0 where the block ends within. */
static int more_length(const uint8_t **in, const uint8_t *end, size_t *length) {
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

/* Copies `length` bytes, and up to SPARE more. `from` may lie 16 bytes before `out`, and is read as it is written. */
static void copy_freely(uint8_t *out, const uint8_t *from, size_t length) {
    uint8_t *const stop = out + length;
    do {
        memcpy(out, from, 16);
        memcpy(out + 16, from + 16, 16);
        out += SPARE;
        from += SPARE;
    } while (out < stop);
}

/* Repeats the `distance` bytes before `out` until there are `length`. */
static void repeat(uint8_t *out, size_t distance, size_t length) {
    uint8_t *const stop = out + length;
    while ((size_t)(stop - out) > distance) {
        memcpy(out, out - distance, distance);
        out += distance;
        distance *= 2; /* what repeats every n bytes repeats every 2 n */
    }
    memcpy(out, out - distance, (size_t)(stop - out));
}

int lz4_decode(const uint8_t *in, size_t in_length, uint8_t *out, size_t length) {
    const uint8_t *const in_end = in + in_length;
    const uint8_t *const begin = out;
    uint8_t *const end = out + length;
    while (in < in_end) {
        unsigned token = *in++;
        size_t count = token >> 4;
        if (count == 15 && !more_length(&in, in_end, &count)) {
            return 0;
        }
        size_t in_left = (size_t)(in_end - in), left = (size_t)(end - out);
        if (count > in_left || count > left) {
            return 0;
        }
        if (in_left >= count + SPARE && left >= count + SPARE) {
            copy_freely(out, in, count);
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
        size_t distance = in[0] | (size_t)in[1] << 8, match = (token & 15) + SHORTEST;
        in += 2;
        if (match == 15 + SHORTEST && !more_length(&in, in_end, &match)) {
            return 0;
        }
        left = (size_t)(end - out);
        if (distance == 0 || distance > (size_t)(out - begin) || match > left) {
            return 0;
        }
        if (distance >= 16 && left >= match + SPARE) {
            copy_freely(out, out - distance, match);
        } else {
            repeat(out, distance, match);
        }
        out += match;
    }
    return 0;
}
