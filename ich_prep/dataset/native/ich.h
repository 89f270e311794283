/* The interface of the compiled library, which native.py calls, and the declarations that its parts share. The library
   allocates no memory and keeps no state but the CRC tables: every buffer is the caller's. See README.md. */

#ifndef ICH_H
#define ICH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ICH_PORTABLE: used in tests, to compile the code for processors without these instructions. */
#if defined(__SSE2__) && !defined(ICH_PORTABLE)
#define ICH_SSE2
#include <emmintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Only little-endian processors are supported."
#endif

/* Exported functions; all others are hidden. */
#define ICH_API __attribute__((visibility("default")))

/* Version of the functions, structs and enums in this file. Raise it, and INTERFACE in native.py, with every change to
   one of them: Python refuses a library that was compiled from other sources. */
enum { ICH_INTERFACE = 3 };

/* Version of the frames that ich_encode makes. Raise it, and ENCODER in native.py, when equal pixels give other bytes than
   before. Frames of every earlier version stay readable: that is a promise of the dataset format. */
enum { ICH_ENCODER = 1 };

ICH_API int ich_interface(void);
ICH_API int ich_encoder(void);
ICH_API size_t ich_request_bytes(void); /* sizeof(struct ich_request) */
ICH_API size_t ich_fault_bytes(void);   /* sizeof(struct ich_fault) */

/* What is wrong with a chunk. A negative value is a negated errno. */
enum ich_status {
    ICH_OK,
    ICH_TRUNCATED,   /* the file ends inside the chunk */
    ICH_CHECKSUM,    /* the stored checksum differs from the computed one */
    ICH_LENGTH,      /* the chunk does not decode to one slice */
    ICH_FRAME,       /* not a valid LZ4 blosc frame */
    ICH_OTHER_CHUNK, /* a valid chunk, but its checksum is not the expected one */
};

enum { ICH_CRC_BYTES = 4 };

/* Return the CRC-32C of `length` bytes of `data`, continued from `crc` (0 to start). */
ICH_API uint32_t ich_crc32c(uint32_t crc, const uint8_t *data, size_t length);

/* Return the maximum length of a frame of `slice_bytes` bytes. */
ICH_API size_t ich_frame_bound(size_t slice_bytes, size_t blocksize, size_t typesize);

/* Return the size of the scratch memory of ich_encode. */
ICH_API size_t ich_encode_scratch(size_t blocksize);

/* Encode one slice as a blosc frame (LZ4, byte shuffle) and return the frame's length. `typesize` is 1 or 2; `row_bytes` is
   the length of an image row; `out` has ich_frame_bound bytes, `scratch` ich_encode_scratch bytes, aligned to 8. */
ICH_API size_t ich_encode(const uint8_t *pixels, size_t slice_bytes, size_t typesize, size_t row_bytes, size_t blocksize,
                          uint8_t *out, uint8_t *scratch);

/* Return the decoded length that the header of a frame states; `frame` has at least 8 bytes. */
uint32_t ich_frame_nbytes(const uint8_t *frame);

/* Decode a blosc frame (LZ4 or memcpyed, byte shuffle or none) to `slice_bytes` bytes. `frame` is untrusted: no byte outside
   of `frame`, `out` and `scratch` (`slice_bytes` bytes each) is read or written, whatever it contains. */
ICH_API enum ich_status ich_decode(const uint8_t *frame, size_t length, uint8_t *out, size_t slice_bytes, uint8_t *scratch);

/* Look up `count` stored values in `table` (65,536 entries); write byte w of each entry to plane w of `out`, for up to four
   windows. */
ICH_API void ich_windows(const uint16_t *stored, size_t count, const uint32_t *table, int windows, uint8_t *out);

/* Copy with non-temporal (streaming) stores where possible: `out` does not displace the cache, nor is it fetched first. */
void ich_stream_copy(uint8_t *out, const uint8_t *data, size_t length);

/* What ich_read does with a chunk after its checksum is verified. */
enum ich_codec {
    ICH_RAW,       /* copy the payload */
    ICH_LZ4,       /* decode the payload, a blosc frame */
    ICH_UNDECODED, /* leave the chunk as it was read, checksum included */
};

/* One chunk to read. native.REQUEST is the same as a NumPy dtype. */
struct ich_request {
    int64_t fd;         /* of the file; -1: the chunk is in memory */
    int64_t offset;     /* of the chunk in the file; in memory its address */
    int64_t length;     /* of the chunk, checksum included */
    int64_t out_offset; /* of the slice in the output buffer */
    uint32_t crc32c;    /* the checksum that is expected after the payload */
    uint32_t check_crc; /* 1: compare the stored checksum with crc32c; 0: ignore crc32c */
};

/* The first fault of a call. native.FAULT is the same as a NumPy dtype. */
struct ich_fault {
    int64_t request;  /* index of the request */
    int64_t status;   /* enum ich_status, or a negated errno */
    int64_t expected; /* ICH_CHECKSUM: the stored checksum; ICH_LENGTH: bytes of a slice; ICH_OTHER_CHUNK: request.crc32c */
    int64_t found;    /* ICH_CHECKSUM: the computed one; ICH_LENGTH: bytes of this chunk; ICH_OTHER_CHUNK: the stored one */
};

/* Return the size of the scratch memory of ich_read for chunks of up to `max_chunk` bytes. */
ICH_API size_t ich_read_scratch(int codec, size_t max_chunk, size_t slice_bytes);

/* Read `count` chunks of up to `max_chunk` bytes, verify their checksums and decode each to its place in `out`. Chunks in the
   page cache are read first, while the disk fetches the others. `deferred` has one byte per request. Return 0, or 1 with
   `fault` filled in. */
ICH_API int ich_read(const struct ich_request *requests, int64_t count, int codec, uint8_t *out, size_t slice_bytes,
                     size_t max_chunk, uint8_t *scratch, uint8_t *deferred, struct ich_fault *fault);

static inline uint32_t load_u32(const uint8_t *at) {
    return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
}

static inline void store_u32(uint8_t *at, uint32_t value) {
    for (int byte = 0; byte < 4; byte++) {
        at[byte] = (uint8_t)(value >> 8 * byte);
    }
}

#endif
