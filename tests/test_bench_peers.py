"""bench/peers: the GGUF file holds our weights, and a run is judged by what happened to it."""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest

from flashllm import convert
from flashllm.checkpoints import open_checkpoint
from flashllm.container import open_container
from flashllm.conversion.from_container import ContainerCheckpoint
from flashllm.conversion.inflate import InflatedCheckpoint, Inflation
from flashllm.errors import UnsupportedError
from flashllm.models.configs import config_from_dict
from flashllm.quant import WEIGHT_TYPES
from flashllm.units import MIB

from .capped import needs_cgroup
from .tiny import container

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import against_peers  # noqa: E402
import peers  # noqa: E402
from peers.base import Job, Peer, Timings, measure  # noqa: E402
from peers.card import write_card  # noqa: E402
from peers.gguf_file import Weights, architecture, tensors  # noqa: E402
from peers.powerinfer import PowerInfer  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
WHOLE = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
OF_LAYER = {
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ggml_values(raw, tensor):
    """float32 of a ggml tensor, block by block as ggml's own description has it."""
    raw = raw.reshape(-1)
    if tensor.weight_type == "f32":
        return raw.view(np.float32).reshape(tensor.shape)
    found = []
    for block in raw.reshape(-1, {"int8": 34, "int4": 18}[tensor.weight_type]):
        scale = float(block[:2].copy().view(np.float16)[0])
        if tensor.weight_type == "int8":
            found.append(scale * block[2:].view(np.int8).astype(np.float32))
        else:
            nibbles = np.concatenate([block[2:] & 15, block[2:] >> 4]).astype(np.float32)
            found.append(scale * (nibbles - 8))
    return np.concatenate(found).reshape(tensor.shape)


def interleaved(rows, n_heads):
    """Row i and row i + half of every head become neighbours."""
    heads = np.split(rows, n_heads)
    half = len(heads[0]) // 2
    order = [j // 2 + (j % 2) * half for j in range(2 * half)]
    return np.concatenate([head[order] for head in heads])


def expected(name, source, config):
    """The checkpoint's tensor under llama.cpp's name."""

    def rows(tensor):
        return source.rows(tensor, 0, source.shape(tensor)[0])

    prefix, _, rest = name.partition(".")
    if prefix != "blk":
        return rows(WHOLE[prefix])
    layer, part, _ = rest.split(".")
    stem = f"model.layers.{layer}."
    if part in ("attn_q", "attn_k"):
        heads = config.n_heads if part == "attn_q" else config.n_kv_heads
        return interleaved(rows(f"{stem}self_attn.{part[-1]}_proj.weight"), heads)
    return rows(f"{stem}{OF_LAYER[part]}.weight")


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-relu", "llama-tied", "llama-ungated-relu2"])
def test_gguf_tensors_are_the_containers_weights(tmp_path, variant, quant):
    model = tmp_path / "model.flash"
    with open_checkpoint(GOLDEN / variant) as small:  # ggml wants multiples of 32
        inflation = Inflation(channels=4, neurons=16, kv_groups=8)
        convert(InflatedCheckpoint(small, inflation), model, quant=quant)
    with open_container(model) as opened, ContainerCheckpoint(model) as source:
        config = config_from_dict(opened.family, opened.config, path=model)
        found = list(tensors(config, Weights(opened)))
        assert len({tensor.name for tensor in found}) == len(found)
        for tensor in found:
            raw = tensor.make()
            assert raw.nbytes == tensor.n_bytes, tensor.name
            values, wanted = ggml_values(raw, tensor), expected(tensor.name, source, config)
            # down is quantised a second time, along its other side
            again = "ffn_down" in tensor.name
            bound = WEIGHT_TYPES[quant].error_bound(wanted) if again else 0.0
            assert (np.abs(values - wanted) <= bound).all(), tensor.name


@pytest.mark.parametrize(
    ("variant", "arch", "differs"),
    [("llama-relu", "llama", True), ("llama-ungated-relu2", "arcee", False), ("opt", "gpt2", True),
     ("qwen3", "qwen3", False), ("olmoe", "olmoe", False)],
)  # fmt: skip
def test_what_differs_is_said(tmp_path, variant, arch, differs):
    model = container(tmp_path, variant, tokenizer=False)
    with open_container(model) as opened:
        config = config_from_dict(opened.family, opened.config, path=model)
        found, note = architecture(config)
        assert (found, bool(note)) == (arch, differs)
        for tensor in tensors(config, Weights(opened)):
            assert tensor.make().nbytes == tensor.n_bytes, tensor.name


REFUSED = [("opt-350m-like", "keep", "OPT"), ("llama-relu", "int8", "multiple of 32"),
           ("mixtral", "keep", "mixtral"), ("llama-rope3", "keep", "no architecture")]  # fmt: skip


@pytest.mark.parametrize(("variant", "quant", "why"), REFUSED)
def test_what_cannot_be_expressed_is_refused(tmp_path, variant, quant, why):
    model = container(tmp_path, variant, tokenizer=False, quant=quant)
    with open_container(model) as opened, pytest.raises(UnsupportedError, match=why):
        config = config_from_dict(opened.family, opened.config, path=model)
        list(tensors(config, Weights(opened)))


class Scripted(Peer):
    name = "scripted"

    def __init__(self, code):
        self.code = code

    def available(self):
        return None

    def prepare(self, model, folder):
        return model

    def command(self, file, job):
        return [sys.executable, "-c", self.code]

    def timings(self, out, err, job):
        return Timings(**json.loads(out))


ENDS = {
    "ran": 'print(\'{"prefill_tokens_per_s": 1.0, "tokens_per_s": 2.0, "n_decoded": 3}\')',
    "killed": "x = bytearray(b'1') * 2**28",
    "failed": "raise SystemExit('no luck')",
    "too slow": "import threading; threading.Event().wait()",
}


@needs_cgroup
@pytest.mark.parametrize("state", ENDS)
def test_a_run_is_judged_by_what_happened_to_it(tmp_path, state):
    file = tmp_path / "model"
    file.write_bytes(bytes(4096))
    job = Job([1], 2, 1, 64 * MIB, True, timeout_s=1.0 if state == "too slow" else 60)
    found = measure(Scripted(ENDS[state]), file, job)
    assert found["state"] == state
    if state == "ran":
        assert found["tokens_per_s"] == 2.0
    else:
        assert {"failed": "no luck", "killed": "limit", "too slow": "1 s"}[state] in found["why"]


def test_peers_that_were_not_given_are_missing():
    parser = ArgumentParser()
    peers.add_arguments(parser)
    nothing = parser.parse_args([])
    for key in peers.PEERS:
        why = peers.make(key, nothing).available()
        assert (why is None) == (key in ("ours", "ours-approx", "naive")), key


def test_powerinfer_prints_its_speeds():
    err = ("print_timings: prompt eval time = 500.00 ms / 10 tokens ( 50.00 ms per token, 20.00 "
           "tokens per second)\nprint_timings:        eval time = 1500.00 ms / 7 runs ( 214.00 ms "
           "per token, 4.67 tokens per second)")  # fmt: skip
    job = Job([1], 8, 2, 1, True)
    assert PowerInfer(None, None).timings("", err, job) == Timings(20.0, 4.67, 7)


def test_a_card_pairs_inside_rounds_and_keeps_losses(tmp_path):
    def row(key, speed, **more):
        ran = {"state": "ran", "tokens_per_s": speed, "prefill_tokens_per_s": 2 * speed,
               "n_decoded": 7, "decode_bytes_per_token": MIB,
               "charges": {"peak_bytes": MIB}}  # fmt: skip
        return {"cap": "50%", "key": key, "peer": key, "difference": "", **ran, **more}

    rounds = [
        [row("ours", 2.0), row("slow", 1.0), row("fast", 4.0), row("gone", 0.0, missing="no file")],
        [row("ours", 9.0), row("slow", 3.0), row("fast", 9.0, state="killed", why="by the limit"),
         row("gone", 0.0, missing="no file")],
        [row("ours", 4.0), row("slow", 1.0), row("fast", 8.0), row("gone", 0.0, missing="no file")],
    ]  # fmt: skip
    machine = {"cpu": "c", "kernel": "k", "sequential_bytes_per_s": 1e9}
    model = {"model": "m", "bytes": MIB, "note": "", "threads": 2, "n_prompt": 1, "flashllm": "1",
             "machine": machine, "read_ahead_kib": 128, "rounds": rounds}  # fmt: skip
    lines = write_card(tmp_path / "card", [model]).splitlines()
    cells = {line.split(" | ")[1]: line.split(" | ") for line in lines if line.startswith("| 50%")}
    assert cells["slow"][7] == "3.00"  # of 2, 3 and 4
    assert cells["slow"][4] == "2.0 (3.00)" and cells["ours"][4] == "8.0"
    assert cells["fast"][7] == "0.50" and "killed by the limit" in cells["fast"][10]
    assert "missing: no file" in cells["gone"][10]
    assert json.loads((tmp_path / "card.json").read_text())["models"] == [model]


def test_a_round_in_parts_is_one_round_and_keeps_what_ran(tmp_path, monkeypatch):
    model, exact = container(tmp_path, "llama-relu"), tmp_path / "apart.flash"
    ran = []

    def measured(peer, file, job):
        if job.capped and len(ran) == 4:
            raise KeyboardInterrupt
        ran.append((file.name, job.capped))
        return {"state": "ran", "tokens_per_s": 1.0, "prefill_tokens_per_s": 1.0}

    monkeypatch.setattr(peers, "make", lambda name, args: Scripted(""))
    monkeypatch.setattr(peers, "measure", measured)
    monkeypatch.setattr(against_peers, "machine", lambda path: {})
    monkeypatch.setattr(against_peers, "read_ahead_file", lambda path: tmp_path / "read_ahead")
    (tmp_path / "read_ahead").write_text("128")

    def one_round(cells, *more):
        argv = ["against_peers.py", "round", model, "--work", tmp_path, "--exact", exact,
                "--prompt", 4, "--cells", cells, *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        against_peers.main()

    one_round("all:ours,ours-approx", "--go-on")
    one_round("50%:ours", "--go-on")
    with pytest.raises(KeyboardInterrupt):
        one_round("50%:naive,ours")
    rounds = json.loads((tmp_path / f"{model.stem}.runs.json").read_text())["rounds"]
    cells = [[(row["cap"], row["key"]) for row in rows] for rows in rounds]
    assert cells == [[("all", "ours"), ("all", "ours-approx"), ("50%", "ours")], [("50%", "naive")]]
    assert ran == [("apart.flash", False), (model.name, False), ("apart.flash", True),
                   ("apart.flash", True)]  # fmt: skip
