"""Parity with transformers: the same weights, the same ids, logits side by side.

    make parity                     every golden variant with fresh random weights, and real models
    python bench/parity.py --seeds 3 --seed 100 [variant ...]

Each variant of tests/golden/make_golden.py is made anew from a random seed (printed, so that a
failure can be repeated), written as a checkpoint, converted, and run resident, streamed and in
small prefill chunks.  Trained models under $FLASHLLM_DATA/models (or ../shared/data/models) are
compared on text.  Exit status 1 if any logit differs by more than the tolerance.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "golden"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import make_golden  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from flashllm import LLM, convert  # noqa: E402

TOLERANCE = 1e-4
BUDGET = "512MiB"
RUNS = {"resident": {}, "streamed": {"pin": False, "prefill_chunk": 7}}


def compare(name: str, container: Path, ids, expected) -> bool:
    """Prints one line; True if every run is within the tolerance."""
    worst, found = {}, {}
    for run, settings in RUNS.items():
        with LLM(str(container), ram_budget=BUDGET, **settings) as llm:
            found[run] = llm.logits(ids)
        worst[run] = float(np.abs(found[run] - expected).max())
    same_bits = np.array_equal(found["resident"], found["streamed"])
    good = max(worst.values()) <= TOLERANCE and same_bits
    figures = "  ".join(f"{run} {error:.1e}" for run, error in worst.items())
    agree = float((found["resident"].argmax(1) == expected.argmax(1)).mean())
    print(
        f"{'ok  ' if good else 'FAIL'} {name:36} max |difference|: {figures}  "
        f"(logits' deviation {expected.std():.1f}, argmax agree {agree:.1%}, "
        f"streamed {'has the bits of resident' if same_bits else 'DIFFERS from resident'})"
    )
    return good


def random_variant(name: str, seed: int, folder: Path) -> bool:
    checkpoint = folder / f"{name}-{seed}"
    expected = make_golden.make(name, checkpoint, seed)
    container = folder / f"{name}-{seed}.flash"
    convert(checkpoint, container)
    ids = np.load(checkpoint / "ids.npy")
    return compare(f"{name} (seed {seed})", container, ids, expected)


def trained_model(checkpoint: Path, folder: Path) -> bool:
    container = folder / f"{checkpoint.name}.flash"
    convert(checkpoint, container)
    text = "Once upon a time there was a little girl who lived in the woods. One day, she"
    with LLM(str(container), ram_budget=BUDGET) as llm:
        ids = np.asarray(llm.tokenizer.encode(text), np.int64)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()
    _tie_to_head(model, checkpoint)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return compare(checkpoint.name, container, ids, expected)


def _tie_to_head(model, checkpoint: Path) -> None:
    """Some tied checkpoints hold the one matrix as lm_head.weight only."""
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        if model.config.tie_word_embeddings and "model.embed_tokens.weight" not in names:
            model.get_input_embeddings().weight.data = tensors.get_tensor("lm_head.weight").float()
            model.lm_head.weight = model.get_input_embeddings().weight


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help="of tests/golden/make_golden.py; default: all")
    parser.add_argument("--seeds", type=int, default=2, help="random models of each variant")
    parser.add_argument("--seed", type=int, help="the first seed; default: a random one")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    first = arguments.seed
    if first is None:
        first = int.from_bytes(os.urandom(3), "little")
    unknown = set(arguments.variants) - set(make_golden.VARIANTS)
    if unknown:
        parser.error(f"unknown variants {sorted(unknown)}; known: {list(make_golden.VARIANTS)}")
    results = []
    with tempfile.TemporaryDirectory(prefix="flashllm-parity-") as folder:
        for name in arguments.variants or make_golden.VARIANTS:
            for seed in range(first, first + arguments.seeds):
                results.append(random_variant(name, seed, Path(folder)))
        data = Path(os.environ.get("FLASHLLM_DATA", ROOT.parent / "shared" / "data"))
        for config in sorted((data / "models").glob("*/config.json")):
            if not arguments.variants:
                results.append(trained_model(config.parent, Path(folder)))
    print(
        f"{sum(results)} of {len(results)} models agree with transformers "
        f"{transformers.__version__} (torch {torch.__version__})"
    )
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
