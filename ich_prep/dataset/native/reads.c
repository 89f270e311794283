/* Many chunks of many files in one call: read, their checksums compared, decoded. No lock of Python's is held meanwhile. */

#define _GNU_SOURCE
#include "ich.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of an uncompressed chunk: what is read at a time, and stays in the core's second cache; what stays in the first. */
enum { PIECE = 256 * 1024, NEAREST = 12 * 1024 };

/* What is the same for all chunks of a call. */
struct job {
    enum ich_codec codec;
    uint8_t *out;
    size_t slice_bytes;
    size_t longest;   /* of the chunks */
    uint8_t *scratch; /* for what is read at a time; behind a chunk that is decoded, for a slice */
};

size_t ich_read_scratch(int codec, size_t longest, size_t slice_bytes) {
    switch (codec) {
    case ICH_NONE:
        return PIECE + ICH_CHECKSUM_BYTES;
    case ICH_LZ4:
        return longest + slice_bytes;
    default:
        return 0;
    }
}

/* Reads all of `length` bytes; returns a fault, or a negative errno. */
static int read_whole(int file, uint8_t *out, size_t length, int64_t begin, int flags) {
    while (length) {
        ssize_t found = preadv2(file, &(struct iovec){out, length}, 1, begin, flags);
        if (found < 0) {
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        if (found == 0) {
            return ICH_ENDS_EARLY;
        }
        out += found;
        begin += found;
        length -= (size_t)found;
    }
    return ICH_FINE;
}

/* A chunk that is no frame: copied piece by piece from where its checksum is taken. */
static int take_plain(const struct job *job, const struct ich_request *request, int flags) {
    int file = (int)request->file;
    int64_t begin = request->begin;
    size_t length = (size_t)request->length;
    uint8_t *out = job->out + request->place;
    if (length != job->slice_bytes + ICH_CHECKSUM_BYTES) {
        return ICH_LENGTH;
    }
    uint32_t sum = 0;
    while (length) {
        size_t some = length <= PIECE + ICH_CHECKSUM_BYTES ? length : PIECE;
        int fault = read_whole(file, job->scratch, some, begin, flags);
        if (fault) {
            return fault;
        }
        size_t pixels = some == length ? some - ICH_CHECKSUM_BYTES : some;
        for (size_t at = 0, near; at < pixels; at += near) {
            near = pixels - at < NEAREST ? pixels - at : NEAREST;
            sum = ich_crc32c(sum, job->scratch + at, near);
            ich_copy_past_caches(out + at, job->scratch + at, near);
        }
        out += pixels;
        begin += (int64_t)some;
        length -= some;
        if (!length && sum != load_u32(job->scratch + pixels)) {
            return ICH_CHECKSUM;
        }
    }
    return ICH_FINE;
}

static int take(const struct job *job, const struct ich_request *request, int flags) {
    if (job->codec == ICH_NONE) {
        return take_plain(job, request, flags);
    }
    uint8_t *out = job->out + request->place, *chunk = job->codec == ICH_LZ4 ? job->scratch : out;
    size_t length = (size_t)request->length;
    if (length <= ICH_CHECKSUM_BYTES) {
        return ICH_FRAME;
    }
    int fault = read_whole((int)request->file, chunk, length, request->begin, flags);
    if (fault) {
        return fault;
    }
    length -= ICH_CHECKSUM_BYTES;
    if (ich_crc32c(0, chunk, length) != load_u32(chunk + length)) {
        return ICH_CHECKSUM;
    }
    if (job->codec == ICH_OTHER) {
        return ICH_FINE;
    }
    return (int)ich_decode(chunk, length, out, job->slice_bytes, job->scratch + job->longest);
}

static int tell(const struct job *job, const struct ich_request *requests, int64_t at, int fault,
                struct ich_trouble *trouble) {
    int64_t found = 0;
    if (fault == ICH_LENGTH) {
        found = job->codec == ICH_NONE ? requests[at].length - ICH_CHECKSUM_BYTES : ich_inflated(job->scratch);
    }
    *trouble = (struct ich_trouble){at, fault, found};
    return 1;
}

int ich_read(const struct ich_request *requests, int64_t count, int codec, uint8_t *out, size_t slice_bytes,
             size_t longest, uint8_t *scratch, uint8_t *late, struct ich_trouble *trouble) {
    const struct job job = {(enum ich_codec)codec, out, slice_bytes, longest, scratch};
    int64_t waits = 0;
    for (int64_t at = 0; at < count; at++) {
        int fault = take(&job, &requests[at], RWF_NOWAIT);
        late[at] = fault < 0 || fault == ICH_ENDS_EARLY; /* a plain read will tell what is wrong, if anything is */
        if (fault && !late[at]) {
            return tell(&job, requests, at, fault, trouble);
        }
        waits += late[at];
    }
    for (int64_t at = 0; waits && at < count; at++) {
        if (late[at]) {
            posix_fadvise((int)requests[at].file, requests[at].begin, requests[at].length, POSIX_FADV_WILLNEED);
        }
    }
    for (int64_t at = 0; waits && at < count; at++) {
        int fault = late[at] ? take(&job, &requests[at], 0) : ICH_FINE;
        if (fault) {
            return tell(&job, requests, at, fault, trouble);
        }
    }
    return 0;
}
