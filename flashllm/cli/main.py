"""`flashllm VERB …`: arguments in, exit codes out.

Text goes to stdout, everything else to stderr.  Exit codes: 0 ok, 1 failure, 2 usage, 3 bad model
file, 4 budget cannot be met, 130 interrupted.  Each verb is one module, imported when called, so
that `flashllm --help` stays quick.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from .. import __version__
from ..errors import FlashError
from .streams import make_usable

# verb -> (module, one-line help); aliases are what people type without reading
VERBS = {
    "convert": ("convert", "turn a checkpoint into a .flash container"),
    "generate": ("generate", "generate text from a prompt or token ids"),
    "inspect": ("inspect", "show what a container holds"),
    "verify": ("verify", "check every byte of a container"),
    "estimate": ("estimate", "memory plan and expected speed, without loading"),
    "inflate": ("inflate", "widen a Llama-family model with the same function"),
    "perplexity": ("perplexity", "perplexity of a text under a model"),
    "trace": ("trace", "record which neurons a text activates"),
    "fit": ("fit", "fit predictors of active neurons to a container"),
    "simulate": ("simulate", "replay a trace through caches and devices, without weights"),
    "bench": ("bench", "llama-bench's table, under a ladder of RAM caps"),
    "stress": ("stress", "does the RAM cap hold on this machine? runs it under limits"),
    "plot": ("plot", "a picture, or CSV, of a trace, a run, a benchmark or a fit"),
    "relayout": ("relayout", "lay a container's neurons out by what fires together"),
    "doctor": ("doctor", "what this machine is and where each setting came from"),
    "demo": ("demo", "run the bundled model, widened, at half of its size"),
}
ALIASES = {"run": "generate", "show": "inspect"}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    make_usable()
    try:
        verb, args = _parse(argv)
        return int(verb.run(args) or 0)
    except FlashError as error:
        print(f"flashllm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("flashllm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away: normal for `flashllm … | head`.
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"flashllm: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:  # its text is often empty
        print(f"flashllm: {str(error) or 'the system gives no more memory'}", file=sys.stderr)
        return 1


def _parse(argv: list[str]):
    """Only the chosen verb's module is imported; the others appear in the help by their line."""
    parser = argparse.ArgumentParser(
        prog="flashllm", description="Language models larger than the memory they may use."
    )
    parser.add_argument("--version", action="version", version=f"flashllm {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    asked = ALIASES.get(asked, asked)
    module = None
    for name, (home, line) in VERBS.items():
        aliases = [alias for alias, target in ALIASES.items() if target == name]
        sub = verbs.add_parser(name, help=line, description=line, aliases=aliases)
        if name == asked:
            module = import_module(f".{home}", __package__)
            module.add_arguments(sub)
    return module, parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
