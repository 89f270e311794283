/* Many chunks from many files, or from memory, in one call: read, verified, decoded. The caller does not hold the GIL meanwhile. */

#define _GNU_SOURCE
#include "ich.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

/* Raw chunks are read in pieces that fit in L2, and checksummed and copied in pieces that fit in L1. */
enum { L2_PIECE = 256 * 1024, L1_PIECE = 12 * 1024 };

/* The arguments that all chunks of a call share. */
struct read_job {
    enum ich_codec codec;
    uint8_t *out;
    size_t slice_bytes;
    size_t max_chunk;
    uint8_t *scratch; /* ICH_RAW: one piece; ICH_LZ4: one chunk, then the scratch memory of ich_decode */
};

size_t ich_request_bytes(void) {
    return sizeof(struct ich_request);
}

size_t ich_fault_bytes(void) {
    return sizeof(struct ich_fault);
}

size_t ich_read_scratch(int codec, size_t max_chunk, size_t slice_bytes) {
    switch (codec) {
    case ICH_RAW:
        return L2_PIECE + ICH_CRC_BYTES;
    case ICH_LZ4:
        return max_chunk + slice_bytes;
    default:
        return 0;
    }
}

/* Read exactly `length` bytes; return ICH_OK, ICH_TRUNCATED or a negated errno. */
static int read_all(int fd, uint8_t *out, size_t length, int64_t offset, int flags) {
    if (fd < 0) {
        memcpy(out, (const uint8_t *)(intptr_t)offset, length);
        return ICH_OK;
    }
    while (length) {
        ssize_t count = preadv2(fd, &(struct iovec){out, length}, 1, offset, flags);
        if (count < 0) {
            if (errno == EINTR) {
                continue;
            }
            return -errno;
        }
        if (count == 0) {
            return ICH_TRUNCATED;
        }
        out += count;
        offset += count;
        length -= (size_t)count;
    }
    return ICH_OK;
}

static int fail(struct ich_fault *fault, enum ich_status status, int64_t expected, int64_t found) {
    fault->expected = expected;
    fault->found = found;
    return (int)status;
}

/* Compare the checksum after a payload with the computed one, then with the expected one if there is one. */
static int check_crc(const struct ich_request *request, uint32_t stored, uint32_t computed, struct ich_fault *fault) {
    if (computed != stored) {
        return fail(fault, ICH_CHECKSUM, stored, computed);
    }
    if (request->check_crc && stored != request->crc32c) {
        return fail(fault, ICH_OTHER_CHUNK, request->crc32c, stored);
    }
    return ICH_OK;
}

/* Read a chunk that is not compressed. Each piece is checksummed and copied while it is in the cache. */
static int read_raw_chunk(const struct read_job *job, const struct ich_request *request, int flags,
                          struct ich_fault *fault) {
    int64_t offset = request->offset;
    size_t left = (size_t)request->length;
    uint8_t *out = job->out + request->out_offset;
    if (left != job->slice_bytes + ICH_CRC_BYTES) {
        return fail(fault, ICH_LENGTH, (int64_t)job->slice_bytes, request->length - ICH_CRC_BYTES);
    }
    uint32_t crc = 0;
    for (;;) {
        size_t piece = left <= L2_PIECE + ICH_CRC_BYTES ? left : L2_PIECE;
        int status = read_all((int)request->fd, job->scratch, piece, offset, flags);
        if (status) {
            return status;
        }
        size_t pixels = piece == left ? piece - ICH_CRC_BYTES : piece;
        for (size_t i = 0, count; i < pixels; i += count) {
            count = pixels - i < L1_PIECE ? pixels - i : L1_PIECE;
            crc = ich_crc32c(crc, job->scratch + i, count);
            ich_stream_copy(out + i, job->scratch + i, count);
        }
        out += pixels;
        offset += (int64_t)piece;
        left -= piece;
        if (!left) {
            return check_crc(request, load_u32(job->scratch + pixels), crc, fault);
        }
    }
}

static int read_chunk(const struct read_job *job, const struct ich_request *request, int flags, struct ich_fault *fault) {
    if (job->codec == ICH_RAW) {
        return read_raw_chunk(job, request, flags, fault);
    }
    uint8_t *out = job->out + request->out_offset, *chunk = job->codec == ICH_LZ4 ? job->scratch : out;
    size_t length = (size_t)request->length;
    if (length <= ICH_CRC_BYTES) {
        return ICH_FRAME;
    }
    int status = read_all((int)request->fd, chunk, length, request->offset, flags);
    if (status) {
        return status;
    }
    length -= ICH_CRC_BYTES;
    status = check_crc(request, load_u32(chunk + length), ich_crc32c(0, chunk, length), fault);
    if (status || job->codec == ICH_UNDECODED) {
        return status;
    }
    status = (int)ich_decode(chunk, length, out, job->slice_bytes, job->scratch + job->max_chunk);
    if (status == ICH_LENGTH) {
        return fail(fault, ICH_LENGTH, (int64_t)job->slice_bytes, ich_frame_nbytes(chunk));
    }
    return status;
}

static int report(struct ich_fault *fault, int64_t request, int status) {
    fault->request = request;
    fault->status = status;
    return 1;
}

int ich_read(const struct ich_request *requests, int64_t count, int codec, uint8_t *out, size_t slice_bytes,
             size_t max_chunk, uint8_t *scratch, uint8_t *deferred, struct ich_fault *fault) {
    const struct read_job job = {(enum ich_codec)codec, out, slice_bytes, max_chunk, scratch};
    int64_t n_deferred = 0;
    for (int64_t i = 0; i < count; i++) {
        int status = read_chunk(&job, &requests[i], RWF_NOWAIT, fault);
        /* Not in the page cache, or no such reads on this file system. An ordinary read finds out whether it is a fault. */
        deferred[i] = status < 0 || status == ICH_TRUNCATED;
        if (status && !deferred[i]) {
            return report(fault, i, status);
        }
        n_deferred += deferred[i];
    }
    for (int64_t i = 0; n_deferred && i < count; i++) {
        if (deferred[i]) {
            posix_fadvise((int)requests[i].fd, requests[i].offset, requests[i].length, POSIX_FADV_WILLNEED);
        }
    }
    for (int64_t i = 0; n_deferred && i < count; i++) {
        int status = deferred[i] ? read_chunk(&job, &requests[i], 0, fault) : ICH_OK;
        if (status) {
            return report(fault, i, status);
        }
    }
    return 0;
}
