/* What x86 detection looks at, apart from how it is read: so that a test can lie about it. */
#ifndef FL_DISPATCH_H
#define FL_DISPATCH_H

#include <stdint.h>

typedef struct {
    int answers;                               /* CPUID has leaves 1 and 7 */
    unsigned leaf1_ecx, leaf7_ebx, leaf7_ecx;  /* what the processor says it has */
    uint64_t xcr0;                             /* what the system saves; 0 without OSXSAVE */
} fl_x86;

/* NULL when "avx2" or "avx512" can run there, else the reason. */
const char *fl_x86_why_not(const char *name, const fl_x86 *x);

#endif
