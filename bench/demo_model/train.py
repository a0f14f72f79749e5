"""Train the bundled demonstration model from scratch on two CPU cores within a wall-clock budget.

    python train.py --corpus books-train.txt.xz --valid books-valid.txt --work WORKDIR --minutes 75

Everything large goes to WORKDIR (tokens, checkpoint, log). A second call with the same WORKDIR
resumes from the last checkpoint; the time already trained counts. The learning rate follows the
elapsed training time, so that it reaches zero at the deadline whatever the throughput. Settings
with `steps` follow those instead, so that two runs differ in nothing but what is meant to differ:

    python train.py --corpus … --valid … --work WORKDIR --settings short_sparse.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from data import batches, prepare, read_text
from export import export
from measure import bits_per_character
from model import Decoder, ModelConfig
from optim import make_optimizers
from sparsity import Penalty, revive
from tokenizers import Tokenizer


@dataclass
class Settings:
    """Everything that shapes the result; written to settings.json."""

    model: ModelConfig = field(default_factory=ModelConfig)
    minutes: float = 75.0
    steps: int = 0  # if not 0, progress is counted in steps and minutes mean nothing
    batch_tokens: int = 4096
    context: int = 256
    long_context: int = 512
    long_from: float = 0.90  # share of the time after which windows of long_context are read
    bos_share: float = 0.5
    tokenizer_sample_chars: int = 20_000_000
    muon_lr: float = 0.02
    adam_lr: float = 0.003
    momentum: float = 0.95
    decay: float = 0.05
    clip: float = 1.0
    warmup: float = 0.02  # shares of the time: linear up, constant until decay_from, linear to zero
    decay_from: float = 0.45
    active_targets: tuple[float, ...] = (0.10, 0.03, 0.04, 0.04, 0.05, 0.06)  # per layer
    penalty_from: float = 0.03
    penalty_full: float = 0.40
    penalty_start: float = 0.05
    penalty_rate: float = 0.01
    revive_active: float = 0.08  # active share that a revived neuron starts with
    revive_until: float = 0.77
    eval_chars: int = 200_000
    checkpoint_minutes: float = 3.0
    checkpoint_steps: int = 40  # where progress is counted in steps
    early_export_minutes: float = 20.0
    threads: int = 2
    seed: int = 1


def rate(progress: float, s: Settings) -> float:
    """Warmup-stable-decay factor at a share of the training time (Hu et al. 2024, MiniCPM)."""
    up = min(1.0, (progress + 0.001) / s.warmup)
    down = min(1.0, (1.0 - progress) / (1.0 - s.decay_from))
    return max(0.0, min(up, down))


class Run:
    """State of one training run, with its files in the work folder."""

    def __init__(self, s: Settings, tok: Tokenizer, valid: str, work: Path) -> None:
        self.s, self.tok, self.valid, self.work = s, tok, valid[: s.eval_chars], work
        torch.manual_seed(s.seed)
        self.ids = np.load(work / "train.npy", mmap_mode="r")
        self.model = Decoder(s.model)
        self.compiled = torch.compile(self.model, dynamic=False)
        self.opts = make_optimizers(self.model, s.muon_lr, s.adam_lr, s.momentum, s.decay)
        self.penalty = Penalty(s)
        self.elapsed, self.tokens, self.steps, self.epoch, self.in_epoch = 0.0, 0, 0, 0, 0
        self.curve: list[list[float]] = []
        self.loss_mean, self.early_done = math.log(s.model.vocab_size), False
        self.length = s.context

    def log(self, line: str) -> None:
        with open(self.work / "log.txt", "a", encoding="utf-8") as f:
            f.write(line + "\n")
        print(line, flush=True)

    def progress(self) -> float:
        if self.s.steps:
            return min(1.0, self.steps / self.s.steps)
        return min(1.0, self.elapsed / (60.0 * self.s.minutes))

    def due(self, saved: tuple[float, int]) -> bool:
        """Whether a checkpoint should follow the one that was made at (seconds, steps)."""
        if self.s.steps:
            return self.steps - saved[1] >= self.s.checkpoint_steps
        return self.elapsed - saved[0] > 60 * self.s.checkpoint_minutes

    def step(self, batch: torch.Tensor) -> None:
        progress = self.progress()
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * rate(progress, self.s)
        with torch.autocast("cpu", torch.bfloat16):
            loss, level, active = self.compiled(batch[:, :-1], batch[:, 1:])
        (loss + (self.penalty.weight * level).mean()).backward()
        # Only the AdamW part is clipped: Muon's update does not depend on the gradient's scale.
        norm = torch.nn.utils.clip_grad_norm_(self.opts[1].param_groups[0]["params"], self.s.clip)
        value = loss.item()
        if math.isfinite(value) and torch.isfinite(norm):
            for opt in self.opts:
                opt.step()
            self.loss_mean += 0.02 * (value - self.loss_mean)
            self.penalty.update(active, progress)
        else:
            self.log(f"step {self.steps}: loss {value} gradient {norm.item()}, skipped")
        for opt in self.opts:
            opt.zero_grad(set_to_none=True)
        self.steps += 1
        self.in_epoch += 1
        self.tokens += batch[:, 1:].numel()

    def evaluate(self) -> None:
        bits, active = bits_per_character(self.model, self.tok, self.valid, bf16=True)
        share = sum(active) / len(active)
        self.curve.append([self.elapsed / 60, self.tokens, self.loss_mean, bits, share])
        layers = " ".join(f"{100 * a:.1f}" for a in active)
        weights = " ".join(f"{w:.3f}" for w in self.penalty.weight.tolist())
        self.log(
            f"{self.elapsed / 60:6.2f} min  {self.tokens / 1e6:6.2f} M tokens  step {self.steps}"
            f"  train {self.loss_mean:.4f} nats  valid {bits:.4f} bits/char"
            f"  active {100 * share:.2f} % [{layers}]  penalty [{weights}]"
            f"  rate {rate(self.progress(), self.s):.3f}"
        )

    def revive(self) -> None:
        """Give neurons that never fire on two batches of training text another chance."""
        s = self.s
        epoch = 10**6 + self.steps  # an order of its own, apart from those that training reads
        stream = batches(self.ids, 2 * s.batch_tokens, s.context, s.bos_share, s.seed, epoch)
        counts = revive(self.model, self.opts[0], next(stream)[:, :-1], s.revive_active)
        for i, count in enumerate(counts):
            if 2 * count > s.model.ffn:  # a layer that lost half its neurons was pressed too hard
                self.penalty.weight[i] *= 0.5
        self.log(f"  revived neurons per layer {counts}")

    def save(self) -> None:
        """Write the checkpoint beside the old one, then rename it over."""
        names = ("elapsed", "tokens", "steps", "epoch", "in_epoch", "curve", "loss_mean")
        state = {n: getattr(self, n) for n in (*names, "early_done", "length")}
        state["penalty"] = (self.penalty.weight, self.penalty.active)
        state["model"] = self.model.state_dict()
        state["opts"] = [opt.state_dict() for opt in self.opts]
        part = self.work / "checkpoint.part"
        torch.save(state, part)
        os.replace(part, self.work / "checkpoint.pt")

    def resume(self) -> None:
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state.pop("model"))
        for opt, saved in zip(self.opts, state.pop("opts"), strict=True):
            opt.load_state_dict(saved)
        self.penalty.weight, self.penalty.active = state.pop("penalty")
        for name, value in state.items():
            setattr(self, name, value)
        self.log(f"resumed at {self.elapsed / 60:.2f} min, step {self.steps}")

    def export(self, name: str) -> None:
        export(self.model, self.tok, self.work / name)
        self.log(f"exported {name} at {self.elapsed / 60:.2f} min")

    def train(self) -> None:
        s, saved = self.s, (-1e9, -(10**9))
        base, begin = self.elapsed, time.monotonic()
        while self.progress() < 1.0:
            stream = batches(self.ids, s.batch_tokens, self.length, s.bos_share, s.seed, self.epoch)
            skip = self.in_epoch
            for i, batch in enumerate(stream):
                if i < skip:
                    continue
                self.step(batch)
                self.elapsed = base + time.monotonic() - begin
                if self.steps % 100 == 0:
                    self.log(f"  step {self.steps} {self.elapsed / 60:.2f} min loss "
                             f"{self.loss_mean:.4f} active "
                             f"{100 * self.penalty.active.mean():.1f} %")
                if self.due(saved):
                    saved = self.elapsed, self.steps
                    self.evaluate()
                    if s.penalty_from < self.progress() < s.revive_until:
                        self.revive()
                    self.save()
                    if not self.early_done and self.elapsed > 60 * s.early_export_minutes:
                        self.early_done = True
                        self.export("export-early")
                    self.elapsed = base + time.monotonic() - begin
                if self.progress() >= 1.0:
                    break
                if self.length == s.context and self.progress() >= s.long_from:
                    self.length = s.long_context
                    break
            self.epoch, self.in_epoch = self.epoch + 1, 0
        self.evaluate()
        self.save()
        self.export("export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="books, plain text or .xz")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text, never trained on")
    parser.add_argument("--work", type=Path, required=True, help="folder for all large files")
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="training time")
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--settings", type=Path, help="a JSON file of settings that differ")
    args = parser.parse_args()
    s = Settings(minutes=args.minutes, threads=args.threads)
    if args.settings is not None:
        given = json.loads(args.settings.read_text())
        given["model"] = ModelConfig(**given.get("model", {}))
        s = replace(s, **given)
    torch.set_num_threads(s.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tok = prepare(args.corpus, args.work, s.model.vocab_size, s.tokenizer_sample_chars)
    (args.work / "settings.json").write_text(json.dumps(asdict(s), indent=2) + "\n")
    run = Run(s, tok, read_text(args.valid), args.work)
    run.resume()
    run.train()


if __name__ == "__main__":
    main()
