"""llama.cpp through llama-cpp-python's low-level API: one prompt, one decode, one JSON line.

    PYTHON_WITH_LLAMA_CPP bench/peers/llama_cpp_child.py MODEL.gguf --prompt 1,5,9 --tokens 16

Needs nothing of this project, so that it runs in an environment of its own.  Greedy over the ids;
no vocabulary is asked for.  Times are of llama_decode and the choice of the next id.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time

import llama_cpp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-mmap", action="store_true")
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--logits", help="write the prompt's last logits here (float32)")
    args = parser.parse_args()
    prompt = [int(word) for word in args.prompt.split(",")]
    llama_cpp.llama_log_set(_SILENT, None)
    llama_cpp.llama_backend_init()
    started = time.perf_counter()
    wanted = llama_cpp.llama_model_default_params()
    if hasattr(llama_cpp, "LLAMA_LOAD_MODE_MMAP"):
        wanted.load_mode = not args.no_mmap and llama_cpp.LLAMA_LOAD_MODE_MMAP
    else:  # older versions
        wanted.use_mmap = not args.no_mmap
    if args.no_repack:
        wanted.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(args.model.encode(), wanted)
    if not model:
        raise SystemExit(f"{args.model}: llama.cpp cannot load it")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = -(-(len(prompt) + args.tokens + 1) // 256) * 256
    settings.n_batch = settings.n_ubatch = max(512, len(prompt))
    settings.n_threads = settings.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"{args.model}: llama.cpp cannot make a context")
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    loaded = time.perf_counter()
    token = step(context, prompt, n_vocab)
    if args.logits:
        logits_of(context, n_vocab).tofile(args.logits)
    prefilled, tokens = time.perf_counter(), [token]
    read = bytes_read()
    while len(tokens) < args.tokens:
        tokens.append(step(context, tokens[-1:], n_vocab))
    ended = time.perf_counter()
    print(json.dumps({
        "load_s": loaded - started,
        "prefill_tokens_per_s": len(prompt) / (prefilled - loaded),
        "tokens_per_s": (len(tokens) - 1) / (ended - prefilled),
        "decode_bytes_per_token": (bytes_read() - read) / max(1, len(tokens) - 1),
        "tokens": tokens,
        "version": llama_cpp.__version__,
    }))  # fmt: skip


def step(context, ids: list[int], n_vocab: int) -> int:
    """One llama_decode; the best next id."""
    array = (llama_cpp.llama_token * len(ids))(*ids)
    failed = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids)))
    if failed:
        raise SystemExit(f"llama_decode: {failed}")
    return int(logits_of(context, n_vocab).argmax())


def logits_of(context, n_vocab: int) -> np.ndarray:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n_vocab,))


def bytes_read() -> int:
    """Bytes that the kernel fetched from the device for this process, read-ahead included."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(level, text, user):  # noqa: N802 (a constant for C)
    pass


if __name__ == "__main__":
    main()
