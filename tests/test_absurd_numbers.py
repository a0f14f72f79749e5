"""Numbers and names that no one should give: refused in a sentence, with exit code 2, before
anything is loaded or written; nothing is taken as something else that is near it.
"""

from __future__ import annotations

import numpy as np
import pytest

from flashllm import LLM
from flashllm.cli.main import main
from flashllm.container import open_container
from flashllm.conversion.inflation_size import choose_inflation
from flashllm.engine.sampling import Sampler, SamplingParams
from flashllm.errors import BudgetError, TokenizerError, UsageError
from flashllm.evaluation import negative_log_likelihood
from flashllm.models.configs import config_from_dict
from flashllm.probe.curve import DEFAULT_CURVE
from flashllm.simulate.costs import cost
from flashllm.simulate.replay import Misses
from flashllm.units import MIB

from . import tiny

HUGE = "9" * 400  # a float has no room for it
FAR = "99999999999999999999"  # nor an int64


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("absurd")
    model = tiny.container(folder)
    tiny.container(folder, "llama-mha", tokenizer=False)
    (folder / "t.txt").write_text("some text of a few words, and again " * 4)
    (folder / "spaces.txt").write_text("  \n ")
    assert main(["trace", str(model), "--text", str(folder / "t.txt"), "--tokens", "40",
                 "-o", str(folder / "a.fltrace"), "--ram-budget", "300MiB"]) == 0  # fmt: skip
    return folder


B = "--ram-budget 300MiB"
# arguments, $ being the folder -> what stderr says
REFUSED = {
    f"generate $/llama-relu.flash -p x --ram-budget {HUGE}": "at most",
    f"generate $/llama-relu.flash -p x --ram-budget {HUGE}%": "at most",
    f"generate $/llama-relu.flash -p x {B} --n-context -1": "n_context must be",
    f"generate $/llama-relu.flash -p x {B} --n-context 0": "n_context must be",
    f"estimate $/llama-relu.flash {B} --n-context -1": "n_context must be",
    f"perplexity $/llama-relu.flash --text $/t.txt {B} --window 1": "from 2 on",
    f"perplexity $/llama-relu.flash --text $/t.txt {B} --window -1": "from 2 on",
    f"perplexity $/llama-relu.flash --text $/t.txt {B} --limit -1": "from 1 on",
    f"perplexity $/llama-relu.flash --text $/spaces.txt {B}": "no token that comes after",
    f"trace $/llama-relu.flash --text $/t.txt -o $/b.fltrace {B} --window 0": "from 1 on",
    f"trace $/llama-relu.flash --text $/t.txt -o $/b.fltrace {B} --skip -5": "from 0 on",
    f"fit $/llama-relu.flash --text $/t.txt {B} --window -1": "from 1 on",
    f"fit $/llama-relu.flash --text $/t.txt {B} --window 1": "a window of 1 tokens",
    f"fit $/llama-relu.flash --text $/t.txt {B} --unit 0": "from 1 on",
    f"simulate $/a.fltrace --policy window:{FAR}": "options are window:TOKENS",
    f"simulate $/a.fltrace --predictor window:{FAR}": "there are none, oracle",
    f"simulate $/a.fltrace --per-frame {FAR}": "bundles, not",
    f"simulate $/a.fltrace --unit {FAR}": "bundles, not",
    f"simulate $/a.fltrace --bundle-bytes {HUGE}": "at most",
    "simulate $/a.fltrace --bundle-bytes 1000000TiB": "bundles are 1 to",
    f"inflate $/llama-relu.flash $/o.flash --size {HUGE}": "at most",
    "inflate $/llama-relu.flash $/o.flash --size 1000000TiB": "more than 4096 layers",
    "relayout $/llama-relu.flash -o $/o.flash --per-frame 0": "from 1 on",
    f"convert $/llama-relu $/o.flash --flash-speed {HUGE}": "at most",
    f"bench $/llama-relu.flash --cap {HUGE}": "at most",
    "stress $/llama-relu.flash --quick --seconds nan": "a number of seconds above 0",
    "stress $/llama-relu.flash --soak -1": "a number of seconds above 0",
    f"stress --quick --dir $ --size {HUGE}": "at most",
}


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line[:70].replace("$/", ""))
def test_refused_in_a_sentence(home, line, capsys):
    before = sorted(home.iterdir())
    try:
        code = main([word.replace("$", str(home)) for word in line.split()])
    except SystemExit as end:  # argparse's
        code = end.code
    said = capsys.readouterr().err
    assert (code, REFUSED[line] in said) == (2, True), (code, said)
    assert sorted(home.iterdir()) == before


def test_what_is_no_model_is_said_before_a_stress_test(home, capsys):
    assert main(["stress", str(home / "t.txt"), "--quick"]) == 3
    assert "t.txt: magic" in capsys.readouterr().err


def test_memory_that_the_system_refuses_is_named(monkeypatch, capsys):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr("flashllm.cli.inspect.open_container", refuse)
    assert main(["inspect", "x"]) == 1
    assert "the system gives no more memory" in capsys.readouterr().err


def test_a_text_needs_a_tokenizer_and_two_tokens(home):
    none = LLM(str(home / "llama-mha.flash"), ram_budget=300 * MIB)
    with none, pytest.raises(TokenizerError, match="pass token ids"):
        negative_log_likelihood(none, "some text")
    with LLM(str(home / "llama-relu.flash"), ram_budget=300 * MIB) as llm:
        for window in (1, 0, -1):
            with pytest.raises(UsageError, match=f"window of {window} tokens"):
                negative_log_likelihood(llm, "some text", window=window)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
@pytest.mark.parametrize("given", [5, [None], ["a", 2], [1.5], [b"x"], object()])
def test_stops_of_another_type(name, given):
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: given})
    assert SamplingParams(stop_token_ids=np.array([3, 4])).stop_token_ids == (3, 4)


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-201, 1e-199, 1e-30])
def test_hardly_any_temperature_is_greedy(temperature):
    logits = np.array([-50, 3, 80, 79.9, -1e30], np.float32)
    drawn = Sampler(SamplingParams(temperature=temperature, seed=1).resolved({}), np.array([1]))
    assert {drawn.sample(logits) for _ in range(20)} == {2}


def test_a_simulation_beyond_64_bits_is_refused():
    misses = Misses(np.array([0, 2**28]), np.array([0, 2**24]), *[np.array([1, 1])] * 2)
    with pytest.raises(UsageError, match="too large"):
        cost(misses, DEFAULT_CURVE, frame_bytes=2**26, gap_limit=2**16)


def test_the_widest_model_is_still_refused_when_too_deep(home):
    with open_container(home / "llama-relu.flash") as container:
        config = config_from_dict(container.family, container.config)
    with pytest.raises(UsageError, match="layers"):
        choose_inflation(config, 2**62, quant="int8")


def test_a_budget_of_every_byte_there_could_be(home):
    """Accepted: a plan is what is needed, not what is allowed."""
    with LLM(str(home / "llama-relu.flash"), ram_budget=2**62) as llm:
        assert llm.plan.ledger.budget_bytes == 2**62
    with pytest.raises(BudgetError):
        LLM(str(home / "llama-relu.flash"), ram_budget=2**62, io_depth=2**62)
