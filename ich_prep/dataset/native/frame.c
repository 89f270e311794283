/* Blosc 1 frames (README_CHUNK_FORMAT of c-blosc) around LZ4 blocks: a header of 16 bytes, the offset of each block, the
   blocks. 16-bit items are byte-shuffled block by block. README.md draws a frame. */

#include "lz4.h"

enum { HEADER_BYTES = 16, OFFSET_BYTES = 4, LENGTH_BYTES = 4 };

/* c-blosc: BLOSC_VERSION_FORMAT, BLOSC_LZ4_VERSION_FORMAT, BLOSC_LZ4_FORMAT, BLOSC_MIN_BUFFERSIZE. */
enum { VERSION_FORMAT = 2, LZ4_VERSION_FORMAT = 1, LZ4_FORMAT = 1, MIN_BUFFERSIZE = 128 };

/* Flags: BLOSC_DOSHUFFLE, BLOSC_MEMCPYED, BLOSC_DOBITSHUFFLE, "do not split"; the codec is in the bits above. */
enum { DOSHUFFLE = 1, MEMCPYED = 2, DOBITSHUFFLE = 4, DONT_SPLIT = 16, CODEC_SHIFT = 5 };

/* A block is split into one stream per byte of an item, unless it is small or a last block shorter than the others. */
static size_t nstreams(size_t length, size_t blocksize, size_t typesize) {
    return length == blocksize && blocksize / typesize >= MIN_BUFFERSIZE ? typesize : 1;
}

static size_t nblocks(size_t slice_bytes, size_t blocksize) {
    return (slice_bytes + blocksize - 1) / blocksize;
}

static size_t min(size_t a, size_t b) {
    return a < b ? a : b;
}

int ich_interface(void) {
    return ICH_INTERFACE;
}

int ich_encoder(void) {
    return ICH_ENCODER;
}

size_t ich_frame_bound(size_t slice_bytes, size_t blocksize, size_t typesize) {
    size_t stream = LENGTH_BYTES + lz4_bound(blocksize);
    return HEADER_BYTES + nblocks(slice_bytes, blocksize) * (OFFSET_BYTES + typesize * stream);
}

size_t ich_encode_scratch(size_t blocksize) {
    return lz4_scratch(blocksize) + blocksize;
}

/* Byte shuffle for 16-bit items: all low bytes, then all high bytes. */
static void shuffle16(const uint8_t *items, size_t length, uint8_t *shuffled) {
    size_t count = length / 2, i = 0;
    uint8_t *low = shuffled, *high = shuffled + count;
#ifdef ICH_SSE2
    const __m128i mask = _mm_set1_epi16(255);
    for (; i + 16 <= count; i += 16) {
        __m128i first = _mm_loadu_si128((const __m128i *)(items + 2 * i));
        __m128i second = _mm_loadu_si128((const __m128i *)(items + 2 * i + 16));
        __m128i lows = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
        __m128i highs = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
        _mm_storeu_si128((__m128i *)(low + i), lows);
        _mm_storeu_si128((__m128i *)(high + i), highs);
    }
#endif
    for (; i < count; i++) {
        low[i] = items[2 * i];
        high[i] = items[2 * i + 1];
    }
}

/* The inverse of shuffle16, with non-temporal stores if `items` is aligned for them. */
static void unshuffle16(const uint8_t *shuffled, size_t length, uint8_t *items) {
    size_t count = length / 2, i = 0;
    const uint8_t *low = shuffled, *high = shuffled + count;
#ifdef ICH_SSE2
    if ((uintptr_t)items % 16 == 0) {
        for (; i + 16 <= count; i += 16) {
            __m128i lows = _mm_loadu_si128((const __m128i *)(low + i));
            __m128i highs = _mm_loadu_si128((const __m128i *)(high + i));
            _mm_stream_si128((__m128i *)(items + 2 * i), _mm_unpacklo_epi8(lows, highs));
            _mm_stream_si128((__m128i *)(items + 2 * i + 16), _mm_unpackhi_epi8(lows, highs));
        }
        _mm_sfence();
    }
#endif
    for (; i < count; i++) {
        items[2 * i] = low[i];
        items[2 * i + 1] = high[i];
    }
}

void ich_stream_copy(uint8_t *out, const uint8_t *data, size_t length) {
    size_t i = 0;
#ifdef ICH_SSE2
    if ((uintptr_t)out % 16 == 0) {
        for (; i + 64 <= length; i += 64) {
            for (int part = 0; part < 64; part += 16) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)(data + i + part));
                _mm_stream_si128((__m128i *)(out + i + part), bytes);
            }
        }
        _mm_sfence();
    }
#endif
    memcpy(out + i, data + i, length - i);
}

size_t ich_encode(const uint8_t *pixels, size_t slice_bytes, size_t typesize, size_t row_bytes, size_t blocksize,
                  uint8_t *out, uint8_t *scratch) {
    size_t blocks = nblocks(slice_bytes, blocksize), end = HEADER_BYTES + OFFSET_BYTES * blocks;
    uint64_t *lz4_memory = (uint64_t *)scratch; /* first, where `scratch` is aligned */
    uint8_t *shuffled = scratch + lz4_scratch(blocksize);
    for (size_t block = 0; block < blocks; block++) {
        const uint8_t *data = pixels + block * blocksize;
        size_t length = min(blocksize, slice_bytes - block * blocksize);
        size_t streams = nstreams(length, blocksize, typesize), stream = length / streams;
        if (typesize == 2) {
            shuffle16(data, length, shuffled);
            data = shuffled;
        }
        store_u32(out + HEADER_BYTES + OFFSET_BYTES * block, (uint32_t)end);
        for (size_t i = 0; i < streams; i++, data += stream) {
            uint8_t *payload = out + end + LENGTH_BYTES;
            size_t encoded = lz4_encode(data, stream, row_bytes / typesize, payload, lz4_memory);
            if (encoded >= stream) { /* a stream that does not shrink is stored; decoders recognize it by its length */
                memcpy(payload, data, stream);
                encoded = stream;
            }
            store_u32(out + end, (uint32_t)encoded);
            end += LENGTH_BYTES + encoded;
        }
    }
    out[0] = VERSION_FORMAT;
    out[1] = LZ4_VERSION_FORMAT;
    out[2] = (uint8_t)(LZ4_FORMAT << CODEC_SHIFT | (typesize > 1 ? DOSHUFFLE : 0) |
                       (blocksize / typesize >= MIN_BUFFERSIZE ? 0 : DONT_SPLIT));
    out[3] = (uint8_t)typesize;
    store_u32(out + 4, (uint32_t)slice_bytes);
    store_u32(out + 8, (uint32_t)blocksize);
    store_u32(out + 12, (uint32_t)end);
    return end;
}

uint32_t ich_frame_nbytes(const uint8_t *frame) {
    return load_u32(frame + 4);
}

enum ich_status ich_decode(const uint8_t *frame, size_t length, uint8_t *out, size_t slice_bytes, uint8_t *scratch) {
    if (length < HEADER_BYTES || frame[0] != VERSION_FORMAT || load_u32(frame + 12) != length) {
        return ICH_FRAME;
    }
    if (ich_frame_nbytes(frame) != slice_bytes) {
        return ICH_LENGTH;
    }
    unsigned flags = frame[2];
    size_t typesize = frame[3], blocksize = load_u32(frame + 8);
    if (flags & MEMCPYED) {
        if (length != HEADER_BYTES + slice_bytes) {
            return ICH_FRAME;
        }
        ich_stream_copy(out, frame + HEADER_BYTES, slice_bytes);
        return ICH_OK;
    }
    if (flags >> CODEC_SHIFT != LZ4_FORMAT || flags & DOBITSHUFFLE || typesize < 1 || typesize > 2 || blocksize < 1 ||
        blocksize % typesize || slice_bytes % typesize) {
        return ICH_FRAME;
    }
    int shuffled = flags & DOSHUFFLE && typesize == 2;
    size_t blocks = nblocks(slice_bytes, blocksize);
    if (blocks > (length - HEADER_BYTES) / OFFSET_BYTES) {
        return ICH_FRAME;
    }
    for (size_t block = 0; block < blocks; block++) {
        size_t offset = load_u32(frame + HEADER_BYTES + OFFSET_BYTES * block);
        size_t block_length = min(blocksize, slice_bytes - block * blocksize);
        size_t streams = flags & DONT_SPLIT ? 1 : nstreams(block_length, blocksize, typesize);
        size_t stream = block_length / streams;
        uint8_t *items = out + block * blocksize, *data = shuffled ? scratch : items;
        for (size_t i = 0; i < streams; i++, data += stream) {
            if (offset > length || length - offset < LENGTH_BYTES) {
                return ICH_FRAME;
            }
            size_t encoded = load_u32(frame + offset);
            offset += LENGTH_BYTES;
            if (encoded > length - offset) {
                return ICH_FRAME;
            }
            if (encoded == stream) {
                memcpy(data, frame + offset, stream);
            } else if (!lz4_decode(frame + offset, encoded, data, stream)) {
                return ICH_FRAME;
            }
            offset += encoded;
        }
        if (shuffled) {
            unshuffle16(scratch, block_length, items);
        }
    }
    return ICH_OK;
}
