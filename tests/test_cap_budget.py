"""The cap under a kernel limit (R-01 to R-03, R-05): cold cache, exact groups, kernel numbers.

The model is inflated on the spot; sizes are small so that the suite stays quick.  The same checks
at 1 GiB and more are in bench/ (frontier.py) with their cards.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from flashllm import LLM, bundled_model
from flashllm.conversion.enlarge import inflate
from flashllm.stress.confine import cached_bytes, make_cold
from flashllm.units import MIB

from .capped import generate, needs_cgroup, run

pytestmark = [needs_cgroup, pytest.mark.cgroup]

GOLDEN = Path(__file__).parent / "golden"
# Decoded; half of the file, compressed 1.5 times where it is, must clear the floor of some 72 MiB.
SIZES = {"sparse": 192 * MIB, "dense": 288 * MIB}
TOKENS = 10


@pytest.fixture(scope="module", params=["sparse raw", "dense zstd"])
def model(request, tmp_path_factory):
    kind, codec = request.param.split()
    source = {"sparse": "llama-relu", "dense": "llama-mha"}[kind]
    path = tmp_path_factory.mktemp("cap") / f"{kind}.flash"
    quant = "int8" if codec == "raw" else "bf16"
    inflate(str(GOLDEN / source), str(path), size_bytes=SIZES[kind], quant=quant, codec=codec)
    return path


@pytest.fixture(scope="module")
def resident_tokens(model):
    with LLM(str(model), ram_budget="4GiB") as llm:
        return llm.generate(
            [1, 5, 9, 20, 33, 7, 42, 11], max_tokens=TOKENS, temperature=0, ignore_eos=True
        ).tokens


def floor_of(model, *options) -> int:
    run = generate(model, 8 * MIB, *options, group_bytes=512 * MIB, cold=False)
    assert run.code == 4, run.err
    return int(re.search(r"floor of (\d+) bytes", run.err)[1])


def half_for(model, storage) -> int:
    """Half of the file, or a mapping's floor, which is as near as an interpreter varies."""
    return max(model.stat().st_size // 2, floor_of(model, "--storage", storage) + MIB)


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_exact_group_same_tokens_no_kill_limit_never_hit(model, share, resident_tokens):
    budget = int(model.stat().st_size * share)
    run = generate(model, budget, "--storage", "direct", tokens=TOKENS)
    flash = run.result["flash"]
    assert run.result["tokens"] == resident_tokens
    assert run.charges.oom_kills == 0
    assert flash["limit_hits"] == 0
    assert flash["peak_rss"] <= budget
    assert cached_bytes(model) < 4 * MIB


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_in_a_larger_group_the_peak_stays_under_the_budget(model, share, resident_tokens):
    budget = int(model.stat().st_size * share)
    run = generate(model, budget, "--storage", "direct", group_bytes=budget * 5 // 4, tokens=TOKENS)
    assert run.result["tokens"] == resident_tokens
    assert max(run.charges.peak_bytes, run.result["flash"]["peak_rss"]) <= budget


def test_the_stated_floor_runs_and_a_step_below_is_refused(model, resident_tokens):
    floor = floor_of(model)
    # The floor counts this very process, which differs by a few pages from run to run.
    near = floor + MIB
    run = generate(model, near, "--storage", "direct", tokens=TOKENS)
    assert run.result["tokens"] == resident_tokens and run.charges.oom_kills == 0
    below = generate(model, floor - MIB, group_bytes=floor * 2)
    assert below.code == 4 and "floor" in below.err


@pytest.mark.parametrize("storage", ["pread", "mmap"])
def test_other_backends_cold(model, storage, resident_tokens):
    budget = half_for(model, storage)
    run = generate(model, budget, "--storage", storage, tokens=TOKENS)
    assert run.result["tokens"] == resident_tokens
    assert run.charges.oom_kills == 0


@pytest.mark.parametrize("storage", ["direct", "pread", "mmap"])
def test_a_warm_cache_changes_nothing(model, storage, resident_tokens):
    budget = half_for(model, storage)
    model.read_bytes()  # now the pages are in the cache, charged to us and not to the child
    run = generate(model, budget, "--storage", storage, tokens=TOKENS, cold=False)
    assert run.result["tokens"] == resident_tokens
    assert run.result["flash"]["peak_rss"] <= budget


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """A context whose state is a third of half of the file."""
    folder = tmp_path_factory.mktemp("long")
    shutil.copytree(GOLDEN / "llama-relu", folder / "long")
    config = json.loads((folder / "long" / "config.json").read_text())
    config["max_position_embeddings"] = 1024
    (folder / "long" / "config.json").write_text(json.dumps(config))
    inflate(str(folder / "long"), str(folder / "m.flash"), size_bytes=SIZES["sparse"], quant="int8")
    return folder / "m.flash"


def test_what_a_sequence_lends_comes_back_before_it_is_used(long_model):
    """The state grows by more than the slack of a plan, in which weights were kept at first."""
    budget, prompt = long_model.stat().st_size * 3 // 4, [i * 37 % 60 + 1 for i in range(760)]
    options = ["--kv-type", "f32", "--n-context", "1024"]
    options += ["--token-ids", ",".join(map(str, prompt))]
    tight, whole = (generate(long_model, size, *options, tokens=16) for size in (budget, 2**31))
    assert tight.result["tokens"] == whole.result["tokens"]
    assert tight.charges.failcnt == tight.charges.oom_kills == 0
    assert tight.result["flash"]["peak_rss"] <= budget


def test_verify_in_a_group_smaller_than_the_file(model):
    """R-10: what was read does not stay, so the limit is never hit."""
    limit = 160 * MIB
    assert model.stat().st_size > limit
    assert make_cold(model) == 0
    done = run([sys.executable, "-m", "flashllm", "verify", str(model)], limit)
    assert done.code == 0 and "every byte is as written" in done.err, done.err
    assert done.charges.oom_kills == done.charges.failcnt == 0
    assert done.charges.peak_bytes < limit and cached_bytes(model) < 4 * MIB


def test_perplexity_in_an_exact_group(tmp_path):
    """R-10: at the floor, the same number as with all memory."""
    text, model = tmp_path / "text", bundled_model()
    text.write_text("Once upon a time there was a fox who had no memory to spare. " * 3)
    found = []
    for budget in (2**31, floor_of(model) + MIB):
        command = [sys.executable, "-m", "flashllm", "perplexity", model, "--json",
                   "--text", str(text), "--ram-budget", str(budget)]  # fmt: skip
        done = run(command, budget)
        assert done.charges.oom_kills == 0
        found.append(done.result["perplexity"])
    assert found[0] == found[1]
