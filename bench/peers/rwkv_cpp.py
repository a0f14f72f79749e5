"""rwkv.cpp: its shared library, and the FP16 file that our container was converted from, by path.

It has no file of its own for bf16 weights, so those are run as FP16; integers are quantised by its
own quantiser, which leaves embedding, head and the low-rank matrices as they are in the FP16 file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flashllm.container import open_container
from flashllm.errors import UnsupportedError

from .base import Job, Peer, run_script

CHILD = "rwkv_cpp_child.py"
# weight type of our container -> theirs; None: the FP16 file itself
TYPES = {"int8": "Q8_0", "int4": "Q4_0", "bf16": None, "f16": None}


class RWKVCpp(Peer):
    name = "rwkv.cpp"

    def __init__(self, library: str | None, source: str | None):
        self._library, self._source = library, source

    def available(self) -> str | None:
        if self._library is None or self._source is None:
            return "no rwkv.cpp library and FP16 file were given"
        for path in (self._library, self._source):
            if not Path(path).is_file():
                return f"{Path(path).name} is not a file"
        return None

    def prepare(self, model: Path, folder: Path) -> Path:
        with open_container(model) as container:
            types = {piece.weight_type for piece in container.planes["layers.0.deciding"].pieces}
        ours = types.pop()
        if ours not in TYPES:
            raise UnsupportedError(f"rwkv.cpp has no type like {ours}")
        theirs = TYPES[ours]
        if theirs is None:
            return Path(str(self._source))
        file = folder / f"{model.stem}.{theirs}.bin"
        if not file.exists():
            run_script(sys.executable, CHILD, self._library, "quantise", self._source, file, theirs)
        return file

    def difference(self, file: Path) -> str:
        kind = file.suffixes[0][1:] if len(file.suffixes) > 1 else "FP16"
        small = "" if kind == "FP16" else "; head and embedding FP16"
        return f"{kind}, {file.stat().st_size / 2**20:.0f} MiB{small}; loads the whole file"

    def command(self, file: Path, job: Job) -> list[str]:
        return [
            sys.executable, str(Path(__file__).with_name(CHILD)), str(self._library), "run",
            str(file), "--prompt", ",".join(map(str, job.prompt)), "--tokens", str(job.tokens),
            "--threads", str(job.threads),
        ]  # fmt: skip
