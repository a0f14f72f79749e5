"""Text to token ids and back, through the tokenizer a checkpoint brought along.

Generating from ids must work without one: `Tokenizer.from_blobs` returns None where the container
carries none, and whoever then needs text raises `no_tokenizer(path)`.
"""

from .stream import StreamDecoder
from .tokenizer import FILES, Tokenizer, no_tokenizer
from .world import WorldTokenizer

__all__ = ["FILES", "StreamDecoder", "Tokenizer", "WorldTokenizer", "no_tokenizer"]
