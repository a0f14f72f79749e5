"""One tree of exceptions; every message names the thing: file, place, expected, found.

Errors format themselves from their fields, so that a message is worded once and tests can look at
the fields.  The command line maps them to exit codes by `exit_code`.
"""

from __future__ import annotations


class FlashError(Exception):
    """Root of everything flashllm raises on purpose."""

    exit_code = 1


class UsageError(FlashError, ValueError):
    """The caller asked for something that cannot be: an unknown name, a wrong value."""

    exit_code = 2


class UnknownNameError(UsageError, KeyError):
    """A name that is in none of our tables; the message lists the known ones."""

    def __init__(self, kind: str, name: object, known: list[str]):
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(self.known) or 'none'}")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class ContextLengthError(UsageError):
    """More tokens than the context holds."""

    def __init__(self, n_tokens: int, n_context: int, what: str = "prompt"):
        self.n_tokens, self.n_context = n_tokens, n_context
        super().__init__(f"{what} needs {n_tokens} tokens, the context holds {n_context}")


class ClosedError(FlashError):
    """The object was closed and cannot be used any more."""


class BusyError(FlashError):
    """Another generation is in flight on this handle."""


class BudgetError(FlashError):
    """The RAM budget cannot be met."""

    exit_code = 4

    def __init__(self, budget_bytes: int, floor_bytes: int, why: str = ""):
        self.budget_bytes, self.floor_bytes = budget_bytes, floor_bytes
        super().__init__(
            f"ram_budget of {budget_bytes} bytes ({budget_bytes / 2**20:.1f} MiB) is below the "
            f"floor of {floor_bytes} bytes ({floor_bytes / 2**20:.1f} MiB)"
            + (f": {why}" if why else "")
        )


class UnsupportedError(FlashError):
    """A well-formed request or file that this build, machine or version does not serve."""

    exit_code = 3


class FormatError(FlashError):
    """A file breaks its format's promises.

    `path` is the file, `where` the place in it (a field, tensor, frame, offset), `expected` and
    `found` the two sides of the broken promise.
    """

    exit_code = 3

    def __init__(self, path: object, where: str, expected: object, found: object):
        self.path, self.where, self.expected, self.found = str(path), where, expected, found
        super().__init__(f"{path}: {where}: expected {expected}, found {found}")


class CheckpointError(FormatError):
    """A source checkpoint (safetensors, config.json, …) is malformed or incomplete."""


class TokenizerError(FormatError):
    """The carried tokenizer cannot be read, or is needed and absent."""


class ChecksumError(FormatError):
    """Bytes on the device are not the bytes that were written."""

    def __init__(self, path: object, where: str, expected: int, found: int):
        super().__init__(path, where, f"checksum {expected:016x}", f"{found:016x}")


class FitMismatchError(FormatError):
    """A .fit file was fitted to another container than the one it lies beside."""

    def __init__(self, path: object, fitted_to: str, container: str):
        self.fitted_to, self.container = fitted_to, container
        super().__init__(path, "model", f"a fit to container {container}", f"one to {fitted_to}")


class CodecError(FormatError):
    """Stored bytes do not decode to exactly the promised size."""


class FlashReadError(FlashError, OSError):
    """A read failed: the device, a truncated file, a vanished mapping."""

    def __init__(self, errno: int, strerror: str, path: object, offset: int, where: str = ""):
        OSError.__init__(self, errno, strerror, str(path))
        self.path, self.offset, self.where = str(path), offset, where

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.path}: read at offset {self.offset}{place}: {self.strerror} [{self.errno}]"


class ConversionError(FlashError):
    """A conversion could not finish; the source is untouched and nothing has the final name."""


class WeightValueError(FlashError, ValueError):
    """A weight that the chosen weight type cannot hold: NaN, infinite, or out of its range."""

    def __init__(self, weight_type: str, row: int, column: int, value: float, why: str):
        self.weight_type, self.row, self.column = weight_type, row, column
        self.value, self.why = value, why
        super().__init__(f"{weight_type}: row {row}, column {column}: value {value!r} {why}")


class KernelError(FlashError, AssertionError):
    """Our own mistake at the border to C: an absent frame, an id out of range, ids out of order."""
