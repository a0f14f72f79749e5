/* A preload shim under which reads of one file come as they please: cut to a random number of
 * units, now and then interrupted before the first byte.
 *
 * short_reads(inode, seed, unit, most) turns it on: a call for that file returns at most
 * unit * (1 .. most) bytes, one in eight fails with EINTR.  short_reads(0, 0, 0, 0) turns it off;
 * short_reads_done() says how many calls were cut or interrupted. */
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/uio.h>

enum { MOST_PARTS = 64 };

static atomic_ulong inode, n_done, per_call, n_units;
static _Atomic uint64_t state;

void short_reads(unsigned long file, unsigned long seed, unsigned long unit, unsigned long most)
{
    atomic_store(&inode, 0);
    atomic_store(&n_done, 0);
    atomic_store(&state, seed);
    atomic_store(&per_call, unit);
    atomic_store(&n_units, most);
    atomic_store(&inode, file);
}

unsigned long short_reads_done(void) { return atomic_load(&n_done); }

/* splitmix64 */
static uint64_t draw(void)
{
    uint64_t z = atomic_fetch_add(&state, 0x9e3779b97f4a7c15u) + 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

typedef ssize_t read_call(int, const struct iovec *, int, off_t);

static ssize_t read_some(read_call *real, int fd, const struct iovec *iov, int n, off_t offset)
{
    const unsigned long file = atomic_load(&inode);
    struct stat found;
    if (!file || fstat(fd, &found) || found.st_ino != file)
        return real(fd, iov, n, offset);

    const uint64_t drawn = draw();
    size_t left = atomic_load(&per_call) * (1 + drawn % atomic_load(&n_units));
    struct iovec some[MOST_PARTS];
    int k = 0;
    for (; k < n && k < MOST_PARTS && left > 0; k++) {
        some[k] = iov[k];
        if (some[k].iov_len > left)
            some[k].iov_len = left;
        left -= some[k].iov_len;
    }
    atomic_fetch_add(&n_done, 1);
    if (drawn >> 61 == 0) {
        errno = EINTR;
        return -1;
    }
    return real(fd, some, k, offset);
}

ssize_t preadv(int fd, const struct iovec *iov, int n, off_t offset)
{
    static read_call *real;
    if (!real)
        real = (read_call *)dlsym(RTLD_NEXT, "preadv");
    return read_some(real, fd, iov, n, offset);
}

ssize_t preadv64(int fd, const struct iovec *iov, int n, off_t offset)
{
    static read_call *real;
    if (!real)
        real = (read_call *)dlsym(RTLD_NEXT, "preadv64");
    return read_some(real, fd, iov, n, offset);
}
