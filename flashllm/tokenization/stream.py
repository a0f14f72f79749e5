"""Text of a growing sequence of ids, piece by piece, the pieces joining to the text of the whole.

Two things make a token's text depend on its neighbours.  A character's bytes may be spread over
tokens: text is held back while it ends in a replacement character, which the next token may
complete.  Byte-fallback vocabularies decode a whole run of byte tokens at once, valid or not: the
run is held back until it ends.  And the first token of a text may lose its leading space: so a
token is always decoded behind one that came before it, and only what it added is handed out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """`push(id)` and finally `flush()` return deltas; joined they are `tokenizer.decode(ids)`.

    Work per token is bounded: only the last stretch and what is held back are decoded again.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # handed out already; decoded again for what it does to
        self._held: list[int] = []  # the ids after it, whose text is not out yet

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; often one token's, sometimes none."""
        if self._tokenizer.is_silent(token_id):
            return ""
        self._held.append(int(token_id))
        if self._tokenizer.is_byte(token_id):
            return ""
        return self._release(final=False)

    def flush(self) -> str:
        """The text still held back, incomplete characters as U+FFFD; the stream may go on."""
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        if not self._held:
            return ""
        before = self._tokenizer.decode_raw(self._context)
        text = self._tokenizer.decode_raw(self._context + self._held)
        if not final and text.endswith(REPLACEMENT):
            return ""
        # The next context must show some text: one of nothing but a stripped space would let the
        # next token be stripped too.
        if self._tokenizer.decode_raw(self._held):
            self._context = self._held
        else:
            self._context = self._context + self._held
        self._held = []
        return text[len(before) :]
