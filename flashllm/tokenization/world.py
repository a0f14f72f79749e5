"""RWKV's World vocabulary: greedy longest match over raw bytes.

The file has a line per token: its id, its bytes as a Python string or bytes literal, their number.
Ids without a line have no text; id 0 is the end of a text by convention.  A vocabulary of the 256
single bytes in the same form is the byte-level tokenizer.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterable

from ..errors import TokenizerError, UsageError
from .stream import StreamDecoder

BLOB = "rwkv_vocab.txt"
_LINE = re.compile(r"(\d{1,8}) (b?(?:'.*'|\".*\")) (\d{1,4})")
_MAX_TOKENS, _MAX_LINE = 2**20, 4096


class WorldTokenizer:
    """The verbs of Tokenizer, and `encode_bytes` and `decode_bytes` for what is no text."""

    bos_id = None

    def __init__(self, tokens: dict[int, bytes]):
        self._tokens = tokens
        self._ids = {token: token_id for token_id, token in tokens.items()}
        # what follows a first pair of bytes: the lengths worth trying, longest first
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            if len(token) > 1:
                lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {pair: sorted(found, reverse=True) for pair, found in lengths.items()}

    @classmethod
    def from_text(cls, raw: bytes, *, path: object = BLOB) -> WorldTokenizer:
        """TokenizerError, naming `path` and the line, for anything that is not such a file."""
        tokens: dict[int, bytes] = {}
        # Line by line: a list of millions of empty ones would be a hundred times the file.
        for number, line in enumerate(io.BytesIO(raw), 1):
            token_id, token = _parse(line.removesuffix(b"\n"), path, number)
            if token_id in tokens or len(tokens) == _MAX_TOKENS:
                raise TokenizerError(path, f"{BLOB}: line {number}", "a new id", token_id)
            tokens[token_id] = token
        if not tokens:
            raise TokenizerError(path, BLOB, "a line per token", "nothing")
        return cls(tokens)

    @property
    def vocab_size(self) -> int:
        return max(self._tokens) + 1

    def encode_bytes(self, data: bytes) -> list[int]:
        ids, at, none = [], 0, ()
        while at < len(data):
            for length in self._lengths.get(data[at : at + 2], none):
                token_id = self._ids.get(data[at : at + length])
                if token_id is not None and at + length <= len(data):
                    break
            else:
                length, token_id = 1, self._ids.get(data[at : at + 1])
            if token_id is None:
                raise UsageError(f"the vocabulary has no token for byte {data[at]:#04x}")
            ids.append(token_id)
            at += length
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._tokens.get(int(token_id), b"") for token_id in ids)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`; there is no BOS to add."""
        if not isinstance(text, str):
            raise UsageError(f"text to encode must be a str, not {type(text).__name__}")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise UsageError(f"text to encode is not valid Unicode: {problem.reason}") from None
        return self.encode_bytes(data)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_raw(self, ids: list[int]) -> str:
        return self.decode(ids)

    def stream(self) -> StreamDecoder:
        """A decoder of one growing sequence."""
        return StreamDecoder(self)

    def token(self, token_id: int) -> str | None:
        """A token's text for display; None for an id without."""
        token = self._tokens.get(int(token_id))
        return None if token is None else token.decode("utf-8", "backslashreplace")

    def is_special(self, token_id: int) -> bool:
        return int(token_id) not in self._tokens

    def is_silent(self, token_id: int) -> bool:
        return self.is_special(token_id)

    def is_byte(self, token_id: int) -> bool:
        """False: incomplete characters are held back whatever token they came in."""
        return False


def _parse(line: bytes, path: object, number: int) -> tuple[int, bytes]:
    where = f"{BLOB}: line {number}"
    try:
        text = line.decode("utf-8").rstrip("\r") if len(line) <= _MAX_LINE else ""
        match = _LINE.fullmatch(text)
        literal = ast.literal_eval(match[2]) if match else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        match = literal = None
    if not isinstance(literal, str | bytes):
        raise TokenizerError(path, where, "id, literal and length", repr(line[:40]))
    token = literal if isinstance(literal, bytes) else literal.encode("utf-8", "surrogatepass")
    if len(token) != int(match[3]) or not token:
        raise TokenizerError(path, where, f"{match[3]} bytes", len(token))
    return int(match[1]), token
