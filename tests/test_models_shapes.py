"""A container whose config and weights are not each other's, sealed with right checksums: refused
with the plane or vector named before anything is planned, whatever the family."""

from __future__ import annotations

import copy
import json
import random

import pytest

from flashllm import LLM, convert
from flashllm.container.canonical import canonical_json
from flashllm.conversion.opening import open_source
from flashllm.errors import FlashError, FormatError

from . import cheap, tiny
from .container_makers import Forger
from .rwkv_models import exported, official, written

VARIANTS = ("llama-relu", "llama-biases", "mixtral", "olmoe-relu", "qwen2-moe", "deepseek",
            "gemma2", "gpt2", "neox", "opt", "falcon", "nemotron", "phi3-longrope",
            "rwkv")  # fmt: skip
ENGINE = {"ram_budget": "1GiB", "num_threads": 1, "io_depth": 2}


@pytest.fixture(scope="module")
def forgers(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("shapes"), {}

    def of(variant: str) -> Forger:
        if variant not in made:
            path = folder / f"{variant}.flash"
            if variant == "rwkv":
                written(folder / "m.bin", exported(official("6"), "6"), half=True)
                convert(str(folder / "m.bin"), str(path))
            else:
                path = tiny.container(folder, variant, tokenizer=False)
            made[variant] = Forger(path)
        return made[variant]

    return of


def sealed(forger: Forger, manifest: dict, path):
    before, forger.manifest = forger.manifest, canonical_json(manifest)
    try:
        return forger.seal(path)
    finally:
        forger.manifest = before


def opened(path) -> list[int]:
    with LLM(str(path), **ENGINE) as llm:
        return llm.generate([1, 2, 3], max_tokens=3, temperature=1.0, ignore_eos=True).tokens


def config(**changed):
    return lambda manifest: manifest["config"].update(changed)


def renamed(kind: str, number: int, name: str):
    def change(manifest):
        entries = manifest["vectors"]["tensors"] if kind == "vectors" else manifest[kind]
        entries[number]["name"] = name

    return change


def piece(plane: int, number: int, **changed):
    return lambda manifest: manifest["planes"][plane]["pieces"][number].update(changed)


LIES = [
    ("llama-relu", config(vocab_size=128), "plane embed: items"),
    ("llama-relu", config(vocab_size=32, eos_ids=[], bos_id=None), "plane embed: items"),
    ("llama-relu", config(intermediate_size=39), "plane layers.0.deciding: items"),
    ("llama-relu", config(n_layers=1, windows=[0]), "plane layers.1"),
    ("llama-relu", config(n_layers=4096, windows=[0] * 4096), "planes: .* of 4096 layers"),
    ("llama-relu", config(gated=False), "plane layers.0.ffn: pieces"),
    ("llama-relu", config(tied=True), "plane head"),
    ("llama-relu", config(qkv_bias=True), "vector layers.0.qkv.bias"),
    ("llama-relu", renamed("planes", 0, "embedding"), "plane embed"),
    ("llama-relu", renamed("vectors", 0, "some.weight"), "vector layers.0"),
    ("llama-relu", piece(-2, 0, name="gate"), "pieces"),
    ("llama-biases", config(qkv_bias=False), "vector layers.0.qkv.bias"),
    ("mixtral", config(n_experts=9), "plane layers.0.router: items"),
    ("mixtral", config(expert_size=20), "plane layers.0.experts: items"),
    ("mixtral", config(expert_layers=[0]), "plane layers.1"),
    ("qwen2-moe", config(shared_size=0), "plane layers.0.(shared|router)"),
    ("deepseek", config(n_heads=2**14, n_layers=4096, windows=[0] * 4096), "heads in all"),
    ("deepseek", config(value_size=77), "plane layers.0"),
    ("opt", config(intermediate_size=126), "plane layers.0"),
    ("gpt2", config(n_context=1000), "plane position: items"),
    ("neox", config(intermediate_size=1), "plane layers.0"),
    ("rwkv", config(intermediate_size=7), "plane layers.0"),
]  # fmt: skip


@pytest.mark.parametrize("variant, lie, match", LIES)
def test_a_lie_is_named(forgers, tmp_path, variant, lie, match):
    forger = forgers(variant)
    manifest = json.loads(forger.manifest)
    lie(manifest)
    path = sealed(forger, manifest, tmp_path / "x.flash")
    cheap.refused(FormatError, lambda: LLM(str(path), **ENGINE), match)
    with pytest.raises(FormatError, match=match):
        open_source(path)


VALUES = [0, 1, -1, 2, 3, 7, 63, 65, 4096, 2**20, 2**24, 2**31, 2**63 - 1, 0.0, 0.5, 1e-300, 1e300,
          None, True, "", "relu", "silu", "yarn", [], {}, [1], [0, 0]]  # fmt: skip


def leaves(value, at=()):
    if isinstance(value, dict | list):
        if isinstance(value, list) and at:
            yield at
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*at, key))
    else:
        yield at


def changed(manifest: dict, rng: random.Random) -> dict:
    manifest = copy.deepcopy(manifest)
    root = rng.choice(["config"] * 3 + ["planes", "vectors"])
    for _ in range(rng.choice([1, 1, 2])):
        *path, last = rng.choice(list(leaves(manifest[root])))
        home = manifest[root]
        for key in path:
            home = home[key]
        if isinstance(home[last], int) and rng.random() < 0.4:
            home[last] += rng.choice([1, -1, 8, home[last]])
        else:
            home[last] = copy.deepcopy(rng.choice(VALUES))
        if not list(leaves(manifest[root])):
            break
    return manifest


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_change_is_refused_or_computes(forgers, tmp_path, rounds, variant):
    forger, rng = forgers(variant), random.Random(variant)
    for _ in range(rounds(12, 400)):
        path = sealed(forger, changed(json.loads(forger.manifest), rng), tmp_path / "x.flash")
        try:
            assert len(opened(path)) == 3
        except FlashError as error:
            assert len(str(error)) < 4000
