"""What people would otherwise use, behind one contract (base.py).

A peer that is not there is reported as missing and one that the limit kills as killed; nothing here
is needed by the package, its tests or its wheels.  Interpreters and binaries of peers are given by
path and live outside the repository.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .base import Job, Peer, measure, trouble
from .llamas import LlamaBench, LlamaCpp
from .offloaders import Offloader
from .ours import Ours
from .powerinfer import PowerInfer
from .rwkv_cpp import RWKVCpp

__all__ = ["PEERS", "Job", "Peer", "add_arguments", "make", "measure", "trouble"]

# key on the command line -> peer
PEERS = {
    "ours": lambda args: Ours("flashllm"),
    "ours-approx": lambda args: Ours("flashllm, approx 0.99", mode="approx", recall=0.99),
    "naive": lambda args: Ours("flashllm, naive mode", pin=False),
    "llama.cpp": lambda args: LlamaCpp(args.llama_cpp_python),
    "llama.cpp-128k": lambda args: LlamaCpp(args.llama_cpp_python, read_ahead_kib=128),
    "llama.cpp-mapped": lambda args: LlamaCpp(args.llama_cpp_python, repack=False),
    "llama.cpp-mapped-128k": lambda args: LlamaCpp(
        args.llama_cpp_python, read_ahead_kib=128, repack=False
    ),
    "llama.cpp-no-mmap": lambda args: LlamaCpp(args.llama_cpp_python, mmap=False),
    "llama-bench": lambda args: LlamaBench(
        "llama.cpp's llama-bench", args.llama_bench, args.llama_cpp_python
    ),
    "ik_llama.cpp": lambda args: LlamaBench(
        "ik_llama.cpp", args.ik_llama_bench, args.llama_cpp_python
    ),
    "powerinfer": lambda args: PowerInfer(args.powerinfer, args.powerinfer_model),
    "rwkv.cpp": lambda args: RWKVCpp(args.rwkv_cpp, args.rwkv_file),
    "accelerate": lambda args: Offloader("accelerate disk offload", args.torch_python),
    "airllm": lambda args: Offloader("AirLLM", args.torch_python),
}


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("where peers are; what is not given is missing")
    group.add_argument("--llama-cpp-python", help="a Python with llama-cpp-python and gguf")
    group.add_argument("--torch-python", help="a Python with torch, transformers, accelerate")
    group.add_argument("--llama-bench", help="llama.cpp's llama-bench binary")
    group.add_argument("--ik-llama-bench", help="ik_llama.cpp's llama-bench binary")
    group.add_argument("--powerinfer", help="PowerInfer's main binary")
    group.add_argument("--powerinfer-model", help="the same shape in PowerInfer's format")
    group.add_argument("--rwkv-cpp", help="rwkv.cpp's shared library")
    group.add_argument("--rwkv-file", help="the FP16 file that an RWKV model was converted from")


def make(key: str, args: Namespace) -> Peer:
    if key not in PEERS:
        raise SystemExit(f"no peer {key!r}; known: {', '.join(PEERS)}")
    return PEERS[key](args)
