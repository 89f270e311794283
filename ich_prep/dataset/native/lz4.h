/* LZ4 blocks: for frame.c alone. */

#ifndef ICH_LZ4_H
#define ICH_LZ4_H

#include "ich.h"

/* The length of the longest block that lz4_encode makes of `length` bytes, and of the memory that it needs for it. */
size_t lz4_room(size_t length);
size_t lz4_scratch(size_t length);

/* Encodes `length` bytes of rows of `row` bytes; `equal` is the memory that it needs. Returns the length of the block. */
size_t lz4_encode(const uint8_t *data, size_t length, size_t row, uint8_t *out, uint64_t *equal);

/* Decodes any LZ4 block; returns whether it is whole and gives `length` bytes. Writes nowhere else, whatever it reads. */
int lz4_decode(const uint8_t *in, size_t in_length, uint8_t *out, size_t length);

#endif
