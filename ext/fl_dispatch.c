/* Which kernel sets this machine can run: what the processor has (CPUID, hwcap) *and* what the
 * operating system saves on a context switch (XGETBV). */
#include <string.h>

#include "fl_kernels.h"

#ifdef FL_HAVE_X86
#include <cpuid.h>

enum { XCR0_AVX = 0x6, XCR0_AVX512 = 0xe6 };

static uint64_t enabled_state(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static const char *why_not_avx2(void)
{
    unsigned a, b, c1, d, b7, c7;
    if (!__get_cpuid(1, &a, &b, &c1, &d) || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d))
        return "the processor does not say what it has";
    if (!(b7 & bit_AVX2) || !(c1 & bit_FMA) || !(c1 & bit_F16C))
        return "the processor lacks AVX2, FMA or F16C";
    if ((enabled_state() & XCR0_AVX) != XCR0_AVX)
        return "the operating system does not save AVX registers";
    return NULL;
}

static const char *why_not_avx512(void)
{
    const char *why = why_not_avx2();
    if (why) return why;
    unsigned a, b = 0, c = 0, d;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    unsigned need = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((b & need) != need || !(c & bit_AVX512VNNI))
        return "the processor lacks AVX-512 F, BW, DQ, VL or VNNI";
    if ((enabled_state() & XCR0_AVX512) != XCR0_AVX512)
        return "the operating system does not save AVX-512 registers";
    return NULL;
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
    if (!strcmp(name, "avx2")) return (*why = why_not_avx2()) ? NULL : &fl_avx2;
    if (!strcmp(name, "avx512")) return (*why = why_not_avx512()) ? NULL : &fl_avx512;
#endif
#ifdef FL_HAVE_NEON
    if (!strcmp(name, "neon")) return (*why = why_not_neon()) ? NULL : &fl_neon;
#endif
    *why = "built for another processor architecture";
    return NULL;
}
