/* Random bytes and random numbers into what takes them from a file: checksum, planes, reader.
 *
 * Every buffer is allocated at its exact size, so that the address sanitizer sees one byte too many;
 * extents are random, most of them impossible.  What is accepted must bring the file's bytes, what
 * reaches beyond the file must fail as such.  Usage: fuzz_bytes <file> <rounds> <seed>
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fl_planes.h"
#include "fl_reader.h"
#include "fl_xxh64.h"

enum { SIZE = 200003, LARGE = 9 << 20, MAX_EXTENTS = 6 };

static uint64_t state;
static uint8_t content[SIZE];

static uint64_t next_word(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static uint64_t below(uint64_t n) { return next_word() % n; }

static void must(int good, const char *what)
{
    if (good) return;
    printf("broken: %s\n", what);
    exit(1);
}

static void *exact(size_t n)
{
    uint8_t *p = malloc(n ? n : 1);
    for (size_t i = 0; i < n; i++) p[i] = (uint8_t)next_word();
    return p;
}

static void checksum(void)
{
    const size_t n = below(300), shift = below(9);
    uint8_t *moved = malloc(n + shift + 1), *data = exact(n);
    const uint64_t seed = next_word();
    memcpy(moved + shift, data, n);
    const uint64_t digest = fl_xxh64(data, n, seed);
    must(digest == fl_xxh64(moved + shift, n, seed), "a digest depends on where the bytes lie");
    must(digest != fl_xxh64(data, n, seed + 1), "a digest does not depend on its seed");
    if (n) {
        data[below(n)] ^= (uint8_t)(1 + below(255));
        must(digest != fl_xxh64(data, n, seed), "a digest does not depend on a byte");
    }
    free(moved);
    free(data);
}

static void planes(void)
{
    const size_t n = below(200);
    uint8_t *values = exact(2 * n), *high = exact(n), *low = exact(n), *back = exact(2 * n);
    fl_planes_split16(values, n, high, low);
    fl_planes_join16(high, low, n, back);
    must(memcmp(values, back, 2 * n) == 0, "planes do not come back");
    free(values), free(high), free(low), free(back);
}

/* Mostly small, sometimes one of the numbers that overflow. */
static int64_t wild(int64_t usual)
{
    static const int64_t odd[] = {0, -1, 1, SIZE - 1, SIZE, SIZE + 1, 1ll << 31, 1ll << 32,
                                  INT64_MAX, INT64_MAX - 1, INT64_MIN, INT64_MAX - (1 << 20)};
    return below(4) ? (int64_t)below((uint64_t)usual) : odd[below(sizeof odd / sizeof *odd)];
}

/* One batch; `tame` makes its numbers consistent, so that reading itself is reached. */
static void batch(fl_reader *r, int tame)
{
    const size_t n = 1 + below(MAX_EXTENTS);
    /* The arrays end where they say, too. */
    int64_t *iov_length = malloc(n * 8), *check_length = malloc(n * 8);
    uint64_t *address = malloc(n * 8), *seed = malloc(n * 8), *digest = malloc(n * 8);
    int64_t offset[MAX_EXTENTS], length[MAX_EXTENTS];
    int32_t starts[MAX_EXTENTS + 1], checks[MAX_EXTENTS + 1];
    uint8_t *memory[MAX_EXTENTS];
    int64_t room[MAX_EXTENTS];
    int flipped[MAX_EXTENTS];

    starts[0] = checks[0] = 0;
    for (size_t e = 0; e < n; e++) {
        offset[e] = tame ? (int64_t)below(SIZE) : wild(SIZE);
        length[e] = tame ? 1 + (int64_t)below(5000) : wild(5000);
        room[e] = length[e] > 0 && length[e] < 100000 ? length[e] : 1;
        memory[e] = exact((size_t)room[e]);
        address[e] = (uintptr_t)memory[e];
        iov_length[e] = tame || below(3) ? length[e] : wild(5000);
        /* What is accepted is written: lengths beyond the room would be this harness's own fault. */
        if (length[e] != room[e]) iov_length[e] = 0;
        starts[e + 1] = tame || below(5) ? (int32_t)(e + 1) : (int32_t)wild(MAX_EXTENTS + 3);
        /* Beyond the end or before the start: another extent's memory would be a race of ours. */
        checks[e + 1] = tame || below(9) ? (int32_t)(e + 1)
                        : below(2)       ? (int32_t)(n + 1 + below(3))
                                         : -(int32_t)below(3) - 1;
        check_length[e] = tame || below(5) ? room[e] : -1;
        seed[e] = next_word();
        const int inside = offset[e] >= 0 && length[e] > 0 && offset[e] <= SIZE - room[e];
        digest[e] = inside ? fl_xxh64(content + offset[e], (size_t)room[e], seed[e]) : 0;
        flipped[e] = below(8) == 0;
        digest[e] ^= (uint64_t)flipped[e];
    }
    const fl_batch b = {n, n, n, offset, length, starts, address, iov_length, checks, address,
                        check_length, seed, digest};
    fl_ticket *ticket = NULL;
    fl_failure failure = {0};
    const int status = fl_reader_submit(r, &b, (int)(b.n_extents % 2), &ticket, &failure);
    must(status == FL_READ_OK || status == FL_REFUSED, "neither taken nor refused");
    must(!(tame && status == FL_REFUSED), "a good batch is refused");
    if (status == FL_READ_OK) {
        const int64_t upto = (int64_t)below(n + 1);
        int came;
        do came = fl_ticket_wait(ticket, upto, 1000000000, &failure); while (came == FL_TIMEOUT);
        const int64_t done = came == FL_READ_OK ? upto : failure.extent;
        for (int64_t e = 0; e < done; e++) {
            must(!flipped[e], "a wrong digest is accepted");
            must(memcmp(memory[e], content + offset[e], (size_t)length[e]) == 0, "other bytes");
        }
        if (came != FL_READ_OK) {
            const int64_t e = failure.extent;
            const int ends = offset[e] > SIZE - length[e];
            must(came == (ends ? FL_FAIL_END : FL_FAIL_CHECK), "another failure than was made");
        }
        fl_ticket_free(ticket);
    }
    for (size_t e = 0; e < n; e++) free(memory[e]);
    free(iov_length), free(check_length), free(address), free(seed), free(digest);
}

/* A run: frames in a row, as good tables say or as hostile ones do. */
static void one_run(fl_reader *r)
{
    const size_t n = 1 + below(MAX_EXTENTS);
    const int tame = below(2) == 0;
    uint64_t *offsets = exact(n * sizeof *offsets), *digests = exact(n * sizeof *digests);
    uint32_t *stored = exact(n * sizeof *stored);
    const int64_t start = (int64_t)below(SIZE / 2), length = 1 + (int64_t)below(SIZE / 2);
    uint8_t *memory = exact((size_t)length);
    int flipped = 0;

    for (size_t i = 0; i < n; i++) {
        const uint64_t at = below((uint64_t)length);
        offsets[i] = (uint64_t)start + at;
        stored[i] = (uint32_t)below((uint64_t)length - at + 1);
        digests[i] = fl_xxh64(content + offsets[i], stored[i], offsets[i] + 77);
        if (!tame && below(4) == 0) offsets[i] = (uint64_t)wild(SIZE);
        if (!tame && below(4) == 0) stored[i] = (uint32_t)wild(SIZE);
        if (below(16) == 0) digests[i] ^= 1, flipped = 1;
    }
    const fl_run run = {tame || below(4) ? start : wild(SIZE), length, (uintptr_t)memory, n,
                        offsets, stored, digests, 77};
    fl_ticket *ticket = NULL;
    fl_failure failure = {0};
    const int status = fl_reader_submit_run(r, &run, &ticket, &failure);
    must(status == FL_READ_OK || status == FL_REFUSED, "neither taken nor refused");
    must(!(tame && status == FL_REFUSED), "a good run is refused");
    if (status == FL_READ_OK) {
        int came;
        do came = fl_ticket_wait(ticket, 1, 1000000000, &failure); while (came == FL_TIMEOUT);
        must(!tame || came == (flipped ? FL_FAIL_CHECK : FL_READ_OK), "another end than was made");
        must(came != FL_READ_OK || !memcmp(memory, content + run.offset, (size_t)length), "bytes");
        fl_ticket_free(ticket);
    }
    free(offsets), free(digests), free(stored), free(memory);
}

#ifndef __SANITIZE_THREAD__ /* which is slow, and leaves no signal to the guard */
/* Any range of a file of `size` bytes, the content over and over, one call at a time. */
static void range(fl_reader *r, int64_t size, int64_t most)
{
    const int64_t offset = (int64_t)below((uint64_t)(size + size / 8));
    const int64_t length = (int64_t)below((uint64_t)most);
    uint8_t *out = exact((size_t)length);
    fl_failure failure = {0};
    const int came = fl_reader_read(r, offset, length, out, &failure);
    must(came == (offset + length > size && length ? FL_FAIL_END : FL_READ_OK), "a range's end");
    for (int64_t i = 0; came == FL_READ_OK && i < length; i++)
        must(out[i] == content[(offset + i) % SIZE], "other bytes in a range");
    free(out);
}
#endif

static int made(const char *path, int64_t size)
{
    const int fd = open(path, O_CREAT | O_TRUNC | O_RDWR, 0600);
    must(fd >= 0, "cannot make a file");
    for (int64_t at = 0; at < size; at += SIZE) {
        const size_t n = size - at < SIZE ? (size_t)(size - at) : SIZE;
        must(write(fd, content, n) == (ssize_t)n, "cannot write the file");
    }
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 4) return 2;
    const long rounds = atol(argv[2]);
    state = strtoull(argv[3], NULL, 10) * 2 + 1;
    for (size_t i = 0; i < SIZE; i++) content[i] = (uint8_t)next_word();
    close(made(argv[1], SIZE));
    /* Threads, a mapping, and a ring: it takes what reads through the page cache as well. */
    for (int way = 0; way < 3; way++) {
        int error = 0, ring_error = 0;
        fl_reader *r = fl_reader_open(open(argv[1], O_RDONLY), way == 1 ? FL_MMAP : FL_PREAD, SIZE, 3,
                                      way == 2 ? 5 : 0, 1, 1, &ring_error, &error);
        must(r != NULL, "cannot open");
        for (long i = 0; i < rounds; i++) {
            checksum();
            planes();
            batch(r, i % 2 == 0);
            one_run(r);
#ifndef __SANITIZE_THREAD__
            range(r, SIZE, 3 * (int64_t)SIZE / 2);
#endif
        }
        fl_reader_free(r);
    }
#ifndef __SANITIZE_THREAD__
    /* Large enough for blocks, and cut under the reader half-way: never a signal. */
    for (int mode = FL_PREAD; mode <= FL_MMAP; mode++) {
        int error = 0, ring_error = 0;
        const int fd = made(argv[1], LARGE);
        fl_reader *r = fl_reader_open(open(argv[1], O_RDONLY), mode, LARGE, 3, 0, 1, 1, &ring_error,
                                      &error);
        must(r != NULL, "cannot open the large file");
        for (long i = 0; i < rounds / 10; i++) range(r, LARGE, 3 << 20);
        must(fl_resident_bytes(fd, (int64_t)below(LARGE), 1 + (int64_t)below(LARGE)) >= 0, "mincore");
        must(ftruncate(fd, LARGE / 2) == 0, "cannot cut the file");
        for (long i = 0; i < rounds / 10; i++) {
            const int64_t offset = (int64_t)below(LARGE), length = 1 + (int64_t)below(LARGE / 2);
            uint8_t *out = exact((size_t)length);
            fl_failure failure = {0};
            const int came = fl_reader_read(r, offset, length, out, &failure);
            must(came == (offset + length > LARGE / 2 ? FL_FAIL_END : FL_READ_OK), "after a cut");
            free(out);
        }
        fl_reader_free(r);
        close(fd);
    }
#endif
    printf("%ld rounds\n", rounds);
    return 0;
}
