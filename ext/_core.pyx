"""flashllm._core: the border between Python and ext/*.c.

Typed memoryviews in, one C call without the interpreter lock, an exception after.  No policy, no
format, no allocation here.  Sections: arrays, checksums, kernels, reading; each speaks to its own header.
"""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_FORMAT, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport ENOMEM
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec


# ------------------------------------------------------------------------------------- arrays

def is_array(object array, int code, tuple shape, bint out):
    """Whether `array` is C-contiguous, of the item format `code` (ord of struct's letter), of `shape`
    (None: any size) and writable where it is an output.  An exporter of something else is no
    error, but False."""
    cdef Py_buffer view
    cdef Py_ssize_t i
    cdef bint good
    try:
        PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)
    except (BufferError, TypeError, ValueError):
        return False
    good = view.ndim == len(shape) and not (out and view.readonly)
    good = good and view.format != NULL and view.format[0] == code and view.format[1] == 0
    for i in range(view.ndim if good else 0):
        want = shape[i]
        if want is not None and <Py_ssize_t>want != view.shape[i]:
            good = False
    PyBuffer_Release(&view)
    return good


# ------------------------------------------------------------------------------------- memory

cdef extern from "fl_memory.h" nogil:
    uint64_t fl_or_words(const uint64_t *words, size_t n_words)


def or_words(const uint64_t[::1] words not None):
    """All uint64 of an array, or-ed together, at the speed of memory; 0 for none."""
    cdef uint64_t all_bits
    cdef size_t n = words.shape[0]
    cdef const uint64_t *p = &words[0] if n else NULL
    with nogil:
        all_bits = fl_or_words(p, n)
    return all_bits


# ---------------------------------------------------------------------------------- checksums

cdef extern from "fl_xxh64.h" nogil:
    uint64_t fl_xxh64(const void *data, size_t n_bytes, uint64_t seed)
    void fl_xxh64_use_avx512(int yes)


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
#
# Shapes and dtypes were checked by flashllm.kernels.base before anything comes here.

cdef extern from "fl_pool.h" nogil:
    ctypedef struct fl_pool:
        pass
    fl_pool *fl_pool_create(int n_threads)
    void fl_pool_destroy(fl_pool *pool)

cdef extern from "fl_kernels.h" nogil:
    ctypedef enum fl_kernel_status:
        FL_KERNEL_OK
        FL_ABSENT_FRAME
        FL_OUT_OF_RANGE
        FL_NOT_ASCENDING
        FL_MISALIGNED
        FL_NO_POSITION
    ctypedef enum fl_activation:
        FL_SILU
    ctypedef struct fl_kernel_set:
        pass
    ctypedef struct fl_engine:
        const fl_kernel_set *set
        fl_pool *pool
    ctypedef struct fl_piece:
        int64_t weight_type, per_frame, stride, offset, n_cols
    ctypedef struct fl_items:
        const uint64_t *addresses
        int64_t n_frames
        const int32_t *ids
        int64_t start, n
    ctypedef struct fl_acts:
        const float *x
        const uint8_t *q
        const float *scales
        int64_t n_tokens, n_cols, q_stride, scale_stride
        uint8_t *tiles
    ctypedef struct fl_attention:
        const float *q
        const uint8_t *k
        const uint8_t *v
        int64_t kv_type, n_tokens, n_heads, n_kv_heads, head_dim, n_context
        int64_t first_position, window
        float scale, cap
        float *scratch
        float *out
    const fl_kernel_set *fl_find_kernel_set(const char *name, const char **why)
    int fl_many(const fl_engine *e)
    int64_t fl_tiles_at(const fl_engine *e, const uint8_t *q, int64_t n_bytes, int64_t n_tokens,
                        int64_t q_stride, int64_t scale_stride)
    fl_kernel_status fl_op_dot(const fl_engine *e, const fl_acts *acts, const fl_piece *piece,
                        const fl_items *items, float *out, int64_t out_stride)
    fl_kernel_status fl_op_accumulate(const fl_engine *e, const float *coef, int64_t coef_stride,
                               int64_t n_tokens, const fl_piece *piece, const fl_items *items,
                               float *y, int64_t y_stride)
    void fl_op_low_bit(const fl_engine *e, const fl_acts *acts, const uint8_t *rows, int64_t n_rows,
                       int64_t n_planes, float *out)
    fl_kernel_status fl_op_decode(const fl_engine *e, const fl_piece *piece, const fl_items *items,
                           float *out)
    void fl_op_rope(const fl_engine *e, float *x, const float *cosines, const float *sines,
                    int64_t n_tokens, int64_t n_heads, int64_t head_dim, int64_t half)
    int64_t fl_op_active_ids(const float *pre, const float *cut, int64_t n_tokens, int64_t n,
                             int32_t *out)
    ctypedef enum fl_share:
        FL_SHARE_NOW
    ctypedef struct fl_rwkv4:
        int64_t n_tokens, n
        const float *r
        const float *k
        const float *v
        const float *decay
        const float *first
        float *numerator
        float *denominator
        float *exponent
        float *out
    ctypedef struct fl_rwkv5:
        int64_t n_tokens, n_heads, head_dim
        float eps
        const float *r
        const float *k
        const float *v
        const float *gate
        const float *decay
        const float *decay_bias
        const float *first
        const float *norm_weight
        const float *norm_bias
        float *memory
        float *out
    ctypedef struct fl_rwkv7:
        int64_t n_tokens, n_heads, head_dim
        float eps
        const float *r
        const float *decay
        const float *k
        const float *rate
        const float *gate
        float *v
        const float *share
        float *first_v
        const float *decay_bias
        const float *rate_bias
        const float *share_bias
        const float *key_unit
        const float *key_rate
        const float *bonus
        const float *norm_weight
        const float *norm_bias
        float *memory
        float *out
    void fl_op_mix_tokens(const fl_engine *e, fl_share kind, const float *x, const float *last,
                          const float *const *shares, int64_t n_mixes, int64_t n_tokens, int64_t n,
                          float *out)
    void fl_op_rwkv4(const fl_engine *e, const fl_rwkv4 *a)
    void fl_op_rwkv5(const fl_engine *e, const fl_rwkv5 *a)
    void fl_op_rwkv7(const fl_engine *e, const fl_rwkv7 *a)
    int64_t fl_attention_scratch(int64_t n_context)
    void fl_op_attention(const fl_engine *e, const fl_attention *a)
    ctypedef struct fl_token:
        fl_attention attention
        float *q
        float *k
        const float *v
        const float *cosines
        const float *sines
        int64_t half
        uint8_t *keys
        uint8_t *values

    ctypedef struct fl_neurons:
        const fl_acts *acts
        const fl_piece *first
        const fl_piece *second
        const fl_piece *down
        const fl_items *items
        fl_activation kind
        float *pre
        float *up
        float *y

cdef extern from "fl_calls.h" nogil:
    ctypedef enum fl_call_kind:
        FL_CALL_PREPARE
        FL_CALL_LINEAR
        FL_CALL_NEURONS
        FL_CALL_ACTIVATE
        FL_CALL_ACCUMULATE
        FL_CALL_LOW_BIT
        FL_CALL_ABOVE
        FL_CALL_DECIDED
        FL_CALL_RMS_NORM
        FL_CALL_LAYER_NORM
        FL_CALL_ADD_RMS_NORM
        FL_CALL_ATTEND_TOKEN
        FL_CALL_CLEAR
        FL_CALL_ADD
        FL_CALL_SCALE
    ctypedef struct fl_linear_call:
        fl_acts acts
        uint8_t *q
        float *scales
        int prepares
        fl_piece piece
        fl_items items
        float *out
        int64_t out_stride
    ctypedef struct fl_activate_call:
        fl_activation kind
        const float *pre
        const float *up
        int64_t n
        float *out
    ctypedef struct fl_accumulate_call:
        const float *coef
        int64_t coef_stride, n_tokens
        fl_piece piece
        fl_items items
        float *y
        int64_t y_stride
    ctypedef struct fl_low_bit_call:
        fl_acts acts
        const uint8_t *rows
        int64_t n_rows, n_planes
        float *out
    ctypedef struct fl_above_call:
        const float *values
        const float *cut
        int64_t n
        int32_t *ids
        int64_t *count
    ctypedef struct fl_decided_call:
        fl_acts acts
        fl_piece deciding, second, down
        int has_deciding, has_second
        fl_items items
        const int64_t *count
        fl_activation kind
        const float *bias
        float *decided
        int64_t n_decided
        float *pre
        float *up
        float *y
        int32_t *active
        int64_t *added
    ctypedef struct fl_neurons_call:
        fl_acts acts
        fl_piece first, second, down
        int has_first, has_second
        fl_items items
        fl_activation kind
        float *pre
        float *up
        float *y
    ctypedef struct fl_norm_call:
        float *x
        const float *added
        const float *weight
        const float *bias
        int64_t n_rows, n
        float eps
        float *out
    ctypedef struct fl_attend_call:
        fl_token token
        int64_t n_positions
    ctypedef struct fl_vector_call:
        float *x
        const float *added
        int64_t n
        float factor
    ctypedef struct fl_call:
        fl_call_kind kind
        int phase
        fl_linear_call linear
        fl_neurons_call neurons
        fl_activate_call activate
        fl_accumulate_call sums
        fl_low_bit_call bits
        fl_above_call above
        fl_decided_call decided
        fl_norm_call norm
        fl_attend_call attend
        fl_vector_call vector
    fl_kernel_status fl_make_call(const fl_engine *e, const fl_call *call, int64_t position)


_KERNEL_TROUBLE = {
    FL_ABSENT_FRAME: "a frame in use is absent (address 0)",
    FL_OUT_OF_RANGE: "an item id lies outside the plane's frames",
    FL_NOT_ASCENDING: "item ids must ascend strictly",
    FL_MISALIGNED: "a frame's address is no multiple of 16",
    FL_NO_POSITION: "a position beyond the context",
}


def kernel_set_trouble(str name):
    """None when the native kernel set `name` runs on this machine, else the reason."""
    cdef const char *why = NULL
    cdef bytes encoded = name.encode()
    if fl_find_kernel_set(encoded, &why) != NULL:
        return None
    return why.decode()


def xxh64_by_vectors(bint yes):
    """Whether checksums use AVX-512 from now on, where this machine has it; as they do after import.
    Not while anything is read: for tests that compare both ways."""
    cdef const char *why = NULL
    fl_xxh64_use_avx512(yes and fl_find_kernel_set(b"avx512", &why) != NULL)


xxh64_by_vectors(True)


cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1_000_000_000 + t.tv_nsec


def attention_scratch_floats(int64_t n_context):
    """float32 values of attention scratch per thread."""
    return fl_attention_scratch(n_context)


cdef const float *values_of(const float[::1] vector):
    """The address of a vector that the caller keeps; NULL for None."""
    return &vector[0] if vector is not None else NULL


cdef const float *rows_of(const float[:, ::1] rows):
    return &rows[0, 0] if rows is not None else NULL


cdef inline fl_piece piece_of(tuple ints):
    """A piece of the five numbers of a PieceView."""
    return fl_piece(ints[0], ints[1], ints[2], ints[3], ints[4])


cdef fl_acts acts_of(const fl_engine *e, const float[:, ::1] x, const uint8_t[::1] q,
                     int64_t q_stride, const float[::1] scales, int64_t scale_stride):
    cdef int64_t at = fl_tiles_at(e, &q[0], q.shape[0], x.shape[0], q_stride, scale_stride)
    cdef uint8_t *tiles = NULL
    if at:
        tiles = <uint8_t *>&q[at]
    return fl_acts(&x[0, 0], &q[0], &scales[0], x.shape[0], x.shape[1], q_stride, scale_stride,
                   tiles)


cdef class PhaseClock:
    """Nanoseconds inside operators, by the phase that the caller has set; see kernels/base.py."""

    cdef public int phase
    cdef int64_t ns[8]

    def spent(self):
        return self.ns[0], self.ns[1], self.ns[2], self.ns[3]

    def credit(self, int64_t ns):
        """Count time outside operators as the phase's."""
        self.ns[self.phase & 7] += ns

    cdef inline void add(self, int64_t started):
        self.ns[self.phase & 7] += now_ns() - started


# So long is waited for reads before somebody looks whether Ctrl-C was pressed.
cdef enum:
    SLICE_NS = 100_000_000

# Of a recording, so many are made between two looks at whether somebody pressed Ctrl-C.
cdef enum:
    CALLS_AT_ONCE = 32


cdef class Recording:
    """Calls of operators in the order in which they were made, and what they point to."""
    cdef fl_call *calls
    cdef Py_ssize_t n, room
    cdef list kept
    cdef readonly bint spoiled  # by a call that cannot be repeated

    def __cinit__(self):
        self.kept = []

    def __dealloc__(self):
        free(self.calls)

    def __len__(self):
        return self.n

    cdef int add(self, const fl_call *call) except -1:
        cdef fl_call *calls
        if self.n == self.room:
            calls = <fl_call *>realloc(self.calls, (2 * self.room + 8) * sizeof(fl_call))
            if calls == NULL:
                raise MemoryError("no room for a recorded call")
            self.calls, self.room = calls, 2 * self.room + 8
        self.calls[self.n] = call[0]
        self.n += 1
        return 0


cdef class NativeKernels:
    """One kernel set and its threads.  Piece arguments are the five ints of a PieceView.

    Operators that build an fl_call can be recorded; `only_now` marks the others.
    """

    cdef fl_engine engine
    cdef readonly PhaseClock clock
    cdef Recording recording

    def __cinit__(self, str name, int n_threads):
        cdef const char *why = NULL
        cdef bytes encoded = name.encode()
        self.clock = PhaseClock()
        self.engine.set = fl_find_kernel_set(encoded, &why)
        if self.engine.set == NULL:
            raise ValueError(why.decode())
        self.engine.pool = fl_pool_create(n_threads)
        if self.engine.pool == NULL:
            raise MemoryError(f"cannot start {n_threads} kernel threads")

    def __dealloc__(self):
        fl_pool_destroy(self.engine.pool)

    @property
    def many(self):
        """Tokens of a block that dots of integer rows take at once, or 0."""
        return fl_many(&self.engine)

    cdef int check(self, fl_kernel_status status) except -1:
        if status != FL_KERNEL_OK:
            from flashllm.errors import KernelError
            raise KernelError(_KERNEL_TROUBLE[status])
        return 0

    cdef int make(self, fl_call *call) except -1:
        cdef fl_kernel_status status
        cdef int64_t started = now_ns()
        with nogil:
            status = fl_make_call(&self.engine, call, -1)
        self.clock.add(started)
        self.check(status)
        if self.recording is not None:
            call.phase = self.clock.phase & 7
            self.recording.add(call)
        return 0

    cdef inline void only_now(self) noexcept:
        if self.recording is not None:
            self.recording.spoiled = True

    def record(self):
        """Keep the calls from now on, until `end_recording`; the Recording."""
        self.recording = Recording()
        return self.recording

    def end_recording(self):
        self.recording = None

    def repeat(self, Recording recording not None, int64_t position):
        """Make the calls again, for the token at `position`."""
        cdef Py_ssize_t i = 0, stop
        cdef int64_t *ns = self.clock.ns
        cdef int64_t started
        cdef fl_kernel_status status = FL_KERNEL_OK
        while i < recording.n and status == FL_KERNEL_OK:
            stop = min(i + CALLS_AT_ONCE, recording.n)
            with nogil:
                while i < stop and status == FL_KERNEL_OK:
                    started = now_ns()
                    status = fl_make_call(&self.engine, &recording.calls[i], position)
                    ns[recording.calls[i].phase] += now_ns() - started
                    i += 1
            PyErr_CheckSignals()
        self.check(status)

    def prepare(self, const float[:, ::1] x not None, uint8_t[::1] q not None, int64_t q_stride,
                float[::1] scales not None, int64_t scale_stride):
        cdef fl_call call
        call.kind = FL_CALL_PREPARE
        call.linear.acts = acts_of(&self.engine, x, q, q_stride, scales, scale_stride)
        call.linear.q, call.linear.scales = &q[0], &scales[0]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (x.base, q.base, scales.base)

    def dot(self, const float[:, ::1] x not None, const uint8_t[::1] q not None, int64_t q_stride,
            const float[::1] scales not None, int64_t scale_stride, tuple piece not None,
            const uint64_t[::1] addresses not None, const int32_t[::1] ids, int64_t start,
            int64_t n, float[:, ::1] out not None, int64_t column):
        self.only_now()
        cdef fl_acts acts = acts_of(&self.engine, x, q, q_stride, scales, scale_stride)
        cdef fl_piece p = piece_of(piece)
        cdef const int32_t *listed = NULL
        if ids is not None:
            listed = &ids[0]
        cdef fl_items items = fl_items(&addresses[0], addresses.shape[0], listed, start, n)
        cdef fl_kernel_status status
        cdef int64_t started = now_ns()
        with nogil:
            status = fl_op_dot(&self.engine, &acts, &p, &items, &out[0, column], out.shape[1])
        self.clock.add(started)
        self.check(status)

    def low_bit(self, const float[:, ::1] x not None, const uint8_t[::1] q not None,
                int64_t q_stride, const float[::1] scales not None, int64_t scale_stride,
                const uint8_t[:, ::1] rows not None, int64_t n_planes, float[::1] out not None):
        cdef fl_call call
        call.kind = FL_CALL_LOW_BIT
        call.bits.acts = acts_of(&self.engine, x, q, q_stride, scales, scale_stride)
        call.bits.rows, call.bits.n_rows = &rows[0, 0], rows.shape[0]
        call.bits.n_planes, call.bits.out = n_planes, &out[0]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (x.base, q.base, scales.base, rows.base, out.base)

    def accumulate(self, const float[:, ::1] coef not None, tuple piece not None,
                   const uint64_t[::1] addresses not None, const int32_t[::1] ids, int64_t start,
                   int64_t n, float[:, ::1] y not None):
        cdef const int32_t *listed = NULL
        cdef fl_call call
        call.kind = FL_CALL_ACCUMULATE
        if ids is not None:
            listed = &ids[0]
            self.only_now()  # the ids of this token alone
        call.sums.coef, call.sums.coef_stride = &coef[0, 0], coef.shape[1]
        call.sums.n_tokens, call.sums.piece = coef.shape[0], piece_of(piece)
        call.sums.items = fl_items(&addresses[0], addresses.shape[0], listed, start, n)
        call.sums.y, call.sums.y_stride = &y[0, 0], y.shape[1]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (coef.base, addresses.base, y.base)

    def neurons(self, const float[:, ::1] x, const uint8_t[::1] q not None, int64_t q_stride,
                const float[::1] scales not None, int64_t scale_stride, tuple first, tuple second,
                tuple down not None, const uint64_t[::1] addresses not None, const int32_t[::1] ids,
                int64_t start, int64_t n, int kind, float[:, ::1] pre not None, float[:, ::1] up,
                float[:, ::1] y not None):
        cdef const int32_t *listed = NULL
        cdef fl_call call
        call.kind = FL_CALL_NEURONS
        call.neurons.acts = fl_acts(NULL, &q[0], &scales[0], 1, 0, q_stride, scale_stride, NULL)
        if x is not None:
            call.neurons.acts.x, call.neurons.acts.n_cols = &x[0, 0], x.shape[1]
        if ids is not None:
            listed = &ids[0]
        call.neurons.has_first, call.neurons.has_second = first is not None, second is not None
        if first is not None:
            call.neurons.first = piece_of(first)
        if second is not None:
            call.neurons.second = piece_of(second)
        call.neurons.down = piece_of(down)
        call.neurons.items = fl_items(&addresses[0], addresses.shape[0], listed, start, n)
        call.neurons.kind = <fl_activation>kind
        call.neurons.pre, call.neurons.y, call.neurons.up = &pre[0, 0], &y[0, 0], NULL
        if up is not None:
            call.neurons.up = &up[0, 0]
        if ids is not None or first is None:
            self.only_now()  # the ids and factors of this token alone
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (q.base, scales.base, addresses.base, pre.base, y.base)
            self.recording.kept += (None if x is None else x.base, None if up is None else up.base)

    def above(self, const float[:, ::1] values not None, const float[::1] cut,
              int32_t[::1] ids not None, int64_t[::1] count not None):
        cdef fl_call call
        call.kind = FL_CALL_ABOVE
        call.above.values, call.above.n = &values[0, 0], values.shape[1]
        call.above.cut, call.above.ids, call.above.count = values_of(cut), &ids[0], &count[0]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (values.base, ids.base, count.base)
            self.recording.kept.append(None if cut is None else cut.base)

    def decided(self, const float[:, ::1] x, const uint8_t[::1] q not None, int64_t q_stride,
                const float[::1] scales not None, int64_t scale_stride, tuple deciding,
                tuple second, tuple down not None, const uint64_t[::1] addresses not None,
                const int32_t[::1] ids not None, const int64_t[::1] count not None, int kind,
                float[:, ::1] decided not None, const float[::1] bias, float[:, ::1] pre not None,
                float[:, ::1] up, int32_t[::1] active not None, float[:, ::1] y not None,
                int64_t[::1] added not None, bint counted, Bring bring):
        """Of `ids` the first count[0]; `counted`: by a call that a repetition makes as well.  With
        `bring`, which brings them: all, each part as it arrives; ReadFailure as Bring.next."""
        cdef fl_call call
        if not counted:
            self.only_now()
        call.kind = FL_CALL_DECIDED
        call.decided.acts = fl_acts(NULL, &q[0], &scales[0], 1, 0, q_stride, scale_stride, NULL)
        if x is not None:
            call.decided.acts.x, call.decided.acts.n_cols = &x[0, 0], x.shape[1]
        call.decided.has_deciding, call.decided.has_second = deciding is not None, second is not None
        if deciding is not None:
            call.decided.deciding = piece_of(deciding)
        if second is not None:
            call.decided.second = piece_of(second)
        call.decided.down, call.decided.kind = piece_of(down), <fl_activation>kind
        call.decided.items = fl_items(&addresses[0], addresses.shape[0], &ids[0], 0, ids.shape[0])
        call.decided.count, call.decided.bias = &count[0], values_of(bias)
        call.decided.decided, call.decided.n_decided = &decided[0, 0], decided.shape[1]
        call.decided.pre, call.decided.y, call.decided.up = &pre[0, 0], &y[0, 0], NULL
        if up is not None:
            call.decided.up = &up[0, 0]
        call.decided.active, call.decided.added = &active[0], &added[0]
        if bring is not None:
            self.make_arriving(&call, bring)
            return
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (q.base, scales.base, addresses.base, ids.base, count.base)
            self.recording.kept += (decided.base, pre.base, active.base, y.base, added.base)
            self.recording.kept += (None if x is None else x.base, None if up is None else up.base,
                                    None if bias is None else bias.base)

    def repeat_arriving(self, Recording recording not None, Bring bring not None):
        """The call of `decided` that was recorded alone, for what `bring` brings: as many of its ids as
        those that were recorded, or fewer."""
        cdef fl_call call
        if recording.n != 1 or recording.calls[0].kind != FL_CALL_DECIDED:
            raise ValueError("not a recording of one call that adds neurons")
        call = recording.calls[0]
        if <int64_t>bring.c.n_ids > call.decided.items.n:
            raise ValueError("more items are being brought than were recorded")
        call.decided.items.n = bring.c.n_ids
        self.make_arriving(&call, bring)

    cdef int make_arriving(self, fl_call *call, Bring bring) except -1:
        """A `decided` call for each part that `bring` brings of its items, as it arrives."""
        cdef fl_failure failure
        cdef fl_kernel_status status = FL_KERNEL_OK
        cdef int answer
        cdef int64_t started, some, n_added = 0
        cdef int64_t *added = call.decided.added
        cdef int64_t *ns = &self.clock.ns[self.clock.phase & 7]
        self.only_now()
        if bring.c.ids != call.decided.items.ids or <int64_t>bring.c.n_ids != call.decided.items.n:
            raise ValueError("other items are being brought")
        call.decided.count = &some
        while True:
            with nogil:
                answer = bring.go_on(&failure)
                some = <int64_t>(bring.c.stop - bring.c.from_)
                if answer == FL_READ_OK and some > 0:
                    started = now_ns()
                    call.decided.items.ids = bring.c.ids + bring.c.from_
                    call.decided.items.n = some
                    status = fl_make_call(&self.engine, call, -1)
                    n_added += added[0]
                    ns[0] += now_ns() - started
            if answer != FL_READ_OK and answer != FL_TIMEOUT:
                raise _bring_failure(answer, &failure)
            self.check(status)
            if answer == FL_READ_OK and bring.c.from_ == bring.c.n_ids:
                added[0] = n_added
                return 0
            PyErr_CheckSignals()

    def linear(self, const float[:, ::1] x not None, uint8_t[::1] q not None, int64_t q_stride,
               float[::1] scales not None, int64_t scale_stride, bint quantised,
               tuple piece not None, const uint64_t[::1] addresses not None, int64_t start,
               int64_t n, float[:, ::1] out not None):
        cdef fl_call call
        call.kind = FL_CALL_LINEAR
        call.linear.acts = acts_of(&self.engine, x, q, q_stride, scales, scale_stride)
        call.linear.q, call.linear.scales, call.linear.prepares = &q[0], &scales[0], quantised
        call.linear.piece = piece_of(piece)
        call.linear.items = fl_items(&addresses[0], addresses.shape[0], NULL, start, n)
        call.linear.out, call.linear.out_stride = &out[0, start], out.shape[1]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (x.base, q.base, scales.base, addresses.base, out.base)

    cdef int norm(self, fl_call *call, const float[:, ::1] x, const float[::1] weight, float eps,
                  float[:, ::1] out) except -1:
        call.norm.x = <float *>&x[0, 0]  # written only where the caller has it writable
        call.norm.weight, call.norm.out = &weight[0], &out[0, 0]
        call.norm.n_rows, call.norm.n, call.norm.eps = x.shape[0], x.shape[1], eps
        self.make(call)
        if self.recording is not None:
            self.recording.kept += (x.base, weight.base, out.base)
        return 0

    def add_rms_norm(self, float[:, ::1] x not None, const float[:, ::1] added not None,
                     const float[::1] weight not None, float eps, float[:, ::1] out not None):
        cdef fl_call call
        call.kind, call.norm.added = FL_CALL_ADD_RMS_NORM, &added[0, 0]
        self.norm(&call, x, weight, eps, out)
        if self.recording is not None:
            self.recording.kept.append(added.base)

    def attend_token(self, float[:, :, ::1] q not None, float[:, :, ::1] k not None,
                     const float[:, :, ::1] v not None, const float[:, ::1] cosines not None,
                     const float[:, ::1] sines not None, uint8_t[::1] keys not None,
                     uint8_t[::1] values not None, int64_t kv_type, int64_t n_context,
                     int64_t position, int64_t window, float scale, float cap,
                     float[::1] scratch not None, float[:, ::1] out not None):
        """Recorded, it does not keep `keys` and `values`: they are a state's, which may end."""
        cdef fl_call call
        cdef fl_token *t = &call.attend.token
        call.kind, call.attend.n_positions = FL_CALL_ATTEND_TOKEN, n_context
        t.attention = fl_attention(&q[0, 0, 0], &keys[0], &values[0], kv_type, 1, q.shape[1],
                                   k.shape[1], q.shape[2], n_context, position, window, scale, cap,
                                   &scratch[0], &out[0, 0])
        t.q, t.k, t.v, t.half = &q[0, 0, 0], &k[0, 0, 0], &v[0, 0, 0], cosines.shape[1]
        t.cosines = t.sines = NULL
        if t.half:
            t.cosines, t.sines = &cosines[0, 0], &sines[0, 0]
            call.attend.n_positions = min(n_context, cosines.shape[0])
        t.keys, t.values = &keys[0], &values[0]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (q.base, k.base, v.base, cosines.base, sines.base)
            self.recording.kept += (scratch.base, out.base)

    def clear(self, float[:, ::1] x not None):
        cdef fl_call call
        call.kind = FL_CALL_CLEAR
        call.vector.x, call.vector.n = &x[0, 0], x.shape[0] * x.shape[1]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept.append(x.base)

    def add(self, float[:, ::1] x not None, const float[:, ::1] added not None):
        cdef fl_call call
        call.kind, call.vector.added = FL_CALL_ADD, &added[0, 0]
        call.vector.x, call.vector.n = &x[0, 0], x.shape[0] * x.shape[1]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (x.base, added.base)

    def scale(self, float[:, ::1] x not None, float factor):
        cdef fl_call call
        call.kind, call.vector.factor = FL_CALL_SCALE, factor
        call.vector.x, call.vector.n = &x[0, 0], x.shape[0] * x.shape[1]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept.append(x.base)

    def decode_rows(self, tuple piece not None, const uint64_t[::1] addresses not None,
                    const int32_t[::1] ids not None, float[:, ::1] out not None):
        self.only_now()
        cdef fl_piece p = piece_of(piece)
        cdef fl_items items = fl_items(&addresses[0], addresses.shape[0], &ids[0], 0, ids.shape[0])
        cdef fl_kernel_status status
        cdef int64_t started = now_ns()
        with nogil:
            status = fl_op_decode(&self.engine, &p, &items, &out[0, 0])
        self.clock.add(started)
        self.check(status)

    def rms_norm(self, const float[:, ::1] x not None, const float[::1] weight not None, float eps,
                 float[:, ::1] out not None):
        cdef fl_call call
        call.kind = FL_CALL_RMS_NORM
        self.norm(&call, x, weight, eps, out)

    def layer_norm(self, const float[:, ::1] x not None, const float[::1] weight not None,
                   const float[::1] bias not None, float eps, float[:, ::1] out not None):
        cdef fl_call call
        call.kind, call.norm.bias = FL_CALL_LAYER_NORM, &bias[0]
        self.norm(&call, x, weight, eps, out)
        if self.recording is not None:
            self.recording.kept.append(bias.base)

    def rope(self, float[:, :, ::1] x not None, const float[:, ::1] cosines not None,
             const float[:, ::1] sines not None):
        self.only_now()
        cdef int64_t started = now_ns()
        with nogil:
            fl_op_rope(&self.engine, &x[0, 0, 0], &cosines[0, 0], &sines[0, 0], x.shape[0],
                       x.shape[1], x.shape[2], cosines.shape[1])
        self.clock.add(started)

    def attention(self, const float[:, :, ::1] q not None, const uint8_t[::1] k not None,
                  const uint8_t[::1] v not None, int64_t kv_type, int64_t n_kv_heads,
                  int64_t n_context, int64_t first_position, int64_t window, float scale,
                  float cap, float[::1] scratch not None, float[:, ::1] out not None):
        self.only_now()
        cdef fl_attention a = fl_attention(&q[0, 0, 0], &k[0], &v[0], kv_type, q.shape[0],
                                           q.shape[1], n_kv_heads, q.shape[2], n_context,
                                           first_position, window, scale, cap, &scratch[0],
                                           &out[0, 0])
        cdef int64_t started = now_ns()
        with nogil:
            fl_op_attention(&self.engine, &a)
        self.clock.add(started)

    def activate(self, int kind, const float[:, ::1] pre not None, const float[:, ::1] up,
                 float[:, ::1] out not None):
        cdef fl_call call
        call.kind, call.activate.kind = FL_CALL_ACTIVATE, <fl_activation>kind
        call.activate.pre = &pre[0, 0]
        call.activate.up = NULL
        if up is not None:
            call.activate.up = &up[0, 0]
        call.activate.n, call.activate.out = pre.shape[0] * pre.shape[1], &out[0, 0]
        self.make(&call)
        if self.recording is not None:
            self.recording.kept += (pre.base, None if up is None else up.base, out.base)

    def mix_tokens(self, int kind, const float[:, ::1] x not None, const float[::1] last not None,
                   tuple shares not None, float[:, :, ::1] out not None):
        self.only_now()
        cdef const float *pointers[8]
        cdef int64_t n_mixes = len(shares)
        if n_mixes > 8:
            raise ValueError(f"{n_mixes} mixes at once")
        for i in range(n_mixes):
            pointers[i] = values_of(shares[i])
        cdef int64_t started = now_ns()
        with nogil:
            fl_op_mix_tokens(&self.engine, <fl_share>kind, &x[0, 0], &last[0], pointers, n_mixes,
                             x.shape[0], x.shape[1], &out[0, 0, 0])
        self.clock.add(started)

    def rwkv4(self, const float[:, ::1] r not None, const float[:, ::1] k not None,
              const float[:, ::1] v not None, const float[::1] decay not None,
              const float[::1] first not None, float[:, ::1] memory not None,
              float[::1] exponent not None, float[:, ::1] out not None):
        self.only_now()
        cdef fl_rwkv4 a = fl_rwkv4(r.shape[0], r.shape[1], &r[0, 0], &k[0, 0], &v[0, 0], &decay[0],
                                   &first[0], &memory[0, 0], &memory[1, 0], &exponent[0],
                                   &out[0, 0])
        cdef int64_t started = now_ns()
        with nogil:
            fl_op_rwkv4(&self.engine, &a)
        self.clock.add(started)

    def rwkv5(self, r, k, v, gate, const float[:, ::1] decay not None, decay_bias, first,
              norm_weight, norm_bias, float eps, float[:, :, ::1] memory not None,
              float[:, ::1] out not None):
        self.only_now()
        cdef fl_rwkv5 a = fl_rwkv5(
            out.shape[0], memory.shape[0], memory.shape[1], eps, rows_of(r), rows_of(k), rows_of(v),
            rows_of(gate), &decay[0, 0], values_of(decay_bias), values_of(first),
            values_of(norm_weight), values_of(norm_bias), &memory[0, 0, 0], &out[0, 0])
        cdef int64_t started = now_ns()
        with nogil:
            fl_op_rwkv5(&self.engine, &a)
        self.clock.add(started)

    def rwkv7(self, r, decay, k, rate, gate, float[:, ::1] v not None, share,
              float[:, ::1] first_v not None, decay_bias, rate_bias, share_bias, key_unit, key_rate,
              bonus, norm_weight, norm_bias, float eps, float[:, :, ::1] memory not None,
              float[:, ::1] out not None):
        self.only_now()
        cdef fl_rwkv7 a = fl_rwkv7(
            out.shape[0], memory.shape[0], memory.shape[1], eps, rows_of(r), rows_of(decay),
            rows_of(k), rows_of(rate), rows_of(gate), &v[0, 0], rows_of(share), &first_v[0, 0],
            values_of(decay_bias), values_of(rate_bias), values_of(share_bias),
            values_of(key_unit), values_of(key_rate), values_of(bonus), values_of(norm_weight),
            values_of(norm_bias), &memory[0, 0, 0], &out[0, 0])
        cdef int64_t started = now_ns()
        with nogil:
            fl_op_rwkv7(&self.engine, &a)
        self.clock.add(started)

    def active_ids(self, const float[:, ::1] pre not None, int32_t[::1] out not None):
        self.only_now()
        cdef int64_t found
        cdef int64_t started = now_ns()
        with nogil:
            found = fl_op_active_ids(&pre[0, 0], NULL, pre.shape[0], pre.shape[1], &out[0])
        self.clock.add(started)
        return found


# ------------------------------------------------------------------------------------ reading

cimport cython
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals

cdef extern from "fl_reader.h" nogil:
    enum:
        FL_DIRECT, FL_PREAD, FL_MMAP
        FL_READ_OK, FL_FAIL_READ, FL_FAIL_END, FL_FAIL_CHECK
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
    ctypedef struct fl_run:
        int64_t offset, length
        uint64_t address
        size_t n_frames
        const uint64_t *offsets
        const uint32_t *stored
        const uint64_t *digests
        uint64_t file_id
    fl_reader *fl_reader_open(int fd, int mode, int64_t size, int depth, int ring_depth,
                              int64_t alignment, int64_t memory_alignment, int *ring_error,
                              int *error)
    void fl_reader_close(fl_reader *r)
    void fl_reader_free(fl_reader *r)
    int fl_reader_read(fl_reader *r, int64_t offset, int64_t length, uint8_t *out,
                       fl_failure *failure)
    const fl_source *fl_reader_source(const fl_reader *r)
    int fl_reader_submit(fl_reader *r, const fl_batch *batch, int is_ahead, fl_ticket **ticket,
                         fl_failure *failure)
    int fl_reader_submit_run(fl_reader *r, const fl_run *run, fl_ticket **ticket,
                             fl_failure *failure)
    int fl_ticket_wait(fl_ticket *t, int64_t upto, int64_t slice_ns, fl_failure *failure)
    int64_t fl_ticket_done(const fl_ticket *t)
    void fl_ticket_close(fl_ticket *t)
    void fl_ticket_free(fl_ticket *t)
    void fl_direct_alignment(int fd, int64_t *alignment, int64_t *memory_alignment)
    int64_t fl_resident_bytes(int fd, int64_t offset, int64_t length)

cdef extern from "fl_frames.h" nogil:
    ctypedef struct fl_frames:
        size_t n_frames
        const uint64_t *offsets
        const uint32_t *stored
        const uint64_t *digests
        uint64_t file_id
        int64_t alignment
    ctypedef struct fl_scatter:
        size_t n
        const int32_t *first
        const int32_t *frames
        const int64_t *offset
        const int64_t *length
        uint64_t *targets
        uint64_t room, room_end, step, trash
    int64_t fl_frames_coalesce(const fl_frames *t, const int32_t *frames, size_t n,
                               int64_t max_gap, int64_t max_extent, int64_t max_frames,
                               int32_t *first, int64_t *offset, int64_t *length)
    int64_t fl_frames_bytes(const fl_frames *t, const int32_t *frames, size_t n)
    enum:
        FL_NO_FRAMES, FL_NO_ROOM
    void *fl_frames_scatter(const fl_frames *t, const fl_scatter *s, fl_batch *batch,
                            int *refused)

cdef extern from "fl_bring.h" nogil:
    ctypedef struct fl_bring:
        const fl_frames *tables
        fl_reader *reader
        uint64_t *addresses
        const int32_t *frame_slot
        const int32_t *ids
        size_t n_ids
        int64_t per_frame
        const int32_t *first
        const int32_t *missing
        const int64_t *offset
        const int64_t *length
        uint64_t *targets
        size_t n_extents
        uint64_t halves[2]
        uint64_t half_bytes, step, trash
        size_t from_ "from"
        size_t stop, n_submitted
        int64_t wait_ns, n_bytes
    int fl_bring_start(fl_bring *b, fl_failure *failure)
    int fl_bring_next(fl_bring *b, int64_t slice_ns, fl_failure *failure)
    void fl_bring_end(fl_bring *b)

cdef extern from "fl_slots.h" nogil:
    ctypedef struct fl_slots:
        size_t n_frames, n_most
        int32_t *frame_slot
        int32_t *last_use
        uint64_t *addresses
        int32_t *slot_frame
        const uint64_t *slot_address
        int16_t *pins
        uint8_t *prefetched
        double *heat
    ctypedef struct fl_take:
        const int32_t *frames
        size_t n, n_slots, n_used
        double worth
        int32_t clock
        int admit
        int32_t *hits
        int32_t *missing
        int32_t *placed
        int32_t *unused
        uint64_t *targets
        size_t n_hits, n_missing, n_placed, n_unused, n_evicted
        int32_t *scratch
    enum:
        FL_LOADING
    int fl_slots_take(const fl_slots *s, fl_take *t)
    int fl_slots_end(const fl_slots *s, const int32_t *hits, size_t n_hits,
                     const int32_t *placed, size_t n_placed)

cdef extern from "fl_request.h" nogil:
    ctypedef struct fl_request:
        const int32_t *ids
        size_t n_ids
        int64_t per_frame, max_gap, max_extent, max_frames
        fl_take take
        size_t n_absent, n_extents
        int64_t absent_bytes, unused_bytes
        int32_t *first
        int64_t *offset
        int64_t *length
    enum:
        FL_NO_MEMORY
    int fl_request_make(const fl_slots *s, const fl_frames *t, fl_request *r)
    int fl_request_end(const fl_slots *s, fl_request *r)
    void fl_request_free(fl_request *r)

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
    FL_BAD_CHECK: "a check has a negative length, or lies outside a run",
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
cdef class FrameTables:
    """Where a plane's frames lie: `arrays` (offsets uint64, stored uint32, digests uint64), a row
    per frame, looked at once.  See fl_frames.h."""
    cdef fl_frames c
    cdef const uint64_t[::1] offsets, digests  # keep the memory
    cdef const uint32_t[::1] stored
    cdef readonly tuple arrays
    cdef readonly object file_id
    cdef readonly int64_t alignment

    def __cinit__(self, const uint64_t[::1] offsets, const uint32_t[::1] stored,
                  const uint64_t[::1] digests, *, uint64_t file_id, int64_t alignment):
        if not offsets.shape[0] == stored.shape[0] == digests.shape[0] or alignment < 1:
            raise ValueError("the tables do not fit each other")
        self.offsets, self.stored, self.digests = offsets, stored, digests
        self.alignment = self.c.alignment = alignment
        self.c.n_frames, self.c.file_id = offsets.shape[0], file_id
        if offsets.shape[0]:
            self.c.offsets, self.c.stored, self.c.digests = &offsets[0], &stored[0], &digests[0]

    def __init__(self, offsets, stored, digests, *, file_id, alignment):
        self.arrays, self.file_id = (offsets, stored, digests), file_id

    def coalesce(self, const int32_t[::1] frames, int64_t max_gap, int64_t max_extent,
                 int64_t max_frames, int32_t[::1] first, int64_t[::1] offset,
                 int64_t[::1] length):
        """Fill in extents that hold `frames`, ascending; how many.  ValueError for other frames."""
        cdef size_t m = frames.shape[0]
        cdef int64_t n
        if (<size_t>first.shape[0] <= m or <size_t>offset.shape[0] < m
                or <size_t>length.shape[0] < m):
            raise ValueError("no room for so many extents")
        n = fl_frames_coalesce(&self.c, &frames[0] if m else NULL, m, max_gap, max_extent,
                               max_frames, &first[0], &offset[0] if m else NULL,
                               &length[0] if m else NULL)
        if n < 0:
            raise ValueError("the frames are no ascending rows of the tables")
        return n

    def n_bytes(self, const int32_t[::1] frames):
        """The bytes of these frames in the file, padding included."""
        cdef size_t m = frames.shape[0]
        cdef int64_t n = fl_frames_bytes(&self.c, &frames[0] if m else NULL, m)
        if n < 0:
            raise ValueError("the frames are no rows of the tables")
        return n


@cython.no_gc
cdef class SlotTables:
    """A sparse plane's tables (cache/segment.py, offload/state.py; `heat`: cache/policies/lfu.py),
    looked at once; they stay the caller's and must not be replaced.  See fl_slots.h."""
    cdef fl_slots c
    cdef tuple _kept  # keeps the memory
    cdef readonly object addresses

    def __cinit__(self, int32_t[::1] frame_slot, int32_t[::1] last_use, uint64_t[::1] addresses,
                  int32_t[::1] slot_frame, const uint64_t[::1] slot_address, int16_t[::1] pins,
                  uint8_t[::1] prefetched, double[::1] heat):
        cdef size_t n_frames = frame_slot.shape[0], n_most = slot_frame.shape[0]
        if (not n_frames or <size_t>last_use.shape[0] != n_frames
                or <size_t>addresses.shape[0] != n_frames
                or <size_t>slot_address.shape[0] != n_most or <size_t>pins.shape[0] != n_most
                or <size_t>prefetched.shape[0] != n_most or <size_t>heat.shape[0] != n_most):
            raise ValueError("the tables do not fit each other")
        self._kept = (frame_slot, last_use, addresses, slot_frame, slot_address, pins, prefetched,
                      heat)
        self.addresses = addresses.base
        self.c = fl_slots(n_frames, n_most, &frame_slot[0], &last_use[0], &addresses[0])
        if n_most:
            self.c.slot_frame, self.c.slot_address = &slot_frame[0], &slot_address[0]
            self.c.pins, self.c.prefetched, self.c.heat = &pins[0], &prefetched[0], &heat[0]

    def take(self, const int32_t[::1] frames, int64_t n_slots, int64_t n_used, double worth,
             int32_t clock, bint admit, int32_t[:, ::1] answer, uint64_t[::1] targets,
             int32_t[::1] scratch):
        """Hits, missing, placed and unused into the rows of `answer`; (how many of each, how many
        were evicted).  ValueError for frames that are no ascending rows or are being read."""
        cdef fl_take t
        cdef size_t n = frames.shape[0]
        cdef int status
        if not 0 <= n_used <= n_slots <= <int64_t>self.c.n_most:
            raise ValueError("more slots than there are")
        if answer.shape[0] != 4 or <size_t>answer.shape[1] < n or <size_t>targets.shape[0] < n:
            raise ValueError("no room for the answer")
        if <size_t>scratch.shape[0] < n or <size_t>scratch.shape[0] < self.c.n_most:
            raise ValueError("no room to work in")
        if n == 0:
            return 0, 0, 0, 0, 0
        t.frames, t.n, t.n_slots, t.n_used = &frames[0], n, n_slots, n_used
        t.worth, t.clock, t.admit = worth, clock, admit
        t.hits, t.missing, t.placed, t.unused = (&answer[0, 0], &answer[1, 0], &answer[2, 0],
                                                 &answer[3, 0])
        t.targets, t.scratch = &targets[0], &scratch[0]
        status = fl_slots_take(&self.c, &t)
        if status:
            raise ValueError("a frame is on its way into its slot" if status == FL_LOADING else
                             "the frames are no ascending rows of the tables")
        return t.n_hits, t.n_missing, t.n_placed, t.n_unused, t.n_evicted

    def end(self, const int32_t[::1] hits, const int32_t[::1] placed):
        """Take a pin from each of these slots; False, and nothing is changed, where one has none or
        a frame placed has not arrived."""
        cdef size_t n_hits = hits.shape[0], n_placed = placed.shape[0]
        return fl_slots_end(&self.c, &hits[0] if n_hits else NULL, n_hits,
                            &placed[0] if n_placed else NULL, n_placed) == 0


@cython.no_gc
cdef class Request:
    """Items of a sparse plane with the slots that they hold until `end`, and the extents that bring
    what is missing of them; see fl_request.h.

    ids  int32 ascending; the others as SlotTables.take and FrameTables.coalesce have them
    """
    cdef fl_request c
    cdef SlotTables slots  # keep the memory
    cdef FrameTables tables
    cdef const int32_t[::1] ids
    cdef int64_t ns  # that making it took

    def __cinit__(self, SlotTables slots not None, FrameTables tables not None,
                  const int32_t[::1] ids not None, int64_t per_frame, int64_t n_slots,
                  int64_t n_used, double worth, int32_t clock, bint admit, int64_t max_gap,
                  int64_t max_extent, int64_t max_frames):
        cdef int64_t started = now_ns()
        cdef int status
        if not 0 <= n_used <= n_slots <= <int64_t>slots.c.n_most:
            raise ValueError("more slots than there are")
        if not ids.shape[0] or slots.c.n_frames != tables.c.n_frames:
            raise ValueError("the items and the tables do not fit each other")
        self.slots, self.tables, self.ids = slots, tables, ids
        self.c.ids, self.c.n_ids, self.c.per_frame = &ids[0], ids.shape[0], per_frame
        self.c.max_gap, self.c.max_extent, self.c.max_frames = max_gap, max_extent, max_frames
        self.c.take.n_slots, self.c.take.n_used = n_slots, n_used
        self.c.take.worth, self.c.take.clock, self.c.take.admit = worth, clock, admit
        status = fl_request_make(&slots.c, &tables.c, &self.c)
        self.ns = now_ns() - started
        if status == FL_NO_MEMORY:
            raise MemoryError
        if status:
            raise ValueError("a frame is on its way into its slot" if status == FL_LOADING else
                             "the items are no ascending rows of the tables")

    def __dealloc__(self):
        fl_request_free(&self.c)

    def __len__(self):
        """Extents."""
        return self.c.n_extents

    def counts(self):
        """(How many slots more than before hold a frame, whether any holds another, how many items
        are absent, their bytes, bytes of victims never used)."""
        cdef const fl_take *t = &self.c.take
        return (<int64_t>t.n_placed - <int64_t>t.n_evicted, t.n_placed + t.n_evicted > 0,
                self.c.n_absent, self.c.absent_bytes, self.c.unused_bytes)

    def frames(self):
        """The frames that are missing, as lists: all of them, and of each extent where they begin
        among those, with its offset and its length."""
        cdef size_t i
        cdef size_t n = self.c.n_extents
        return ([self.c.take.missing[i] for i in range(self.c.take.n_missing)],
                [self.c.first[i] for i in range(n + 1)], [self.c.offset[i] for i in range(n)],
                [self.c.length[i] for i in range(n)])

    def slots_held(self):
        """Slots of what was there, and of what is to come, as lists."""
        cdef size_t i
        return ([self.c.take.hits[i] for i in range(self.c.take.n_hits)],
                [self.c.take.placed[i] for i in range(self.c.take.n_placed)])

    def end(self):
        """As SlotTables.end; once it was True there is nothing to end."""
        return fl_request_end(&self.slots.c, &self.c) == 0


@cython.no_gc
cdef class Reader:
    """fl_reader over a descriptor that it owns from now on; raises OSError when it cannot open."""
    cdef fl_reader *reader
    cdef readonly int ring_error  # why threads read though a ring was asked for; 0: it works
    # Nanoseconds that callers have spent here on asking for reads, without waiting for them.
    cdef readonly int64_t submit_ns

    def __cinit__(self, int fd, int mode, int64_t size, int depth, int64_t alignment,
                  int64_t memory_alignment, int ring_depth=0):
        cdef int error = 0
        if not 1 <= depth <= 256 or not 0 <= ring_depth <= 256 or alignment < 1 or memory_alignment < 1:
            raise ValueError("depths are 1..256 and alignments are positive")
        with nogil:
            self.reader = fl_reader_open(fd, mode, size, depth, ring_depth, alignment,
                                         memory_alignment, &self.ring_error, &error)
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
        if status != FL_READ_OK:
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
               const uint64_t[::1] check_seed, const uint64_t[::1] check_digest, bint ahead):
        """Queue one batch; its NativeTicket.  The arrays are copied, the destinations are not."""
        cdef fl_batch b
        cdef fl_failure failure
        cdef int status
        cdef int64_t started = now_ns()
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
            status = fl_reader_submit(self.reader, &b, ahead, &ticket.ticket, &failure)
        self.submit_ns += now_ns() - started
        if status != FL_READ_OK:
            raise _failure(status, &failure)
        ticket.reader, ticket.n = self, b.n_extents
        return ticket

    def submit_runs(self, FrameTables tables not None, const int64_t[:, ::1] runs not None,
                    int64_t first, list stages not None):
        """Queue runs[first], runs[first + 1], … of these tables, one to each of `stages`, as reads
        ahead; their bytes.  A row of `runs` is (start, stop, offset, bytes): the frames [start,
        stop) lie one after the other in the file.  What cannot be queued ends all of them."""
        cdef fl_run run
        cdef fl_failure failure
        cdef int status = FL_READ_OK
        cdef int64_t started = now_ns(), n_bytes = 0
        cdef Py_ssize_t i, n = len(stages)
        cdef RunRead stage
        if runs.shape[1] != 4 or not 0 <= first <= runs.shape[0] - n:
            raise ValueError("there are no such runs")
        for i in range(n):
            stage = <RunRead?>stages[i]
            if not 0 <= runs[first + i, 0] < runs[first + i, 1] <= <int64_t>tables.c.n_frames:
                raise ValueError("the frames of a run do not lie in its tables")
        for i in range(n):
            stage = <RunRead>stages[i]
            run.offset, run.length = runs[first + i, 2], runs[first + i, 3]
            if stage.ticket != NULL:
                end_runs(stages[:i])
                raise ValueError("a stage is in use")
            stage.start, stage.stop = runs[first + i, 0], runs[first + i, 1]
            stage.reader, stage.tables = self, tables
            stage.shift = stage.address - <uint64_t>run.offset
            run.address, run.n_frames = stage.address, stage.stop - stage.start
            run.file_id, run.offsets = tables.c.file_id, tables.c.offsets + stage.start
            run.stored, run.digests = tables.c.stored + stage.start, tables.c.digests + stage.start
            with nogil:
                status = fl_reader_submit_run(self.reader, &run, &stage.ticket, &failure)
            if status != FL_READ_OK:
                stage.ticket = NULL
                end_runs(stages[:i])
                failure.extent += i
                raise _failure(status, &failure)
            n_bytes += run.length
        self.submit_ns += now_ns() - started
        return n_bytes

    def submit_frames(self, FrameTables tables not None, int64_t start, int64_t stop,
                      const int32_t[::1] first, const int64_t[::1] offset,
                      const int64_t[::1] length, const int32_t[::1] frames,
                      uint64_t[::1] targets, uint64_t room, uint64_t room_bytes, uint64_t step,
                      uint64_t trash, bint ahead):
        """Queue the extents [start, stop) of these frames; its NativeTicket."""
        cdef fl_scatter s
        cdef fl_batch b
        cdef fl_failure failure
        cdef int status = FL_SYSTEM, refused = 0
        cdef void *memory
        cdef int64_t e, started = now_ns()
        cdef NativeTicket ticket = NativeTicket.__new__(NativeTicket)
        if not 0 <= start < stop <= offset.shape[0] or not (
                offset.shape[0] == length.shape[0] == first.shape[0] - 1):
            raise ValueError("there are no such extents")
        if frames.shape[0] != targets.shape[0]:
            raise ValueError("the targets do not fit the frames")
        for e in range(start, stop):
            if not 0 <= first[e] <= first[e + 1] <= frames.shape[0]:
                raise ValueError("the extents' frames do not ascend within the frames")
        if first[stop] == first[start]:
            raise ValueError("the extents have no frames")
        s.n, s.first, s.offset, s.length = stop - start, &first[start], &offset[start], &length[start]
        s.frames, s.targets = &frames[0], &targets[0]
        s.room, s.room_end, s.step, s.trash = room, room + room_bytes, step, trash
        failure.error = ENOMEM
        with nogil:
            memory = fl_frames_scatter(&tables.c, &s, &b, &refused)
            if memory != NULL:
                status = fl_reader_submit(self.reader, &b, ahead, &ticket.ticket, &failure)
                free(memory)
        self.submit_ns += now_ns() - started
        if refused:
            raise ValueError("no room for all frames" if refused == FL_NO_ROOM else
                             "the frames are no rows of the tables")
        if status != FL_READ_OK:
            raise _failure(status, &failure)
        ticket.reader, ticket.n = self, s.n
        return ticket


cdef _bring_failure(int status, fl_failure *failure):
    if status == FL_REFUSED and failure.kind == 0:
        return ValueError("extents, frames and targets do not fit each other")
    return _failure(status, failure)


@cython.no_gc
cdef class Bring:
    """Items of a sparse plane, brought in parts; see fl_bring.h.  Deleting it waits for what is in
    flight."""
    cdef fl_bring c
    cdef Reader reader  # keep the memory
    cdef Request request

    def __cinit__(self, Reader reader not None, Request request not None, uint64_t half,
                  uint64_t other_half, uint64_t half_bytes, uint64_t step, uint64_t trash):
        """Submit what there is room for; a request is brought once."""
        cdef int64_t started = now_ns()
        cdef fl_failure failure
        cdef int status
        cdef const fl_request *r = &request.c
        cdef const fl_slots *slots = &request.slots.c
        self.reader, self.request = reader, request
        self.c.tables, self.c.reader = &request.tables.c, reader.reader
        self.c.addresses, self.c.frame_slot = slots.addresses, slots.frame_slot
        self.c.ids, self.c.n_ids, self.c.per_frame = r.ids, r.n_ids, r.per_frame
        self.c.first, self.c.n_extents, self.c.missing = r.first, r.n_extents, r.take.missing
        self.c.offset, self.c.length, self.c.targets = r.offset, r.length, r.take.targets
        self.c.halves = [half, other_half]
        self.c.half_bytes, self.c.step, self.c.trash = half_bytes, step, trash
        with nogil:
            status = fl_bring_start(&self.c, &failure)
        reader.submit_ns += request.ns + now_ns() - started
        if status != FL_READ_OK:
            raise _bring_failure(status, &failure)

    def __dealloc__(self):
        with nogil:
            fl_bring_end(&self.c)

    def next(self):
        """(from, stop): ids[from:stop] can be used until the next call; from == len(ids): all are
        through.  ReadFailure for the first extent that cannot be read."""
        cdef fl_failure failure
        cdef int status = FL_TIMEOUT
        while status == FL_TIMEOUT:
            with nogil:  # in slices, so that a Ctrl-C is seen
                status = self.go_on(&failure)
            if status == FL_TIMEOUT:
                PyErr_CheckSignals()
        if status != FL_READ_OK:
            raise _bring_failure(status, &failure)
        return self.c.from_, self.c.stop

    cdef int go_on(self, fl_failure *failure) noexcept nogil:
        """fl_bring_next, and what it took."""
        cdef int64_t started = now_ns(), waited = self.c.wait_ns
        cdef int status = fl_bring_next(&self.c, SLICE_NS, failure)
        self.reader.submit_ns += now_ns() - started - (self.c.wait_ns - waited)
        return status

    def submitted(self):
        """(extents, bytes) so far, and the nanoseconds that were waited for them."""
        return self.c.n_submitted, self.c.n_bytes, self.c.wait_ns

    def end(self):
        """Wait for what is in flight; what was lent is absent again.  Idempotent."""
        cdef int64_t started = now_ns()
        with nogil:
            fl_bring_end(&self.c)
        self.reader.submit_ns += now_ns() - started


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
                status = fl_ticket_wait(self.ticket, upto, SLICE_NS, &failure)
            if status == FL_TIMEOUT:
                PyErr_CheckSignals()
        if status != FL_READ_OK:
            raise _failure(status, &failure)

    def done(self):
        """How many extents, from the first on, are there; -1 in a forked child."""
        return fl_ticket_done(self.ticket)

    def close(self):
        with nogil:
            fl_ticket_close(self.ticket)


@cython.no_gc
cdef class RunRead:
    """Frames of a plane that lie one after another in the file, on their way to `address` and on.

    `Reader.submit_runs` begins it, `end_runs` ends it, and then it may begin anew.  Deleting it waits
    for what is in flight.
    """
    cdef fl_ticket *ticket  # NULL: nothing has begun
    cdef Reader reader  # outlives the ticket: its lock guards it
    cdef FrameTables tables
    cdef readonly uint64_t address
    cdef readonly uint64_t shift  # from a frame's offset to its address, modulo 2**64
    cdef readonly int64_t start, stop  # the frames

    def __cinit__(self, uint64_t address, *_):
        self.address = address

    def __dealloc__(self):
        self.finish()

    cdef void finish(self) noexcept:
        if self.ticket != NULL:
            with nogil:
                fl_ticket_free(self.ticket)
            self.ticket = NULL

    @property
    def begun(self):
        return self.ticket != NULL

    def arrived(self):
        """Whether it is there; never blocks."""
        return self.ticket != NULL and fl_ticket_done(self.ticket) == 1

    def wait(self):
        """Return when it is there; ReadFailure when it cannot be."""
        cdef fl_failure failure
        cdef int status = FL_TIMEOUT
        if self.ticket == NULL:
            raise ValueError("nothing to wait for")
        while status == FL_TIMEOUT:
            with nogil:  # in slices, so that a Ctrl-C is seen
                status = fl_ticket_wait(self.ticket, 1, SLICE_NS, &failure)
            if status == FL_TIMEOUT:
                PyErr_CheckSignals()
        if status != FL_READ_OK:
            raise _failure(status, &failure)


def runs_arrived(list stages not None, int64_t most):
    """How many, from the first and at most `most`, are runs that have arrived."""
    cdef Py_ssize_t n = 0, stop = min(<Py_ssize_t>most, len(stages))
    cdef RunRead stage
    while n < stop:
        stage = <RunRead?>stages[n]
        if stage.ticket == NULL or fl_ticket_done(stage.ticket) != 1:
            break
        n += 1
    return n


def lend_runs(list stages not None, uint64_t[::1] addresses not None):
    """Where the frames of these runs are, into a table by frame number; slices of them, as few as
    can be.  ValueError, before anything has changed, where one has an address already."""
    cdef RunRead stage
    cdef int64_t i, start = 0, stop = 0
    lent = []
    for each in stages:
        stage = <RunRead?>each
        if stage.ticket == NULL or addresses.shape[0] != <Py_ssize_t>stage.tables.c.n_frames:
            raise ValueError("the frames are no rows of the tables")
        for i in range(stage.start, stage.stop):
            if addresses[i]:
                raise ValueError(f"frame {i} is present")
    for each in stages:
        stage = <RunRead>each
        for i in range(stage.start, stage.stop):
            addresses[i] = stage.tables.c.offsets[i] + stage.shift
        if stage.start != stop:
            if stop > start:
                lent.append(slice(start, stop))
            start = stage.start
        stop = stage.stop
    if stop > start:
        lent.append(slice(start, stop))
    return lent


def end_runs(list stages not None):
    """Wait for what is in flight of these; idempotent."""
    for each in stages:
        (<RunRead?>each).finish()


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
