"""Recording a trace: a text through an open model, chunk by chunk, exact as always.

What a prompt's tokens activate in a chunk is what they would activate one by one (the arithmetic is
the same), so recording runs at the speed of prefill.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..api import LLM
from ..errors import UnsupportedError, UsageError
from ..evaluation import SEPARATOR
from ..tracing import LayerInfo, TraceWriter

Observer = Callable[[int, np.ndarray, np.ndarray], None]


def sparse_layers(llm: LLM) -> tuple[list[int], list[LayerInfo]]:
    """Layers whose active set is known before their bundles are read; UnsupportedError if none."""
    planes, found = llm.container.planes, []
    if llm.config.sparse:
        found = [i for i in range(llm.config.n_layers) if f"layers.{i}.ffn" in planes]
    if not found:
        raise UnsupportedError(
            f"{llm.container.path}: no layer is naturally sparse (activation "
            f"{llm.config.activation}): every neuron is active for every token"
        )
    ffn = [planes[f"layers.{layer}.ffn"] for layer in found]
    return found, [LayerInfo(plane.name, plane.n_items, plane.stride) for plane in ffn]


def traced_layers(llm: LLM) -> tuple[list[int], list[LayerInfo]]:
    """Sparse layers, or where experts are routed those; UnsupportedError if there are neither."""
    planes = llm.container.planes
    routed = [i for i in range(llm.config.n_layers) if f"layers.{i}.experts" in planes]
    if not routed:
        return sparse_layers(llm)
    n_experts, infos = llm.config.n_experts, []
    for i in routed:
        plane, apart = planes[f"layers.{i}.experts"], planes.get(f"layers.{i}.neurons")
        stride = plane.stride + (0 if apart is None else apart.stride)
        infos.append(LayerInfo(plane.name, n_experts, plane.n_items // n_experts * stride))
    return routed, infos


def record(
    llm: LLM,
    text: str,
    out: str | os.PathLike,
    *,
    n_tokens: int,
    text_name: str,
    window: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Record the first `n_tokens` tokens of `text` into `out`; returns how many there were.

    The text is cut at `<|endoftext|>` into documents and those into windows of `window` tokens
    (default: the context), each a fresh context that begins with the model's BOS where it has one.
    """
    numbers, layers = traced_layers(llm)
    place = {layer: i for i, layer in enumerate(numbers)}
    writer = TraceWriter(
        out,
        model=llm.container.digest,
        family=llm.container.family,
        text=hashlib.sha256(text.encode()).hexdigest(),
        text_name=text_name,
        layers=layers,
    )
    with writer, llm.lend(writer.n_bytes):
        n_done = observe_text(
            llm, text, lambda layer, _, decided: writer.add(place[layer], decided),
            n_tokens=n_tokens, window=window, label="trace", progress=progress,
            begin_context=writer.begin_context,
        )  # fmt: skip
        writer.commit()
    return n_done


def observe_text(
    llm: LLM,
    text: str,
    observer: Observer,
    *,
    n_tokens: int,
    window: int | None,
    label: str,
    progress: Callable[[int, int, str], None] | None = None,
    begin_context: Callable[[], None] = lambda: None,
) -> int:
    """Show `observer` the first `n_tokens` tokens of `text` (LLM.observe), window by window, each a
    fresh context that `begin_context` is told of; returns how many there were."""
    if n_tokens < 1:
        raise UsageError(f"--tokens must be at least 1, not {n_tokens}")
    n_done = 0
    for ids in first_tokens(windows(llm, text, window=window), n_tokens):
        begin_context()
        llm.observe(ids, observer)
        n_done += len(ids)
        if progress is not None:
            progress(n_done, n_tokens, label)
    if n_done == 0:
        raise UsageError("the text has no tokens")
    return n_done


def windows(llm: LLM, text: str, *, window: int | None):
    """int32 ids of one context after another, BOS included."""
    first = llm.encode("", add_bos=True) if llm.tokenizer is not None else []
    size = min(llm.n_context if window is None else window, llm.n_context) - len(first)
    if size < 1:
        raise UsageError(f"a window of {size + len(first)} tokens has no room for the text")
    for document in text.split(SEPARATOR):
        if not document.strip():
            continue
        ids = llm.encode(document.strip(), add_bos=False)
        for at in range(0, len(ids), size):
            yield np.array(first + ids[at : at + size], np.int32)


def first_tokens(contexts: Iterable[np.ndarray], most: int) -> Iterator[np.ndarray]:
    """The contexts up to `most` tokens in all, the last one cut."""
    n = 0
    for ids in contexts:
        ids = ids[: most - n]
        n += len(ids)
        yield ids
        if n == most:
            return
