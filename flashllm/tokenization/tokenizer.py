"""A tokenizer.json behind four verbs: encode, decode, stream, and what is special.

The `tokenizers` library does the work and is imported when the first tokenizer is made.  The file
is carried verbatim; truncation and padding stored in it are switched off, because a prompt must
never be cut in silence, and so is dropout of merges, because one text has one row of ids.  BOS is
added once: by the file's own post-processor or by us where tokenizer_config.json asks for it, and
not at all where the text already starts with it (a chat template wrote it) or where the config says
so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from ..errors import TokenizerError, UsageError
from .stream import StreamDecoder
from .world import BLOB, WorldTokenizer

# What a tokenizer is made of; a container may carry other files beside them.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", BLOB)
# Of the small ones; the largest published, which lists thousands of added tokens, is 1.2 MB.
MAX_CONFIG_BYTES, MAX_BRACKETS = 2**21, 2**15
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def no_tokenizer(path: object) -> TokenizerError:
    """The error for a need of text where there is no tokenizer."""
    return TokenizerError(path, "tokenizer.json", "a carried tokenizer", "none; pass token ids")


class Tokenizer:
    """Made by `from_blobs`.  `bos_id` may be None; ids without text decode to nothing."""

    def __init__(
        self, library_tokenizer, *, bos_id: int | None, add_bos: bool | None,
        path: object = "tokenizer",
    ):  # fmt: skip
        self._library, self._path = library_tokenizer, path
        self.bos_id = bos_id
        self._add_bos = add_bos
        self._special = {
            token_id
            for token_id, token in library_tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        decoder = json.loads(library_tokenizer.to_str(False)).get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        self._byte_fallback = any(part.get("type") == "ByteFallback" for part in parts)

    @classmethod
    def from_blobs(
        cls, blobs: Mapping[str, bytes], *, path: object = "tokenizer", bos_id: int | None = None
    ) -> Tokenizer | WorldTokenizer | None:
        """The tokenizer in `blobs` (file name -> content), or None if there is none.

        `bos_id` is the model config's, used where the tokenizer's own files name no BOS.
        TokenizerError for a file that cannot be read, naming `path`.
        """
        if "tokenizer.json" not in blobs:
            if BLOB in blobs:
                return WorldTokenizer.from_text(bytes(blobs[BLOB]), path=path)
            return None
        from tokenizers import Tokenizer as LibraryTokenizer

        try:
            library = LibraryTokenizer.from_buffer(bytes(blobs["tokenizer.json"]))
        except BaseException as problem:
            raise _of_library(problem, path, "a tokenizer") from None
        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None):
            library.model.dropout = None
        config = _json_object(blobs, "tokenizer_config.json", path)
        named = config.get("bos_token") or _json_object(blobs, "special_tokens_map.json", path).get(
            "bos_token"
        )
        if isinstance(named, dict):
            named = named.get("content")
        if isinstance(named, str) and library.token_to_id(named) is not None:
            bos_id = library.token_to_id(named)
        add_bos = config.get("add_bos_token")
        add_bos = add_bos if isinstance(add_bos, bool) else None
        return cls(library, bos_id=bos_id, add_bos=add_bos, path=path)

    @property
    def vocab_size(self) -> int:
        return self._library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`.  `add_bos`: None does as the tokenizer's files say.

        TokenizerError where its files do not say what becomes of some letter of the text.
        """
        if not isinstance(text, str):
            raise UsageError(f"text to encode must be a str, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as problem:
            raise UsageError(f"text to encode is not valid Unicode: {problem.reason}") from None
        wanted = self._add_bos if add_bos is None else add_bos
        try:
            plain = self._library.encode(text, add_special_tokens=False).ids
            if self.bos_id is not None and plain[:1] == [self.bos_id]:
                return plain  # the text brought it along
            ids = self._library.encode(text, add_special_tokens=True).ids
        except BaseException as problem:
            raise _of_library(problem, self._path, "ids for the text") from None
        has_bos = self.bos_id is not None and ids[:1] == [self.bos_id]
        if wanted is None or self.bos_id is None or wanted == has_bos:
            return ids
        return [self.bos_id, *ids] if wanted else ids[1:]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; incomplete UTF-8 becomes U+FFFD."""
        ids = [int(token_id) for token_id in ids]
        if skip_special:
            ids = [token_id for token_id in ids if token_id not in self._special]
        return self.decode_raw(ids)

    def decode_raw(self, ids: list[int]) -> str:
        """The library's text of exactly these ids."""
        try:
            return self._library.decode(ids, skip_special_tokens=False)
        except (OverflowError, TypeError) as problem:
            raise UsageError(
                f"token ids to decode must be from 0 to 2**32 - 1: {problem}"
            ) from None
        except BaseException as problem:
            raise _of_library(problem, self._path, "text for the ids") from None

    def stream(self) -> StreamDecoder:
        """A decoder of one growing sequence."""
        return StreamDecoder(self)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of an id, for display."""
        return self._library.id_to_token(int(token_id))

    def is_special(self, token_id: int) -> bool:
        """True for control tokens, which are skipped in text."""
        return int(token_id) in self._special

    def is_silent(self, token_id: int) -> bool:
        """True for ids without text: control tokens, and ids the vocabulary does not have."""
        return self.is_special(token_id) or self.token(token_id) is None

    def is_byte(self, token_id: int) -> bool:
        """True for a token that stands for one raw byte."""
        if not self._byte_fallback:
            return False
        token = self._library.id_to_token(int(token_id))
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None


def _of_library(problem: BaseException, path: object, expected: str) -> BaseException:
    """What to raise for `problem`: the library raises bare Exceptions, and panics as a
    BaseException."""
    if isinstance(problem, KeyboardInterrupt | SystemExit | MemoryError):
        return problem
    return TokenizerError(path, "tokenizer.json", expected, str(problem)[:120])


def _json_object(blobs: Mapping[str, bytes], name: str, path: object) -> dict:
    raw = blobs.get(name, b"{}")
    n_brackets = raw.count(b"[") + raw.count(b"{")
    if len(raw) > MAX_CONFIG_BYTES or n_brackets > MAX_BRACKETS:
        most = f"at most {MAX_CONFIG_BYTES} bytes and {MAX_BRACKETS} brackets"
        raise TokenizerError(path, name, most, f"{len(raw)} and {n_brackets}")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        raise TokenizerError(path, name, "JSON", str(problem)[:80]) from None
    if not isinstance(content, dict):
        raise TokenizerError(path, name, "a JSON object", type(content).__name__)
    return content
