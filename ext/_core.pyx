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


cdef extern from "fl_planes.h" nogil:
    void fl_planes_split16(const uint8_t *values, size_t n_values, uint8_t *high, uint8_t *low)
    void fl_planes_join16(const uint8_t *high, const uint8_t *low, size_t n_values, uint8_t *values)


def planes_split16(const uint8_t[::1] values not None, uint8_t[::1] high not None,
                   uint8_t[::1] low not None):
    """Split 2n bytes of little-endian 16-bit floats into n high and n low bytes."""
    cdef size_t n = high.shape[0]
    if <size_t>low.shape[0] != n or <size_t>values.shape[0] != 2 * n:
        raise ValueError(f"planes of {high.shape[0]} and {low.shape[0]} for {values.shape[0]} bytes")
    if n:
        with nogil:
            fl_planes_split16(&values[0], n, &high[0], &low[0])


def planes_join16(const uint8_t[::1] high not None, const uint8_t[::1] low not None,
                  uint8_t[::1] values not None):
    """The inverse of planes_split16."""
    cdef size_t n = high.shape[0]
    if <size_t>low.shape[0] != n or <size_t>values.shape[0] != 2 * n:
        raise ValueError(f"planes of {high.shape[0]} and {low.shape[0]} for {values.shape[0]} bytes")
    if n:
        with nogil:
            fl_planes_join16(&high[0], &low[0], n, &values[0])


# ------------------------------------------------------------------------------------ kernels


# ------------------------------------------------------------------------------------ reading

cimport cython
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals

cdef extern from "fl_reader.h" nogil:
    enum:
        FL_DIRECT, FL_PREAD, FL_MMAP
        FL_OK, FL_FAIL_READ, FL_FAIL_END, FL_FAIL_CHECK
        FL_TIMEOUT, FL_CLOSED, FL_FORKED, FL_SYSTEM, FL_REFUSED
        FL_BAD_RANGE, FL_BAD_START, FL_BAD_SUM, FL_BAD_ALIGNMENT, FL_BAD_CHECK
    ctypedef struct fl_failure:
        int kind, error
        int64_t extent, check, offset
        uint64_t expected, found
    ctypedef struct fl_source:
        uint64_t bytes_read, n_reads, n_retries, read_ns
    ctypedef struct fl_reader:
        pass
    ctypedef struct fl_ticket:
        pass
    ctypedef struct fl_batch:
        size_t n_extents, n_iov, n_checks
        const int64_t *offset
        const int64_t *length
        const int32_t *iov_start
        const uint64_t *iov_address
        const int64_t *iov_length
        const int32_t *check_start
        const uint64_t *check_address
        const int64_t *check_length
        const uint64_t *check_seed
        const uint64_t *check_digest
    fl_reader *fl_reader_open(int fd, int mode, int64_t size, int depth, int64_t alignment,
                              int64_t memory_alignment, int *error)
    void fl_reader_close(fl_reader *r)
    void fl_reader_free(fl_reader *r)
    int fl_reader_read(fl_reader *r, int64_t offset, int64_t length, uint8_t *out,
                       fl_failure *failure)
    const fl_source *fl_reader_source(const fl_reader *r)
    int fl_reader_submit(fl_reader *r, const fl_batch *batch, fl_ticket **ticket,
                         fl_failure *failure)
    int fl_ticket_wait(fl_ticket *t, int64_t upto, int64_t slice_ns, fl_failure *failure)
    int64_t fl_ticket_done(const fl_ticket *t)
    void fl_ticket_close(fl_ticket *t)
    void fl_ticket_free(fl_ticket *t)
    void fl_direct_alignment(int fd, int64_t *alignment, int64_t *memory_alignment)
    int64_t fl_resident_bytes(int fd, int64_t offset, int64_t length)

READ_DIRECT, READ_PREAD, READ_MMAP = FL_DIRECT, FL_PREAD, FL_MMAP

_FAILURES = {
    FL_FAIL_READ: "read", FL_FAIL_END: "end", FL_FAIL_CHECK: "check", FL_CLOSED: "closed",
    FL_FORKED: "forked", FL_SYSTEM: "system", FL_REFUSED: "refused",
}
_REFUSALS = {
    FL_BAD_RANGE: "its offset is negative, its length below 1, or its end beyond 2**63",
    FL_BAD_START: "its iov_start or check_start does not ascend within the arrays",
    FL_BAD_SUM: "its destinations do not sum to its length",
    FL_BAD_ALIGNMENT: "its offset, or a destination's length or address, is off the alignment",
    FL_BAD_CHECK: "a check has a negative length",
}


class ReadFailure(Exception):
    """What the reader answered instead of bytes; flashllm.storage words it for people.

    kind: "read" (error = errno), "end", "check" (expected, found), "closed", "forked", "system"
    (error = errno) or "refused" (reason).  extent and check are indices, offset is in the file.
    """


cdef _failure(int status, fl_failure *f):
    failure = ReadFailure(_FAILURES[status])
    failure.kind = _FAILURES[status]
    failure.extent, failure.check, failure.offset = f.extent, f.check, f.offset
    failure.error, failure.expected, failure.found = f.error, f.expected, f.found
    failure.reason = _REFUSALS[f.kind] if status == FL_REFUSED else ""
    return failure


@cython.no_gc
cdef class Reader:
    """fl_reader over a descriptor that it owns from now on; raises OSError when it cannot open."""
    cdef fl_reader *reader

    def __cinit__(self, int fd, int mode, int64_t size, int depth, int64_t alignment,
                  int64_t memory_alignment):
        cdef int error = 0
        if not 1 <= depth <= 256 or alignment < 1 or memory_alignment < 1:
            raise ValueError("depth is 1..256 and alignments are positive")
        with nogil:
            self.reader = fl_reader_open(fd, mode, size, depth, alignment, memory_alignment,
                                         &error)
        if self.reader == NULL:
            raise OSError(error, "cannot open a reader")

    def __dealloc__(self):
        if self.reader != NULL:
            with nogil:
                fl_reader_free(self.reader)

    def close(self):
        with nogil:
            fl_reader_close(self.reader)

    def read(self, int64_t offset, int64_t length):
        """The bytes [offset, offset + length), all of them or ReadFailure."""
        cdef fl_failure failure
        cdef int status
        cdef bytes out = PyBytes_FromStringAndSize(NULL, length)
        cdef uint8_t *p = <uint8_t *>PyBytes_AsString(out)
        with nogil:
            status = fl_reader_read(self.reader, offset, length, p, &failure)
        if status != FL_OK:
            raise _failure(status, &failure)
        return out

    def stats(self):
        """(bytes_read, n_reads, n_retries, read_ns) since it was opened."""
        cdef const fl_source *s = fl_reader_source(self.reader)
        return s.bytes_read, s.n_reads, s.n_retries, s.read_ns

    def submit(self, const int64_t[::1] offset, const int64_t[::1] length,
               const int32_t[::1] iov_start, const uint64_t[::1] iov_address,
               const int64_t[::1] iov_length, const int32_t[::1] check_start,
               const uint64_t[::1] check_address, const int64_t[::1] check_length,
               const uint64_t[::1] check_seed, const uint64_t[::1] check_digest):
        """Queue one batch; its NativeTicket.  The arrays are copied, the destinations are not."""
        cdef fl_batch b
        cdef fl_failure failure
        cdef int status
        cdef NativeTicket ticket = NativeTicket.__new__(NativeTicket)
        b.n_extents, b.n_iov = offset.shape[0], iov_address.shape[0]
        b.n_checks = check_address.shape[0]
        if (<size_t>length.shape[0] != b.n_extents
                or <size_t>iov_start.shape[0] != b.n_extents + 1
                or <size_t>check_start.shape[0] != b.n_extents + 1
                or <size_t>iov_length.shape[0] != b.n_iov
                or <size_t>check_length.shape[0] != b.n_checks
                or <size_t>check_seed.shape[0] != b.n_checks
                or <size_t>check_digest.shape[0] != b.n_checks):
            raise ValueError("the arrays of a batch do not fit each other")
        b.offset = &offset[0] if b.n_extents else NULL
        b.length = &length[0] if b.n_extents else NULL
        b.iov_start = &iov_start[0]
        b.iov_address = &iov_address[0] if b.n_iov else NULL
        b.iov_length = &iov_length[0] if b.n_iov else NULL
        b.check_start = &check_start[0]
        b.check_address = &check_address[0] if b.n_checks else NULL
        b.check_length = &check_length[0] if b.n_checks else NULL
        b.check_seed = &check_seed[0] if b.n_checks else NULL
        b.check_digest = &check_digest[0] if b.n_checks else NULL
        with nogil:
            status = fl_reader_submit(self.reader, &b, &ticket.ticket, &failure)
        if status != FL_OK:
            raise _failure(status, &failure)
        ticket.reader, ticket.n = self, b.n_extents
        return ticket


@cython.no_gc
cdef class NativeTicket:
    """One batch in the reader's queue.  Deleting it waits for what is in flight."""
    cdef fl_ticket *ticket
    cdef Reader reader  # outlives the ticket: its lock guards it
    cdef readonly int64_t n

    def __dealloc__(self):
        if self.ticket != NULL:
            with nogil:
                fl_ticket_free(self.ticket)

    def wait(self, int64_t upto):
        """Return when extents [0, upto) are there; ReadFailure for the first that cannot be."""
        cdef fl_failure failure
        cdef int status = FL_TIMEOUT
        while status == FL_TIMEOUT:
            with nogil:  # in slices, so that a Ctrl-C is seen
                status = fl_ticket_wait(self.ticket, upto, 100_000_000, &failure)
            if status == FL_TIMEOUT:
                PyErr_CheckSignals()
        if status != FL_OK:
            raise _failure(status, &failure)

    def done(self):
        """How many extents, from the first on, are there; -1 in a forked child."""
        return fl_ticket_done(self.ticket)

    def close(self):
        with nogil:
            fl_ticket_close(self.ticket)


def direct_alignment(int fd):
    """(offset, memory) alignment of O_DIRECT as statx tells it; zeros: none; -1: it cannot say."""
    cdef int64_t alignment, memory_alignment
    with nogil:
        fl_direct_alignment(fd, &alignment, &memory_alignment)
    return alignment, memory_alignment


def resident_bytes(int fd, int64_t offset, int64_t length):
    """How many bytes of a file's range are in the page cache, counted in OS pages."""
    cdef int64_t n
    with nogil:
        n = fl_resident_bytes(fd, offset, length)
    if n < 0:
        raise OSError("mincore failed")
    return n
