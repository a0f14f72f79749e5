"""rwkv.cpp through its C library: one prompt, one decode, one JSON line; or a file quantised.

    python bench/peers/rwkv_cpp_child.py LIBRWKV.so run MODEL.bin --prompt 1,5,9 --tokens 16
    python bench/peers/rwkv_cpp_child.py LIBRWKV.so quantise IN.bin OUT.bin Q8_0

Needs NumPy and nothing of this project.  Greedy over the ids; times are of the library's calls and
of the choice of the next id.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time

import numpy as np

CHUNK = 64  # of the prompt; that project's own advice
FLOATS = ctypes.POINTER(ctypes.c_float)


def library(path: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(path)
    lib.rwkv_init_from_file.restype = ctypes.c_void_p
    lib.rwkv_init_from_file.argtypes = [ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32]
    lib.rwkv_eval.restype = lib.rwkv_eval_sequence_in_chunks.restype = ctypes.c_bool
    lib.rwkv_eval.argtypes = [ctypes.c_void_p, ctypes.c_uint32, FLOATS, FLOATS, FLOATS]
    lib.rwkv_eval_sequence_in_chunks.argtypes = [
        ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_size_t, ctypes.c_size_t,
        FLOATS, FLOATS, FLOATS,
    ]  # fmt: skip
    for name in ("rwkv_get_state_len", "rwkv_get_logits_len"):
        getattr(lib, name).restype = ctypes.c_size_t
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    lib.rwkv_quantize_model_file.restype = ctypes.c_bool
    lib.rwkv_quantize_model_file.argtypes = [ctypes.c_char_p] * 3
    return lib


def at(array: np.ndarray):
    return array.ctypes.data_as(FLOATS)


def run(lib: ctypes.CDLL, args: argparse.Namespace) -> dict:
    prompt = [int(word) for word in args.prompt.split(",")]
    started = time.perf_counter()
    context = lib.rwkv_init_from_file(args.model.encode(), args.threads, 0)
    if not context:
        raise SystemExit("rwkv.cpp cannot load the model")
    state = np.zeros(lib.rwkv_get_state_len(context), np.float32)
    logits = np.zeros(lib.rwkv_get_logits_len(context), np.float32)
    ids = (ctypes.c_uint32 * len(prompt))(*prompt)
    loaded = time.perf_counter()
    good = lib.rwkv_eval_sequence_in_chunks(
        context, ids, len(prompt), CHUNK, None, at(state), at(logits)
    )
    tokens = [int(logits.argmax())]
    prefilled, read = time.perf_counter(), bytes_read()
    while good and len(tokens) < args.tokens:
        good = lib.rwkv_eval(context, tokens[-1], at(state), at(state), at(logits))
        tokens.append(int(logits.argmax()))
    if not good:
        raise SystemExit("rwkv.cpp cannot evaluate")
    seconds = time.perf_counter() - prefilled
    return {
        "load_s": loaded - started,
        "prefill_tokens_per_s": len(prompt) / (prefilled - loaded),
        "tokens_per_s": (len(tokens) - 1) / seconds,
        "decode_bytes_per_token": (bytes_read() - read) / max(1, len(tokens) - 1),
        "tokens": tokens,
    }


def bytes_read() -> int:
    """Bytes that the kernel fetched from the device for this process."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    verbs = parser.add_subparsers(dest="verb", required=True)
    sub = verbs.add_parser("run")
    sub.add_argument("model")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--tokens", type=int, required=True)
    sub.add_argument("--threads", type=int, default=2)
    sub = verbs.add_parser("quantise")
    sub.add_argument("source")
    sub.add_argument("out")
    sub.add_argument("type")
    args = parser.parse_args()
    lib = library(args.library)
    if args.verb == "run":
        print(json.dumps(run(lib, args)))
    elif not lib.rwkv_quantize_model_file(
        args.source.encode(), args.out.encode(), args.type.encode()
    ):
        raise SystemExit("rwkv.cpp cannot quantise the file")


if __name__ == "__main__":
    main()
