/* Detection of x86 kernel sets with made-up answers: `dispatch` prints nothing and returns 0 when
 * every row of the table is as it should be. */
#include <cpuid.h>
#include <stdio.h>
#include <string.h>

#include "fl_dispatch.h"

enum { SSE = 0x2, AVX = 0x6, AVX512 = 0xe6, NO_MASKS = 0xc6, NO_UPPER = 0x66 };

#define FMA (bit_FMA | bit_F16C | bit_OSXSAVE)
#define WIDE (bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL)

static const struct {
    fl_x86 x;
    const char *avx2, *avx512; /* part of the reason; NULL where it runs */
} rows[] = {
    {{0, 0, 0, 0, 0}, "does not say", "does not say"},
    {{1, 0, 0, 0, 0}, "lacks AVX2", "lacks AVX2"},
    {{1, FMA, bit_AVX2, 0, AVX}, NULL, "lacks AVX-512"},
    {{1, bit_FMA, bit_AVX2, 0, AVX}, "lacks AVX2, FMA or F16C", "lacks AVX2, FMA or F16C"},
    {{1, FMA, WIDE, bit_AVX512VNNI, AVX512}, NULL, NULL},
    {{1, FMA, WIDE, 0, AVX512}, NULL, "lacks AVX-512"},
    {{1, FMA, WIDE & ~bit_AVX512BW, bit_AVX512VNNI, AVX512}, NULL, "lacks AVX-512"},
    /* The processor has it, the system does not save it. */
    {{1, FMA, WIDE, bit_AVX512VNNI, 0}, "not save AVX registers", "not save AVX registers"},
    {{1, FMA, WIDE, bit_AVX512VNNI, SSE}, "not save AVX registers", "not save AVX registers"},
    {{1, FMA, WIDE, bit_AVX512VNNI, AVX}, NULL, "not save AVX-512"},
    {{1, FMA, WIDE, bit_AVX512VNNI, NO_MASKS}, NULL, "not save AVX-512"},
    {{1, FMA, WIDE, bit_AVX512VNNI, NO_UPPER}, NULL, "not save AVX-512"},
};

static int wrong(const char *said, const char *expected)
{
    if (!expected) return said != NULL;
    return !said || !strstr(said, expected);
}

int main(void)
{
    int failures = 0;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *avx2 = fl_x86_why_not("avx2", &rows[i].x);
        const char *avx512 = fl_x86_why_not("avx512", &rows[i].x);
        if (wrong(avx2, rows[i].avx2) || wrong(avx512, rows[i].avx512)) {
            printf("row %zu: avx2 %s; avx512 %s\n", i, avx2 ? avx2 : "runs",
                   avx512 ? avx512 : "runs");
            failures++;
        }
    }
    return failures;
}
