/* The SIGBUS guard: a table of watched mappings and a jump buffer per thread.
 *
 * The handler looks at the table first and at the thread's jump buffer only for an address inside
 * it, because the first access to a thread-local variable of a loaded library may allocate, and
 * only threads that already hold a jump buffer touch those mappings. */
#include "fl_guard.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { N_SLOTS = 1024 };

static struct {
    atomic_uintptr_t start, stop;
} watched[N_SLOTS];

static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction previous;
static atomic_int chaining;
static _Thread_local sigjmp_buf *volatile jump;
static _Thread_local const void *volatile fault;

static int is_watched(uintptr_t address)
{
    for (int i = 0; i < N_SLOTS; i++) {
        const uintptr_t start = atomic_load(&watched[i].start);
        if (start && address >= start && address < atomic_load(&watched[i].stop))
            return 1;
    }
    return 0;
}

static void on_sigbus(int signal_number, siginfo_t *info, void *context)
{
    if (info->si_code > 0 && is_watched((uintptr_t)info->si_addr) && jump) {
        fault = info->si_addr;
        siglongjmp(*jump, 1);
    }
    /* Not ours.  A handler that was installed between two of our installs may call us back: the
     * second time round nobody wants the signal and the default action takes it. */
    if (atomic_exchange(&chaining, 1) == 0) {
        if (previous.sa_flags & SA_SIGINFO) {
            previous.sa_sigaction(signal_number, info, context);
            atomic_store(&chaining, 0);
            return;
        }
        if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
            previous.sa_handler(signal_number);
            atomic_store(&chaining, 0);
            return;
        }
        if (previous.sa_handler == SIG_IGN && info->si_code <= 0) {
            atomic_store(&chaining, 0);
            return;
        }
    }
    signal(SIGBUS, SIG_DFL);
    if (info->si_code <= 0)
        raise(SIGBUS);
    /* a true fault repeats on return */
}

static int is_ours(struct sigaction *now)
{
    return sigaction(SIGBUS, NULL, now) == 0 && (now->sa_flags & SA_SIGINFO) &&
           now->sa_sigaction == on_sigbus;
}

/* Under the lock. */
static void install(void)
{
    struct sigaction now, ours;

    if (is_ours(&now))
        return;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_sigbus;
    /* SA_NODEFER: a jump out of the handler must not leave SIGBUS blocked. */
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    previous = now;
    sigaction(SIGBUS, &ours, NULL);
}

int fl_guard_watch(const void *map, size_t n_bytes)
{
    int slot = -1;

    pthread_mutex_lock(&install_lock);
    install();
    for (int i = 0; i < N_SLOTS && slot < 0; i++) {
        if (atomic_load(&watched[i].start) == 0) {
            atomic_store(&watched[i].stop, (uintptr_t)map + n_bytes);
            atomic_store(&watched[i].start, (uintptr_t)map);
            slot = i;
        }
    }
    pthread_mutex_unlock(&install_lock);
    return slot;
}

void fl_guard_forget(int slot)
{
    if (slot >= 0)
        atomic_store(&watched[slot].start, 0);
}

const void *fl_guard_copy(void *dst, const void *src, size_t n_bytes)
{
    sigjmp_buf here;
    struct sigaction now;

    /* Somebody may have put a handler of theirs in place of ours since; asking takes 0.1 us. */
    if (!is_ours(&now)) {
        pthread_mutex_lock(&install_lock);
        install();
        pthread_mutex_unlock(&install_lock);
    }
    if (sigsetjmp(here, 0)) {
        jump = NULL;
        return fault;
    }
    jump = &here;
    atomic_signal_fence(memory_order_seq_cst);
    memcpy(dst, src, n_bytes);
    atomic_signal_fence(memory_order_seq_cst);
    jump = NULL;
    return NULL;
}
