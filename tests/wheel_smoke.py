"""Run by `make wheel-test` inside an environment that holds the wheel and nothing else of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flashllm
from flashllm import LLM, bundled_model

HERE = Path(__file__).resolve().parent


def main() -> None:
    home = Path(flashllm.__file__).resolve()
    assert HERE.parent not in home.parents, f"the source tree was imported, not the wheel: {home}"
    with LLM(bundled_model(), ram_budget="300MiB") as llm:
        result = llm.generate("The sea", max_tokens=8, temperature=0)
        streamed = "".join(llm.stream("The sea", max_tokens=8, temperature=0))
    assert len(result.tokens) == 8 and streamed == result.text
    with LLM(bundled_model(), ram_budget="300MiB", pin=False) as llm:
        assert llm.generate("The sea", max_tokens=8, temperature=0).tokens == result.tokens
    told = subprocess.run(
        [Path(sys.executable).parent / "flashllm", "--version"], capture_output=True, text=True
    )
    assert told.stdout.split() == ["flashllm", flashllm.__version__], told
    print(f"{sys.version.split()[0]}: wheel works from {home.parent}: {result.text!r}")


if __name__ == "__main__":
    main()
