"""`flashllm fit MODEL --text FILE`: predictors of what a token will need, beside the model; with
`--density`, for a model without exact zeros, thresholds on the magnitude of its gates."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from ..api import LLM
from ..calibration.density import calibrate
from ..calibration.fitting import SHARE, WINDOW, FitReport, fit
from ..calibration.solving import KINDS
from ..container.base import MAX_BLOB_BYTES
from ..conversion.carry import with_predictors
from ..errors import UsageError
from ..predictors.fit import BLOB
from ..predictors.magnitude import density_path
from ..units import format_size
from .options import add_engine_flags, engine_arguments, token_ids, whole
from .progress import Progress
from .streams import read_text

# Flags of the engine that mean something else here, or nothing.
NOT_THE_ENGINES = ("recall", "density", "mode", "audit", "n_context", "governor")
DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # calibrated whichever was asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a .flash container of a ReLU model; with --density, "
                        "of a SiLU or GELU model whose gate rows lie apart")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="a UTF-8 text file, like what the model will read")
    given.add_argument("--token-ids-file", help="a file of token ids instead (no tokenizer needed)")
    parser.add_argument("--tokens", type=whole(1), default=16384,
                        help="tokens to use (default 16384)")
    parser.add_argument("--window", type=whole(1), default=WINDOW,
                        help=f"tokens per context (default {WINDOW})")
    parser.add_argument("--share", type=float, default=SHARE, help="of the streamed bytes, what "
                        f"predictors may keep in memory (default {SHARE})")
    parser.add_argument("--kind", choices=("auto", *KINDS), default="auto")
    parser.add_argument("--unit", type=whole(1), default=1,
                        help="neighbouring neurons predicted together (default 1)")
    parser.add_argument("-o", "--output", help="a new container with the predictors inside; "
                        "default: MODEL.fit beside the model")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    engine = {k: v for k, v in engine_arguments(args).items() if k not in NOT_THE_ENGINES}
    text = ids = None
    if args.text is not None:
        text = read_text(args.text)
    else:
        ids = token_ids(read_text(args.token_ids_file))
    if args.output and Path(args.output).exists() and not args.overwrite:
        raise UsageError(f"{args.output} exists; --overwrite replaces it")
    if args.density is not None:
        return _densities(args, text, engine)
    progress = Progress()
    options = {
        "text": text, "ids": ids, "text_name": Path(args.text or args.token_ids_file).name,
        "recall": 0.99 if args.recall is None else args.recall, "share": args.share,
        "n_tokens": args.tokens, "window": args.window, "unit": args.unit,
        "kinds": KINDS if args.kind == "auto" else (args.kind,), "progress": progress,
    }  # fmt: skip
    if args.output is None:
        report = fit(args.model, **options, **engine)
        written = str(report.path)
    else:
        report = _inside(args, options, engine, progress)
        written = args.output
    progress.close()
    said = {**report.as_dict(), "path": written}
    print(json.dumps(said) if args.json else table(report))
    print(f"{written}", file=sys.stderr)
    return 0


def _densities(args: argparse.Namespace, text: str | None, engine: dict) -> int:
    """Thresholds for a model without exact zeros, beside it."""
    if text is None or args.output or args.recall is not None:
        raise UsageError("--density needs --text, knows no --recall, and writes MODEL.density "
                         "beside the model")
    out, progress = density_path(args.model), Progress()
    if out.exists() and not args.overwrite:
        raise UsageError(f"{out} exists; --overwrite replaces it")
    with LLM(args.model, **engine) as llm:
        found = calibrate(
            llm, text, densities=[*DENSITIES, args.density], n_tokens=args.tokens,
            window=min(args.window, llm.n_context), progress=progress,
        )  # fmt: skip
    progress.close()
    found.save(out)
    said = {"path": str(out), "tokens": found.n_tokens, "densities": found.densities,
            "layers": found.layers}  # fmt: skip
    known = ", ".join(f"{d:g}" for d in found.densities)
    summary = f"{len(found.layers)} layers, densities {known}, {found.n_tokens} tokens"
    print(json.dumps(said) if args.json else summary)
    print(f"{out}", file=sys.stderr)
    return 0


def _inside(args, options, engine, progress) -> FitReport:
    with tempfile.TemporaryDirectory(prefix="flashllm-", dir=Path(args.output).parent) as folder:
        made = Path(folder) / "model.fit"
        report = fit(args.model, out=made, **options, **engine)
        raw = made.read_bytes()
    parts = [raw[at : at + MAX_BLOB_BYTES] for at in range(0, len(raw), MAX_BLOB_BYTES)]
    blobs = {f"{BLOB}{i}": part for i, part in enumerate(parts)}
    with_predictors(args.model, args.output, blobs, overwrite=args.overwrite, progress=progress)
    return report


def table(report: FitReport) -> str:
    """The report for people: what was asked and measured, layer by layer."""
    said = report.as_dict()
    lines = ["layer  kind        resident  recall  precision     us"]
    for row in said["layers"]:
        lines.append(
            f"{row['layer']:>5}  {row['kind']:8}  {format_size(row['resident_bytes']):>10}  "
            f"{row['recall']:>6.4f}  {row['precision']:>9.3f}  {row['microseconds']:>5.0f}"
        )
    lines.append(
        f"asked for recall {report.recall}; on text that nothing was fitted to "
        f"{said['recall']:.4f}, precision {said['precision']:.3f} (means over layers)"
    )
    lines.append(
        f"{format_size(report.resident_bytes)} in memory, {100 * report.share:.1f} % of the "
        f"streamed {format_size(report.streamed_bytes)}; {said['microseconds']:.0f} us per token; "
        f"{report.n_tokens} tokens, {report.seconds:.0f} s"
    )
    return "\n".join(lines)
