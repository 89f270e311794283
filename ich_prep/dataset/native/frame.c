/* Frames of blosc 1 (README_CHUNK_FORMAT of c-blosc) around LZ4 blocks: a header of 16 bytes, the place of each block, and
   the blocks. Items of two bytes are told apart into planes of low and of high bytes first, block by block. */

#include "lz4.h"

enum { HEADER = 16, PLACE = 4, FORMAT = 2, LZ4_FORMAT = 1, LEAST_STREAM = 128 };
/* BLOSC_DOSHUFFLE, BLOSC_MEMCPYED, BLOSC_DOBITSHUFFLE, and "do not split". LEAST_STREAM is BLOSC_MIN_BUFFERSIZE. */
enum { SHUFFLED = 1, COPIED = 2, BITS_SHUFFLED = 4, ONE_STREAM = 16, CODEC_SHIFT = 5 };

/* A block is one stream for each byte of an item, but for small ones, and for a last block shorter than the others. */
static size_t streams_of(size_t length, size_t block_bytes, size_t item_bytes) {
    return length == block_bytes && block_bytes / item_bytes >= LEAST_STREAM ? item_bytes : 1;
}

static size_t blocks_of(size_t slice_bytes, size_t block_bytes) {
    return (slice_bytes + block_bytes - 1) / block_bytes;
}

static size_t smaller(size_t one, size_t other) {
    return one < other ? one : other;
}

int ich_interface(void) {
    return ICH_INTERFACE;
}

size_t ich_frame_room(size_t slice_bytes, size_t block_bytes, size_t item_bytes) {
    size_t stream = PLACE + lz4_room(block_bytes);
    return HEADER + blocks_of(slice_bytes, block_bytes) * (PLACE + item_bytes * stream);
}

size_t ich_encode_scratch(size_t block_bytes) {
    return lz4_scratch(block_bytes) + block_bytes;
}

/* Puts the low bytes of items of two before the high ones: blosc's byte shuffle. */
static void tell_apart(const uint8_t *items, size_t length, uint8_t *planes) {
    size_t count = length / 2, at = 0;
    uint8_t *low = planes, *high = planes + count;
#ifdef ICH_SSE2
    const __m128i mask = _mm_set1_epi16(255);
    for (; at + 16 <= count; at += 16) {
        __m128i first = _mm_loadu_si128((const __m128i *)(items + 2 * at));
        __m128i second = _mm_loadu_si128((const __m128i *)(items + 2 * at + 16));
        __m128i lows = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
        __m128i highs = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        _mm_storeu_si128((__m128i *)(low + at), lows);
        _mm_storeu_si128((__m128i *)(high + at), highs);
    }
#endif
    for (; at < count; at++) {
        low[at] = items[2 * at];
        high[at] = items[2 * at + 1];
    }
}

/* The other way, past the caches where `items` allows it. */
static void put_together(const uint8_t *planes, size_t length, uint8_t *items) {
    size_t count = length / 2, at = 0;
    const uint8_t *low = planes, *high = planes + count;
#ifdef ICH_SSE2
    if ((uintptr_t)items % 16 == 0) {
        for (; at + 16 <= count; at += 16) {
            __m128i lows = _mm_loadu_si128((const __m128i *)(low + at));
            __m128i highs = _mm_loadu_si128((const __m128i *)(high + at));
            _mm_stream_si128((__m128i *)(items + 2 * at), _mm_unpacklo_epi8(lows, highs));
            _mm_stream_si128((__m128i *)(items + 2 * at + 16), _mm_unpackhi_epi8(lows, highs));
        }
        _mm_sfence();
    }
#endif
    for (; at < count; at++) {
        items[2 * at] = low[at];
        items[2 * at + 1] = high[at];
    }
}

void ich_copy_past_caches(uint8_t *out, const uint8_t *data, size_t length) {
    size_t at = 0;
#ifdef ICH_SSE2
    if ((uintptr_t)out % 16 == 0) {
        for (; at + 64 <= length; at += 64) {
            for (int part = 0; part < 64; part += 16) {
                __m128i some = _mm_loadu_si128((const __m128i *)(data + at + part));
                _mm_stream_si128((__m128i *)(out + at + part), some);
            }
        }
        _mm_sfence();
    }
#endif
    memcpy(out + at, data + at, length - at);
}

size_t ich_encode(const uint8_t *pixels, size_t slice_bytes, size_t item_bytes, size_t row_bytes, size_t block_bytes,
                  uint8_t *out, uint8_t *scratch) {
    size_t blocks = blocks_of(slice_bytes, block_bytes), end = HEADER + PLACE * blocks;
    uint64_t *equal = (uint64_t *)scratch; /* in front, where memory is aligned */
    uint8_t *planes = scratch + lz4_scratch(block_bytes);
    for (size_t block = 0; block < blocks; block++) {
        const uint8_t *data = pixels + block * block_bytes;
        size_t length = smaller(block_bytes, slice_bytes - block * block_bytes);
        size_t streams = streams_of(length, block_bytes, item_bytes), stream = length / streams;
        if (item_bytes == 2) {
            tell_apart(data, length, planes);
            data = planes;
        }
        store_u32(out + HEADER + PLACE * block, (uint32_t)end);
        for (size_t number = 0; number < streams; number++, data += stream) {
            uint8_t *place = out + end;
            size_t encoded = lz4_encode(data, stream, row_bytes / item_bytes, place + PLACE, equal);
            if (encoded >= stream) { /* what is as long as the stream is the stream itself */
                memcpy(place + PLACE, data, stream);
                encoded = stream;
            }
            store_u32(place, (uint32_t)encoded);
            end += PLACE + encoded;
        }
    }
    out[0] = FORMAT;
    out[1] = LZ4_FORMAT;
    out[2] = (uint8_t)(LZ4_FORMAT << CODEC_SHIFT | (item_bytes > 1 ? SHUFFLED : 0) |
                       (block_bytes / item_bytes >= LEAST_STREAM ? 0 : ONE_STREAM));
    out[3] = (uint8_t)item_bytes;
    store_u32(out + 4, (uint32_t)slice_bytes);
    store_u32(out + 8, (uint32_t)block_bytes);
    store_u32(out + 12, (uint32_t)end);
    return end;
}

uint32_t ich_inflated(const uint8_t *frame) {
    return load_u32(frame + 4);
}

enum ich_fault ich_decode(const uint8_t *frame, size_t length, uint8_t *out, size_t slice_bytes, uint8_t *scratch) {
    if (length < HEADER || frame[0] != FORMAT || load_u32(frame + 12) != length) {
        return ICH_FRAME;
    }
    if (ich_inflated(frame) != slice_bytes) {
        return ICH_LENGTH;
    }
    unsigned flags = frame[2];
    size_t item_bytes = frame[3], block_bytes = load_u32(frame + 8);
    if (flags & COPIED) {
        if (length != HEADER + slice_bytes) {
            return ICH_FRAME;
        }
        ich_copy_past_caches(out, frame + HEADER, slice_bytes);
        return ICH_FINE;
    }
    if (flags >> CODEC_SHIFT != LZ4_FORMAT || flags & BITS_SHUFFLED || item_bytes < 1 || item_bytes > 2 ||
        block_bytes < 1 || block_bytes % item_bytes || slice_bytes % item_bytes) {
        return ICH_FRAME;
    }
    int shuffled = flags & SHUFFLED && item_bytes == 2;
    size_t blocks = blocks_of(slice_bytes, block_bytes);
    if (blocks > (length - HEADER) / PLACE) {
        return ICH_FRAME;
    }
    for (size_t block = 0; block < blocks; block++) {
        size_t place = load_u32(frame + HEADER + PLACE * block);
        size_t bytes = smaller(block_bytes, slice_bytes - block * block_bytes);
        size_t streams = flags & ONE_STREAM ? 1 : streams_of(bytes, block_bytes, item_bytes);
        size_t stream = bytes / streams;
        uint8_t *items = out + block * block_bytes, *data = shuffled ? scratch : items;
        for (size_t number = 0; number < streams; number++, data += stream) {
            if (place > length || length - place < PLACE) {
                return ICH_FRAME;
            }
            size_t encoded = load_u32(frame + place);
            place += PLACE;
            if (encoded > length - place) {
                return ICH_FRAME;
            }
            if (encoded == stream) {
                memcpy(data, frame + place, stream);
            } else if (!lz4_decode(frame + place, encoded, data, stream)) {
                return ICH_FRAME;
            }
            place += encoded;
        }
        if (shuffled) {
            put_together(scratch, bytes, items);
        }
    }
    return ICH_FINE;
}
