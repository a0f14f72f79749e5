"""RWKV under official and Hugging Face names: the same model as its rwkv.cpp file."""

from __future__ import annotations

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashllm import LLM, convert
from flashllm.checkpoints import open_checkpoint
from flashllm.checkpoints.rwkv_safetensors import is_rwkv, official_name
from flashllm.conversion.resolve import resolve
from flashllm.errors import CheckpointError

from .rwkv_models import VERSIONS, exported, official, oracle, written

IDS = [3, 200, 17, 42, 9, 9, 128]


def hugging_face(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official v7 tensors as that layout has them: linear layers [out, in], plain vectors."""
    projections = {"receptance": "r", "key": "k", "value": "v", "output": "o"}
    out = {}
    for name, a in t.items():
        name = re.sub(r"^blocks\.", "model.layers.", name)
        name = name.replace("emb.weight", "model.embeddings.weight").replace("ln_out", "model.norm")
        name = name.replace("head.weight", "lm_head.weight").replace(".att.", ".attn.")
        for theirs, norm in {"ln0": "pre", "ln1": "attn", "ln2": "ffn", "ln_x": "g"}.items():
            name = name.replace(theirs, f"{norm}_norm")
        for theirs, short in projections.items():
            name = name.replace(f".attn.{theirs}.", f".attn.{short}_proj.")
        low = re.fullmatch(r"(.*\.attn\.)([wavg])([012])", name)
        if low:
            part = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[low[3]]
            name = f"{low[1]}{low[2]}_lora.lora.{part}"
            a = a.ravel() if low[3] == "0" else a.T
        out[name] = np.ascontiguousarray(a)
    return out


@pytest.mark.parametrize("version", [*VERSIONS, "7 hf"])
def test_the_same_model_as_its_rwkv_cpp_file(tmp_path, version):
    number = version.split()[0]
    tensors = official(number)
    expected = written(tmp_path / "m.bin", exported(tensors, number))
    save_file(hugging_face(tensors) if "hf" in version else tensors, tmp_path / "m.safetensors")
    with open_checkpoint(expected) as a, open_checkpoint(tmp_path / "m.safetensors") as b:
        assert resolve(a).config == resolve(b).config and resolve(b).warnings == []
        assert set(a.names()) == set(b.names())
        for name in a.names():
            n = a.shape(name)[0]
            assert b.shape(name) == a.shape(name)
            np.testing.assert_allclose(b.rows(name, 0, n), a.rows(name, 0, n), rtol=1e-6)
            part = b.rows(name, n // 3, n - 1)
            np.testing.assert_array_equal(part, b.rows(name, 0, n)[n // 3 : -1])
    convert(tmp_path / "m.safetensors", tmp_path / "m.flash")
    with LLM(str(tmp_path / "m.flash"), ram_budget="2GiB") as llm:
        found = llm.logits(IDS)
        assert llm.encode("in") == [105, 110]
    assert np.abs(found - oracle(tensors, number, IDS)).max() <= 1e-4


def test_names():
    assert official_name("model.layers.11.attn.w_lora.lora.2.weight") == "blocks.11.att.w2"
    assert official_name("model.layers.1.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert not is_rwkv(["model.embed_tokens.weight", "lm_head.weight"])


@pytest.mark.parametrize("version", ["6", "7"])
def test_what_is_missing_or_misshapen_is_named(tmp_path, version):
    tensors = official(version)
    for name in [n for n in tensors if "blocks.1." in n or n.startswith(("head", "ln_out"))]:
        for wrong in (None, tensors[name][:-1], tensors[name].reshape(-1)[:3]):
            given = {k: v for k, v in tensors.items() if k != name}
            if wrong is not None:
                given[name] = np.ascontiguousarray(wrong)
            if wrong is not None and not wrong.size:
                continue
            save_file(given, tmp_path / "m.safetensors")
            with (
                pytest.raises(CheckpointError),
                open_checkpoint(tmp_path / "m.safetensors") as checkpoint,
            ):
                resolve(checkpoint)
