/* A preload shim that refuses one allocation: the n-th from now on of a kind.
 *
 * Kinds: 1, those made by our own extension; 2, large ones by anybody (arrays, buffers, anonymous
 * mappings).  fail_nth(0, 0) turns it off; fail_fired() says whether one was refused since.
 * glibc only: its own names for the real functions need no look-up, which would allocate. */
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { OFF = 0, OURS = 1, LARGE = 2, LARGE_BYTES = 8 << 10 };

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

static atomic_int kind, fired;
static atomic_long countdown;

void fail_nth(int what, long n)
{
    atomic_store(&kind, OFF);
    atomic_store(&fired, 0);
    atomic_store(&countdown, n);
    atomic_store(&kind, what);
}

int fail_fired(void) { return atomic_load(&fired); }

static int refuse(size_t size, const void *caller)
{
    const int what = atomic_load(&kind);
    Dl_info place;

    if (what == OFF || (what == LARGE && size < LARGE_BYTES))
        return 0;
    if (what == OURS && !(dladdr(caller, &place) && strstr(place.dli_fname, "flashllm/_core")))
        return 0;
    if (atomic_fetch_sub(&countdown, 1) != 1)
        return 0;
    atomic_store(&fired, 1);
    errno = ENOMEM;
    return 1;
}

void *malloc(size_t size)
{
    return refuse(size, __builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    return refuse(n * size, __builtin_return_address(0)) ? NULL : __libc_calloc(n, size);
}

void *realloc(void *p, size_t size)
{
    return refuse(size, __builtin_return_address(0)) ? NULL : __libc_realloc(p, size);
}

int posix_memalign(void **p, size_t alignment, size_t size)
{
    void *q = refuse(size, __builtin_return_address(0)) ? NULL : __libc_memalign(alignment, size);

    if (!q)
        return ENOMEM;
    *p = q;
    return 0;
}

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
    if ((flags & MAP_ANONYMOUS) && refuse(size, __builtin_return_address(0)))
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, address, size, protection, flags, fd, offset);
}
