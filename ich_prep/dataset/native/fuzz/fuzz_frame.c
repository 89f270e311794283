/* A libFuzzer target for all code that reads or writes frames. Not compiled into the extension; see ../README.md.

   The first four bytes of an input choose what happens to the rest: it is decoded as a frame, or it is a picture, which must
   survive encoding and decoding. Every buffer has exactly the promised size, so that AddressSanitizer detects an access one byte past its end. */

#include "../ich.h"

#include <stdlib.h>

enum { CHOICES = 4, FRAME_HEADER = 16, MAX_SLICE = 1 << 18 };

static void require(int condition) {
    if (!condition) {
        abort();
    }
}

/* malloc that never returns NULL. */
static uint8_t *allocate(size_t size) {
    uint8_t *memory = malloc(size ? size : 1);
    require(memory != NULL);
    return memory;
}

static uint8_t *copy_of(const uint8_t *data, size_t size) {
    uint8_t *copy = allocate(size);
    memcpy(copy, data, size);
    return copy;
}

/* Decode untrusted bytes. The lengths in the header are corrected for most inputs: a fuzzer rarely guesses them. */
static void decode(const uint8_t *data, size_t size, unsigned choice) {
    uint8_t *frame = copy_of(data, size);
    size_t slice_bytes = 1 + (choice >> 1) % MAX_SLICE;
    if (size >= FRAME_HEADER && choice & 1) {
        slice_bytes = ich_frame_nbytes(frame);
        if (slice_bytes < 1 || slice_bytes > MAX_SLICE) {
            slice_bytes = 1 + slice_bytes % MAX_SLICE;
            store_u32(frame + 4, (uint32_t)slice_bytes);
        }
        frame[0] = 2;
        store_u32(frame + 12, (uint32_t)size);
    }
    uint8_t *out = allocate(slice_bytes), *scratch = allocate(slice_bytes);
    ich_decode(frame, size, out, slice_bytes, scratch);
    free(scratch);
    free(out);
    free(frame);
}

/* Encode a picture of the given bytes, decode the frame and compare; checksum it whole and in two parts. */
static void round_trip(const uint8_t *data, size_t size, unsigned row_choice, unsigned block_choice, size_t typesize) {
    size_t row_bytes = (1 + row_choice % 200) * typesize, rows = size / row_bytes;
    if (rows == 0) {
        return;
    }
    size_t slice_bytes = rows * row_bytes, blocksize = (1 + block_choice % rows) * row_bytes;
    size_t bound = ich_frame_bound(slice_bytes, blocksize, typesize);
    uint8_t *pixels = copy_of(data, slice_bytes), *frame = allocate(bound), *out = allocate(slice_bytes);
    uint8_t *encode_scratch = allocate(ich_encode_scratch(blocksize)), *decode_scratch = allocate(slice_bytes);
    size_t length = ich_encode(pixels, slice_bytes, typesize, row_bytes, blocksize, frame, encode_scratch);
    require(length <= bound);
    uint8_t *exact = copy_of(frame, length);
    require(ich_decode(exact, length, out, slice_bytes, decode_scratch) == ICH_OK);
    require(memcmp(out, pixels, slice_bytes) == 0);
    size_t half = slice_bytes / 2;
    require(ich_crc32c(ich_crc32c(0, pixels, half), pixels + half, slice_bytes - half) ==
            ich_crc32c(0, pixels, slice_bytes));
    free(exact);
    free(decode_scratch);
    free(encode_scratch);
    free(out);
    free(frame);
    free(pixels);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < CHOICES) {
        return 0;
    }
    const uint8_t *rest = data + CHOICES;
    unsigned choice = data[1] | (unsigned)data[2] << 8;
    if (data[0] & 1) {
        round_trip(rest, size - CHOICES, data[1], data[2], data[3] & 1 ? 2 : 1);
    } else {
        decode(rest, size - CHOICES, choice << 1 | (data[3] & 1));
    }
    return 0;
}
