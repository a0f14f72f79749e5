"""flashllm._core: the border between Python and ext/*.c.

Typed memoryviews in, one C call without the interpreter lock, an exception after.  No policy, no
format, no allocation here.  Sections: checksums, kernels, reading; each speaks to its own header.
"""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


# ---------------------------------------------------------------------------------- checksums

cdef extern from "fl_xxh64.h" nogil:
    uint64_t fl_xxh64(const void *data, size_t n_bytes, uint64_t seed)


def xxh64(const uint8_t[::1] data not None, uint64_t seed=0):
    """XXH64 of a bytes-like object, as an int (xxHash specification 0.1.1)."""
    cdef uint64_t digest
    cdef size_t n_bytes = data.shape[0]
    cdef const void *p = &data[0] if n_bytes else NULL
    with nogil:
        digest = fl_xxh64(p, n_bytes, seed)
    return digest


# ------------------------------------------------------------------------------------ kernels


# ------------------------------------------------------------------------------------ reading

