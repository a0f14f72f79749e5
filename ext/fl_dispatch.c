/* Which kernel sets this machine can run: what the processor has (CPUID, hwcap) *and* what the
 * operating system saves on a context switch (XGETBV). */
#include <string.h>

#include "fl_dispatch.h"
#include "fl_kernels.h"

#ifdef FL_HAVE_X86
#include <cpuid.h>

enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6 };

static const char *why_not_avx2(const fl_x86 *x)
{
    if (!x->answers) return "the processor does not say what it has";
    if (!(x->leaf7_ebx & bit_AVX2) || !(x->leaf1_ecx & bit_FMA) || !(x->leaf1_ecx & bit_F16C))
        return "the processor lacks AVX2, FMA or F16C";
    if ((x->xcr0 & XCR0_AVX) != XCR0_AVX)
        return "the operating system does not save AVX registers";
    return NULL;
}

static const char *why_not_avx512(const fl_x86 *x)
{
    const char *why = why_not_avx2(x);
    if (why) return why;
    unsigned need = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((x->leaf7_ebx & need) != need || !(x->leaf7_ecx & bit_AVX512VNNI))
        return "the processor lacks AVX-512 F, BW, DQ, VL or VNNI";
    if ((x->xcr0 & XCR0_AVX512) != XCR0_AVX512)
        return "the operating system does not save AVX-512 registers";
    return NULL;
}

const char *fl_x86_why_not(const char *name, const fl_x86 *x)
{
    return !strcmp(name, "avx512") ? why_not_avx512(x) : why_not_avx2(x);
}

static fl_x86 this_processor(void)
{
    fl_x86 x = {0};
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &x.leaf1_ecx, &d)) return x;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return x;
    x.answers = 1;
    x.leaf7_ebx = b;
    x.leaf7_ecx = c;
    if (x.leaf1_ecx & bit_OSXSAVE) {
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        x.xcr0 = (uint64_t)high << 32 | low;
    }
    return x;
}
#endif

#if defined(FL_HAVE_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>

static const char *why_not_neon(void)
{
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? NULL
                                               : "the processor lacks dot-product instructions";
}
#elif defined(FL_HAVE_NEON)
static const char *why_not_neon(void)
{
    return NULL; /* every 64-bit Apple processor that runs a current system has dot products */
}
#endif

const fl_kernel_set *fl_find_kernel_set(const char *name, const char **why)
{
    *why = NULL;
    if (!strcmp(name, "serial")) return &fl_serial;
#ifdef FL_HAVE_X86
    const fl_x86 x = this_processor();
    if (!strcmp(name, "avx2")) return (*why = fl_x86_why_not(name, &x)) ? NULL : &fl_avx2;
    if (!strcmp(name, "avx512")) return (*why = fl_x86_why_not(name, &x)) ? NULL : &fl_avx512;
#endif
#ifdef FL_HAVE_NEON
    if (!strcmp(name, "neon")) return (*why = why_not_neon()) ? NULL : &fl_neon;
#endif
    *why = "built for another processor architecture";
    return NULL;
}
