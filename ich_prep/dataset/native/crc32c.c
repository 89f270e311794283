/* CRC-32C (Castagnoli; RFC 3720, appendix B.4). The processor's CRC instruction has a latency of about three cycles and a
   throughput of one per cycle: so three lanes are computed side by side, and combined by a table. Without the instruction:
   slicing-by-8. */

#include "ich.h"

#if !defined(ICH_PORTABLE) && defined(__x86_64__)
#define ICH_CRC_INSTRUCTION
#include <cpuid.h>
#elif !defined(ICH_PORTABLE) && defined(__aarch64__)
#define ICH_CRC_INSTRUCTION
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

static const uint32_t POLYNOMIAL = 0x82f63b78u; /* reflected */

static uint32_t slice_table[8][256]; /* [n][byte]: the CRC of the byte followed by n zero bytes */

static uint32_t append_zero(uint32_t crc) {
    return crc >> 8 ^ slice_table[0][crc & 255];
}

static void init_slice_table(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        }
        slice_table[0][byte] = crc;
    }
    for (int zeros = 1; zeros < 8; zeros++) {
        for (int byte = 0; byte < 256; byte++) {
            slice_table[zeros][byte] = append_zero(slice_table[zeros - 1][byte]);
        }
    }
}

static uint32_t update_by_slices(uint32_t crc, const uint8_t *data, size_t length) {
    for (; length >= 8; data += 8, length -= 8) {
        uint32_t low = crc ^ load_u32(data), high = load_u32(data + 4);
        crc = slice_table[7][low & 255] ^ slice_table[6][low >> 8 & 255] ^ slice_table[5][low >> 16 & 255] ^
              slice_table[4][low >> 24] ^ slice_table[3][high & 255] ^ slice_table[2][high >> 8 & 255] ^
              slice_table[1][high >> 16 & 255] ^ slice_table[0][high >> 24];
    }
    while (length--) {
        crc = crc >> 8 ^ slice_table[0][(crc ^ *data++) & 255];
    }
    return crc;
}

#ifdef ICH_CRC_INSTRUCTION
enum { LANE_BYTES = 1024 };
static uint32_t shift_table[4][256]; /* [n][byte]: the CRC whose byte n this is, after LANE_BYTES zero bytes */

static void init_shift_table(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t without_lowest = byte & (byte - 1);
        for (int place = 0; place < 4; place++) {
            if (without_lowest) { /* CRCs are linear: combine the entry of the lowest bit with that of the others */
                shift_table[place][byte] = shift_table[place][without_lowest] ^ shift_table[place][byte ^ without_lowest];
                continue;
            }
            uint32_t crc = byte << 8 * place;
            for (int zero = 0; zero < LANE_BYTES; zero++) {
                crc = append_zero(crc);
            }
            shift_table[place][byte] = crc;
        }
    }
}

/* Append LANE_BYTES zero bytes. */
static uint32_t shift_lane(uint32_t crc) {
    return shift_table[0][crc & 255] ^ shift_table[1][crc >> 8 & 255] ^ shift_table[2][crc >> 16 & 255] ^
           shift_table[3][crc >> 24];
}

/* Inline assembly: compilers disagree on how to enable an instruction for a single function. */
#ifdef __x86_64__
static int has_crc_instruction(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_SSE4_2;
}

static inline uint64_t crc_u64(uint64_t crc, uint64_t word) {
    __asm__("crc32q %1, %0" : "+r"(crc) : "rm"(word));
    return crc;
}

static inline uint32_t crc_u8(uint32_t crc, uint8_t byte) {
    __asm__("crc32b %1, %0" : "+r"(crc) : "qm"(byte));
    return crc;
}
#else
static int has_crc_instruction(void) {
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}

static inline uint64_t crc_u64(uint64_t crc, uint64_t word) {
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word));
    return crc;
}

static inline uint32_t crc_u8(uint32_t crc, uint8_t byte) {
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(byte));
    return crc;
}
#endif

static inline uint64_t crc_8_bytes(uint64_t crc, const uint8_t *data) {
    uint64_t word;
    memcpy(&word, data, 8);
    return crc_u64(crc, word);
}

static uint32_t update_by_instruction(uint32_t crc, const uint8_t *data, size_t length) {
    for (; length >= 3 * LANE_BYTES; data += 3 * LANE_BYTES, length -= 3 * LANE_BYTES) {
        uint64_t first = crc, second = 0, third = 0;
        for (size_t i = 0; i < LANE_BYTES; i += 8) {
            first = crc_8_bytes(first, data + i);
            second = crc_8_bytes(second, data + LANE_BYTES + i);
            third = crc_8_bytes(third, data + 2 * LANE_BYTES + i);
        }
        crc = shift_lane(shift_lane((uint32_t)first) ^ (uint32_t)second) ^ (uint32_t)third;
    }
    for (; length >= 8; data += 8, length -= 8) {
        crc = (uint32_t)crc_8_bytes(crc, data);
    }
    while (length--) {
        crc = crc_u8(crc, *data++);
    }
    return crc;
}
#endif

static uint32_t (*update)(uint32_t crc, const uint8_t *data, size_t length) = update_by_slices;

/* Run once, when the library is loaded: no caller has to wait for another. */
__attribute__((constructor)) static void init(void) {
    init_slice_table();
#ifdef ICH_CRC_INSTRUCTION
    if (has_crc_instruction()) {
        init_shift_table();
        update = update_by_instruction;
    }
#endif
}

uint32_t ich_crc32c(uint32_t crc, const uint8_t *data, size_t length) {
    return ~update(~crc, data, length);
}
