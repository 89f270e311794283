/* LZ4 blocks; used by frame.c only. */

#ifndef ICH_LZ4_H
#define ICH_LZ4_H

#include "ich.h"

/* Return the maximum length of the LZ4 block of `length` bytes. */
size_t lz4_bound(size_t length);

/* Return the size in bytes of the scratch memory of lz4_encode. */
size_t lz4_scratch(size_t length);

/* Encode `length` bytes as one LZ4 block and return its length. The data are image rows of `row` bytes. */
size_t lz4_encode(const uint8_t *data, size_t length, size_t row, uint8_t *out, uint64_t *scratch);

/* Decode any LZ4 block; return 1 if it is valid and decodes to exactly `length` bytes, else 0. `in` is untrusted: no byte
   outside of `in` and `out` is read or written, whatever it contains. */
int lz4_decode(const uint8_t *in, size_t in_length, uint8_t *out, size_t length);

#endif
