/* CRC-32C (Castagnoli; RFC 3720, appendix B.4). Processors have an instruction for it, whose result takes some cycles to come
   and which can be started at each: so three stretches are summed side by side, and their sums joined by a table. */

#include "ich.h"

#include <pthread.h>
#if !defined(ICH_PORTABLE) && defined(__x86_64__)
#define ICH_INSTRUCTION
#include <cpuid.h>
#elif !defined(ICH_PORTABLE) && defined(__aarch64__)
#define ICH_INSTRUCTION
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

static const uint32_t POLYNOMIAL = 0x82f63b78u;

static uint32_t by_byte[8][256]; /* what a byte does to the sum, 0 to 7 bytes before the end of eight */

/* The sum after a zero byte. */
static uint32_t after_zero(uint32_t sum) {
    return sum >> 8 ^ by_byte[0][sum & 255];
}

static void prepare_bytes(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t sum = byte;
        for (int bit = 0; bit < 8; bit++) {
            sum = sum >> 1 ^ (sum & 1 ? POLYNOMIAL : 0);
        }
        by_byte[0][byte] = sum;
    }
    for (int more = 1; more < 8; more++) {
        for (int byte = 0; byte < 256; byte++) {
            by_byte[more][byte] = after_zero(by_byte[more - 1][byte]);
        }
    }
}

static uint32_t sum_by_tables(uint32_t sum, const uint8_t *data, size_t length) {
    for (; length >= 8; data += 8, length -= 8) {
        uint32_t low = sum ^ load_u32(data), high = load_u32(data + 4);
        sum = by_byte[7][low & 255] ^ by_byte[6][low >> 8 & 255] ^ by_byte[5][low >> 16 & 255] ^ by_byte[4][low >> 24] ^
              by_byte[3][high & 255] ^ by_byte[2][high >> 8 & 255] ^ by_byte[1][high >> 16 & 255] ^ by_byte[0][high >> 24];
    }
    while (length--) {
        sum = sum >> 8 ^ by_byte[0][(sum ^ *data++) & 255];
    }
    return sum;
}

#ifdef ICH_INSTRUCTION
enum { STRETCH = 1024 };
static uint32_t over_stretch[4][256]; /* what STRETCH zero bytes do to each byte of a sum */

static void prepare_stretches(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t others = byte & (byte - 1);
        for (int place = 0; place < 4; place++) {
            if (others) { /* sums are linear: that of two bits is that of one and that of the other */
                over_stretch[place][byte] = over_stretch[place][others] ^ over_stretch[place][byte ^ others];
                continue;
            }
            uint32_t sum = byte << 8 * place;
            for (int zero = 0; zero < STRETCH; zero++) {
                sum = after_zero(sum);
            }
            over_stretch[place][byte] = sum;
        }
    }
}

static uint32_t shifted(uint32_t sum) {
    return over_stretch[0][sum & 255] ^ over_stretch[1][sum >> 8 & 255] ^ over_stretch[2][sum >> 16 & 255] ^
           over_stretch[3][sum >> 24];
}

/* Written out, since compilers do not agree on how a function says that it is for processors that have them. */
#ifdef __x86_64__
static int has_instruction(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_SSE4_2;
}

static inline uint64_t with_word(uint64_t sum, uint64_t word) {
    __asm__("crc32q %1, %0" : "+r"(sum) : "rm"(word));
    return sum;
}

static inline uint32_t with_byte(uint32_t sum, uint8_t byte) {
    __asm__("crc32b %1, %0" : "+r"(sum) : "qm"(byte));
    return sum;
}
#else
static int has_instruction(void) {
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}

static inline uint64_t with_word(uint64_t sum, uint64_t word) {
    __asm__(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(sum) : "r"(word));
    return sum;
}

static inline uint32_t with_byte(uint32_t sum, uint8_t byte) {
    __asm__(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(sum) : "r"(byte));
    return sum;
}
#endif

static inline uint64_t with_8_bytes(uint64_t sum, const uint8_t *data) {
    uint64_t word;
    memcpy(&word, data, 8);
    return with_word(sum, word);
}

static uint32_t sum_by_instruction(uint32_t sum, const uint8_t *data, size_t length) {
    for (; length >= 3 * STRETCH; data += 3 * STRETCH, length -= 3 * STRETCH) {
        uint64_t first = sum, second = 0, third = 0;
        for (size_t at = 0; at < STRETCH; at += 8) {
            first = with_8_bytes(first, data + at);
            second = with_8_bytes(second, data + STRETCH + at);
            third = with_8_bytes(third, data + 2 * STRETCH + at);
        }
        sum = shifted(shifted((uint32_t)first) ^ (uint32_t)second) ^ (uint32_t)third;
    }
    for (; length >= 8; data += 8, length -= 8) {
        sum = (uint32_t)with_8_bytes(sum, data);
    }
    while (length--) {
        sum = with_byte(sum, *data++);
    }
    return sum;
}
#endif

static uint32_t (*sum_of)(uint32_t sum, const uint8_t *data, size_t length) = sum_by_tables;

static void prepare(void) {
    prepare_bytes();
#ifdef ICH_INSTRUCTION
    if (has_instruction()) {
        prepare_stretches();
        sum_of = sum_by_instruction;
    }
#endif
}

uint32_t ich_crc32c(uint32_t crc, const uint8_t *data, size_t length) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, prepare);
    return ~sum_of(~crc, data, length);
}
