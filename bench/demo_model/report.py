"""Measure an exported model: bits per character by type, sparsity, reuse, samples, loss curve.

    python report.py --model EXPORT --valid books-valid.txt --work WORKDIR --out FOLDER

Writes loss_curve.csv, loss_curve.svg and settings.json to FOLDER and prints the other figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

import torch
from data import read_text
from measure import bits_per_character
from model import Decoder, ModelConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer

PROMPTS = (
    "It was late in the evening when the old man",
    "The ship had been at sea for three weeks, and",
    '"I do not believe you," said the girl,',
)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The exported model, its weights rounded to dtype and computed in f32."""
    c = json.loads((folder / "config.json").read_text())
    cfg = ModelConfig(
        vocab_size=c["vocab_size"], hidden=c["hidden_size"], layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"], kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"], ffn=c["intermediate_size"], rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"], max_positions=c["max_position_embeddings"],
    )
    model = Decoder(cfg)
    weights = load_file(str(folder / "model.safetensors"))
    model.load_state_dict(
        {n.removeprefix("model."): w.to(dtype).float() for n, w in weights.items()}
    )
    return model.eval()


def round_weights(model: Decoder, how: str) -> Decoder:
    """Round the weights in place: bf16, f16, or int8 with one f16 scale per 32 weights of a row."""
    with torch.no_grad():
        for p in model.parameters():
            if how == "int8" and p.ndim == 2:
                groups = p.view(-1, 32)
                scale = (groups.abs().amax(1, keepdim=True) / 127).half().float().clamp_min(1e-8)
                p.copy_(((groups / scale).round().clamp(-127, 127) * scale).view_as(p))
            elif how in ("bf16", "f16"):
                p.copy_(p.to(torch.bfloat16 if how == "bf16" else torch.float16).float())
    return model


@torch.no_grad()
def reuse(model: Decoder, tok: Tokenizer, text: str, context: int = 256) -> list[dict]:
    """Per layer: active share, and the share of a token's active neurons seen in the last k.

    Two yardsticks: `shuffled` takes k tokens from elsewhere in the text instead of the last k (so
    neurons that are active often anywhere count the same), `even` is 1 - (1 - p)^k, what k tokens
    would cover if every neuron were active equally often.
    """
    ids = torch.tensor(tok.encode(text, add_special_tokens=False).ids)
    rows = ids[: len(ids) // context * context].view(-1, context)
    inputs = torch.cat((torch.zeros(len(rows), 1, dtype=torch.long), rows[:, :-1]), 1)
    layers = [(r > 0) for r in model.hidden(inputs)[1]]
    order = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(1))
    out = []
    for mask in layers:
        mixed = mask.flatten(0, 1)[order].view_as(mask)
        now = mask[:, 8:]
        share = mask.float().mean().item()
        per_token = mask.float().mean(-1).flatten()
        entry = {"active": share, "p95": per_token.quantile(0.95).item(),
                 "never": (mask.flatten(0, 1).sum(0) == 0).float().mean().item()}
        for k in (1, 4, 8):
            for name, source in (("last", mask), ("shuffled", mixed)):
                seen = torch.zeros_like(now)
                for back in range(1, k + 1):
                    seen |= source[:, 8 - back : source.shape[1] - back]
                entry[f"{name}{k}"] = ((now & seen).sum() / now.sum()).item()
            entry[f"even{k}"] = 1 - (1 - share) ** k
        out.append(entry)
    return out


@torch.no_grad()
def sample(model: Decoder, tok: Tokenizer, prompt: str, temperature: float, count: int) -> str:
    """Continue a prompt; temperature 0 is greedy. Without a cache: count is small."""
    rng = torch.Generator().manual_seed(1)
    ids = tok.encode(prompt).ids
    for _ in range(count):
        last = model.logits(torch.tensor([ids[-model.cfg.max_positions :]]))[0, -1]
        if temperature > 0:
            pick = torch.multinomial((last / temperature).softmax(-1), 1, generator=rng)
        else:
            pick = last.argmax()
        ids.append(int(pick))
        if ids[-1] == 0:
            break
    return tok.decode(ids, skip_special_tokens=True)


COLOURS = ("#1f5fa8", "#b0511a")


def polyline(xs: list[float], ys: list[float], span: float, box: tuple, low: float, high: float):
    """Points of one curve inside box = (left, top, width, height)."""
    left, top, width, height = box
    return " ".join(
        f"{left + width * x / span:.1f},{top + height * (high - min(high, y)) / (high - low):.1f}"
        for x, y in zip(xs, ys, strict=True)
    )


def curve_svg(
    runs: dict[str, list[list[float]]], *, unit: str = "minutes", tick: float = 15,
    bits: tuple[float, float] = (1.5, 2.1),
) -> str:  # fmt: skip
    """Two panels over minutes or million tokens: bits per character and active share, of runs by
    their names ("" for a single one)."""

    def along(row: list[float]) -> float:
        return row[0] if unit == "minutes" else row[1] / 1e6

    span = max(along(row) for rows in runs.values() for row in rows)
    panels = (
        ("bits per character, validation", lambda row: row[3], *bits, 0.1, 1),
        ("active FFN neurons per token, %", lambda row: 100 * row[4], 0, 50, 10, 0),
    )
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 300" font-size="12" '
           + 'font-family="sans-serif"><rect width="760" height="300" fill="#fff"/>']
    for i, (title, value, low, high, step, digits) in enumerate(panels):
        box = (45 + 380 * i, 35, 315, 220)
        left, top, width, height = box
        out.append(f'<text x="{left}" y="22" font-weight="bold">{title}</text>')
        for j in range(round((high - low) / step) + 1):
            y = top + height * (1 - j * step / (high - low))
            out.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/>'
                       f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">'
                       f'{low + j * step:.{digits}f}</text>')
        for j in range(int(span / tick) + 1):
            x = left + width * j * tick / span
            out.append(f'<text x="{x:.1f}" y="273" text-anchor="middle">{j * tick:g}</text>')
        out.append(f'<text x="{left + width / 2}" y="292" text-anchor="middle">{unit}</text>')
        for k, (name, rows) in enumerate(runs.items()):
            colour = COLOURS[k if len(runs) > 1 else i]
            points = polyline([along(r) for r in rows], [value(r) for r in rows], span, box, low,
                              high)  # fmt: skip
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                       f'stroke-width="2"/>')
            out.append(f'<text x="{left + width - 4}" y="{top + 14 + 16 * k}" fill="{colour}" '
                       f'text-anchor="end">{name}</text>')
    return "\n".join(out) + "\n</svg>\n"


def write_curve(work: Path, out: Path) -> None:
    """loss_curve.csv, loss_curve.svg and settings.json from the run's checkpoint and settings."""
    rows = torch.load(work / "checkpoint.pt", weights_only=True)["curve"]
    with open(out / "loss_curve.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["minutes", "tokens", "train_nats_per_token", "valid_bits_per_char",
                         "active_share"])
        writer.writerows([f"{m:.2f}", int(t), f"{n:.4f}", f"{b:.4f}", f"{a:.4f}"]
                         for m, t, n, b, a in rows)
    # The first point is an untrained model, far off the scale.
    (out / "loss_curve.svg").write_text(curve_svg({"": rows[1:]}), encoding="utf-8")
    shutil.copyfile(work / "settings.json", out / "settings.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument("--work", type=Path, help="work folder of the training run")
    parser.add_argument("--out", type=Path, help="where the loss curve is written")
    parser.add_argument("--f32", action="store_true", help="weights of checkpoint.pt in --work")
    parser.add_argument("--chars", type=int, default=0, help="only the first so many characters")
    parser.add_argument("--types", nargs="*", default=["f32", "bf16", "f16", "int8"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = read_text(args.valid)
    text = text[: args.chars or len(text)]

    def fresh() -> Decoder:
        model = load(args.model)
        if args.f32:
            state = torch.load(args.work / "checkpoint.pt", weights_only=True)
            model.load_state_dict(state["model"])
        return model

    model = fresh()
    print("parameters", sum(p.numel() for p in model.parameters()))
    for how in args.types:
        bits, active = bits_per_character(round_weights(fresh(), how), tok, text)
        print(how, f"{bits:.6f} bits/char, active", " ".join(f"{100 * a:.2f}" for a in active),
              flush=True)
    print("f32, windows of 512:", f"{bits_per_character(model, tok, text, 512)[0]:.6f} bits/char")
    for i, entry in enumerate(reuse(model, tok, text[:100_000])):
        print(i, " ".join(f"{k} {100 * v:.1f}" for k, v in entry.items()))
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            print(f"--- temperature {temperature}\n{sample(model, tok, prompt, temperature, 120)}")
    if args.work and args.out:
        write_curve(args.work, args.out)


if __name__ == "__main__":
    main()
