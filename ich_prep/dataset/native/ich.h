/* What Python calls of the compiled library (see compiled.py), and what its parts share. Memory is the caller's. */

#ifndef ICH_H
#define ICH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Without ICH_PORTABLE, by which tests compile what other processors run. */
#if defined(__SSE2__) && !defined(ICH_PORTABLE)
#define ICH_SSE2
#include <emmintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Shards are read and written on little-endian machines alone."
#endif

/* What Python calls; all else stays inside of the library. */
#define ICH_API __attribute__((visibility("default")))

/* Counts the changes of the functions that Python calls, and of the bytes that they make: see compiled.py. */
enum { ICH_INTERFACE = 1 };
ICH_API int ich_interface(void);

/* What can be wrong with a chunk; compiled.py has the words for them. A negative value is an errno. */
enum ich_fault { ICH_FINE, ICH_ENDS_EARLY, ICH_CHECKSUM, ICH_LENGTH, ICH_FRAME };

enum { ICH_CHECKSUM_BYTES = 4 };

/* CRC-32C of what `crc` is the checksum of (0: of nothing), and then of `length` bytes of `data`. */
ICH_API uint32_t ich_crc32c(uint32_t crc, const uint8_t *data, size_t length);

/* The length of the longest frame that ich_encode makes of a slice. */
ICH_API size_t ich_frame_room(size_t slice_bytes, size_t block_bytes, size_t item_bytes);

/* The blosc frame (codec lz4, byte shuffle) of one slice, whose rows are `row_bytes` long, of items of 1 or 2 bytes. `out`
   has room for the longest one, `scratch` is as long as ich_encode_scratch says. Returns the frame's length. */
ICH_API size_t ich_encode_scratch(size_t block_bytes);
ICH_API size_t ich_encode(const uint8_t *pixels, size_t slice_bytes, size_t item_bytes, size_t row_bytes,
                          size_t block_bytes, uint8_t *out, uint8_t *scratch);

/* How long a frame, of eight bytes at least, says that it is when inflated. */
uint32_t ich_inflated(const uint8_t *frame);

/* Inflates a blosc frame (codec lz4 or none, byte shuffle or none) to `slice_bytes`; `scratch` has room for as many. */
ICH_API enum ich_fault ich_decode(const uint8_t *frame, size_t length, uint8_t *out, size_t slice_bytes,
                                  uint8_t *scratch);

/* Writes plane after plane of `count` codes: byte w of the table's entry for each word, for w of up to four windows. */
ICH_API void ich_windows(const uint16_t *words, size_t count, const uint32_t *table, int windows, uint8_t *out);

/* Copies past the caches where that is possible: memory that is not read again soon need not be fetched to be written. */
void ich_copy_past_caches(uint8_t *out, const uint8_t *data, size_t length);

/* Of a dataset: of ICH_OTHER chunks are read and checked, and left as they are. */
enum ich_codec { ICH_NONE, ICH_LZ4, ICH_OTHER };

/* One chunk: where it lies, and where in the reader's memory it goes. */
struct ich_request {
    int64_t file, begin, length, place;
};

/* How much scratch ich_read needs for chunks of up to `longest` bytes. */
ICH_API size_t ich_read_scratch(int codec, size_t longest, size_t slice_bytes);

/* What is wrong with which request; with ICH_LENGTH also how many bytes it has for a slice. */
struct ich_trouble {
    int64_t request, fault, found;
};

/* Reads `count` chunks of up to `longest` bytes, compares their checksums and decodes each to its place in `out`: first
   those that lie in memory, while the disk is asked for all others. `late` has a byte for each. Returns whether there is
   `trouble` with one. */
ICH_API int ich_read(const struct ich_request *requests, int64_t count, int codec, uint8_t *out, size_t slice_bytes,
                     size_t longest, uint8_t *scratch, uint8_t *late, struct ich_trouble *trouble);

static inline uint32_t load_u32(const uint8_t *at) {
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static inline void store_u32(uint8_t *at, uint32_t value) {
    for (int byte = 0; byte < 4; byte++) {
        at[byte] = (uint8_t)(value >> 8 * byte);
    }
}

#endif
