"""Make each break of MUTATIONS.md again, alone, in a copy of the tree, and see that its tests fail.

    python tests/mutate.py [NAME ...]

Prints what caught each; the exit status is the number of breaks that nothing caught.  Breaks in C
are built (about half a minute each).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("flashllm", "ext", "tests", "bench", "traces", "docs")
LONGEST_S = 1800  # of one break's tests
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@dataclass(frozen=True)
class Break:
    """`old` stands once in `file` and becomes `new`; one of `tests` must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BREAKS = {
    "drop a pin": Break(
        "ext/fl_slots.c", "s->pins[slot]++;", ";",
        ("test_offload_store.py", "test_offload_taking.py"),
    ),
    "evict the hottest": Break(
        "ext/fl_slots.c", "by->heat[a] > by->heat[b]", "by->heat[a] < by->heat[b]",
        ("test_offload_taking.py",),
    ),
    "leave what was lent": Break(
        "ext/fl_bring.c", "if (b->frame_slot[frame] < 0) b->addresses[frame] = 0;", ";",
        ("test_offload_arriving.py",),
    ),
    "read all waves to one half": Break(
        "ext/fl_bring.c", "b->targets, b->halves[wave % 2],", "b->targets, b->halves[0],",
        ("test_offload_arriving.py",),
    ),
    "end a request twice": Break(
        "ext/fl_request.c", "r->take.n = 0;", ";", ("test_offload_arriving.py",),
    ),
    "lend a run of another place": Break(
        "ext/_core.pyx", "stage.shift = stage.address - <uint64_t>run.offset",
        "stage.shift = stage.address", ("test_offload_runs.py",),
    ),
    "leave runs beside one that is refused": Break(
        "ext/_core.pyx", "end_runs(stages[:i])\n                failure.extent", "failure.extent",
        ("test_offload_runs.py",),
    ),
    "record neurons with what was prepared before": Break(
        "flashllm/models/begun_ffn.py",
        "        self._prepared(layer, x)\n        with", "        with", ("test_approximate.py",),
    ),
    "what is read ahead first": Break(
        "ext/fl_reader.c", "while (*at && !(*at)->is_ahead)", "while (*at)",
        ("test_storage_retries.py",),
    ),
    "columns of a down projection for its rows": Break(
        "flashllm/models/base.py", "transposed=not tensors[\"down\"].transposed",
        "transposed=tensors[\"down\"].transposed", ("test_ffn_by_rows.py",),
    ),
    "dot with what was prepared before": Break(
        "flashllm/models/approximate.py",
        "self.kernels.prepared(self.activations, x, self._deciding_view(layer))", "pass",
        ("test_approximate.py",),
    ),
    "leak a slot": Break(
        "flashllm/offload/taking.py", "segment.abandon(placed[~arrived])",
        "segment.unpin(placed[~arrived])", ("test_offload_faults.py",),
    ),
    "skip a checksum": Break(
        "ext/fl_reader.c", "if (found != c->digest) {", "if (0 && found != c->digest) {",
        ("test_storage_contract.py", "test_native_fuzz.py"),
    ),
    "forget an fsync": Break(
        "flashllm/container/writer.py", "self._file.sync(os.fsync)",
        "self._file.sync(lambda fd: None)", ("test_container_writer.py",),
    ),
    "map instead of read": Break(
        "flashllm/storage/pread.py", "_core.READ_PREAD", "_core.READ_MMAP",
        ("test_storage_contract.py",),
    ),
    "miscount scratch": Break(
        "flashllm/models/scratch.py", "return 4 * max_tokens", "return 2 * max_tokens",
        ("test_planning.py",),
    ),
    "swallow an errno": Break(
        "ext/fl_source.c", "error != EIO || n_hard++", "error != EIO && n_hard++",
        ("test_storage_retries.py",),
    ),
    "off by one in a bound": Break(
        "ext/fl_reader.c", "(size_t)b->iov_start[e + 1] > b->n_iov ||",
        "(size_t)b->iov_start[e + 1] > b->n_iov + 1 ||",
        ("test_native_fuzz.py", "test_storage_contract.py"),
    ),
    "leave a gap out of a scattered read": Break(
        "ext/fl_frames.c", "s->trash, (int64_t)gap);", "s->trash, (int64_t)gap / 4);",
        ("test_storage_contract.py",),
    ),
    "believe a frame's number": Break(
        "ext/fl_frames.c", "(size_t)frame < t->n_frames", "(size_t)frame <= t->n_frames",
        ("test_offload_planner.py", "test_storage_contract.py"),
    ),
    "join one frame too many": Break(
        "ext/fl_frames.c", "first[e] >= max_frames", "first[e] > max_frames",
        ("test_offload_planner.py",),
    ),
    "wrong seed in the checksum": Break(
        "ext/fl_reader.c", "fl_xxh64(c->address, c->length, c->seed)",
        "fl_xxh64(c->address, c->length, 0)", ("test_offload_store.py",),
    ),
    "ignore the cap in prefill: the chunk": Break(
        "flashllm/planning.py", "    chunk = _most(costs.chunk, LEAST_CHUNK, chunk, spare // 8)\n",
        "", ("test_planning.py",),
    ),
    "ignore the cap in prefill: results": Break(
        "flashllm/assembly/plan.py", "    if needed > plan.ledger.budget_bytes:\n",
        "    if False:\n", ("test_api.py",),
    ),
    "give nothing back": Break(
        "flashllm/cache/arena.py", 'if length and self._advise(start, length, "MADV_DONTNEED"):',
        "if length and False:", ("test_resize.py",),
    ),
    "a wrong address": Break(
        "flashllm/cache/segment.py",
        "self.addresses[self.slot_frame[slots]] = self.slot_address[slots]",
        "self.addresses[self.slot_frame[slots]] = self.slot_address[slots] + np.uint64(64)",
        ("test_offload_store.py",),
    ),
    "grow beyond what the user gave": Break(
        "flashllm/governor.py", "self.budget = min(self.most, ", "self.budget = max(0, ",
        ("test_governor.py",),
    ),
    "look at CPUID alone": Break(
        "ext/fl_dispatch.c", "if ((x->xcr0 & XCR0_AVX512) != XCR0_AVX512)", "if (0)",
        ("test_kernels_native.py",),
    ),
    "let another's handler stand": Break(
        "ext/fl_guard.c", "if (!is_ours(&now)) {", "if (0) {", ("test_storage_guard.py",),
    ),
    "two generations on one handle": Break(
        "flashllm/api.py", "if not self._lock.acquire(blocking=False):",
        "if self._lock.acquire(blocking=False) is None:", ("test_api.py",),
    ),
    "trust a file that was replaced": Break(
        "flashllm/container/reader.py", "if _identity(fd) != self._opened:", "if False:",
        ("test_container_damage.py",),
    ),
    "leave mapped what a fault maps around": Break(
        "ext/fl_source.c", "    start = start / FL_BLOCK_BYTES * FL_BLOCK_BYTES;\n"
        "    stop = (stop + FL_BLOCK_BYTES - 1) / FL_BLOCK_BYTES * FL_BLOCK_BYTES;\n", "",
        ("test_storage_blocks.py",),
    ),
    "state a floor without the ring": Break(
        "flashllm/planning.py", "floor = base + (min(least_ring, whole) if keep else least_ring)",
        "floor = base", ("test_planning.py", "test_cap_budget.py"),
    ),
    "open the file for oneself alone": Break(
        "flashllm/regular.py", "fd = os.open(path, _FLAGS)",
        "fd = os.open(path, _FLAGS)\n        __import__('fcntl').flock(os.dup(fd), 6)",
        ("test_lifetime.py::test_four_processes_one_file",),
    ),
    "go on in a forked child": Break(
        "ext/fl_reader.c", "return r->pid != getpid(); }", "return r->pid == 0; }",
        ("test_lifetime.py::test_a_forked_child_is_told_and_the_parent_goes_on",),
    ),
    "wait without looking up": Break(
        "ext/fl_reader.c", "        if (late) {", "        if (late && r->closed) {",
        ("test_fuse_faults.py::test_a_read_that_does_not_come_back",),
    ),
    "keep the descriptor": Break(
        "ext/fl_source.c", "    if (s->fd >= 0)\n        close(s->fd);\n", "",
        ("test_storage_contract.py::test_descriptors_are_given_back",),
    ),
    "add experts in another order": Break(
        "flashllm/models/moe.py", "for row in sums:", "for row in sums[::-1]:",
        ("test_models_moe.py",),
    ),
    "believe a prefetch that failed": Break(
        "flashllm/offload/advice.py",
        "            self.drop_prefetch(state)\n            return False\n        finally:",
        "        finally:", ("test_offload_faults.py", "test_offload_store.py"),
    ),
    "no limit where there are no groups": Break(
        "flashllm/stress/reporting.py", "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))",
        "resource.getrlimit(resource.RLIMIT_DATA)", ("test_stress.py",),
    ),
    "count nothing without /proc": Break(
        "flashllm/probe/process.py", 'if not found["rss"]:', "if False:",
        ("test_hostile_places.py::test_memory_without_proc",),
    ),
    "count page cache as in use": Break(
        "flashllm/probe/memory.py",
        "return max(self.limit - max(self.usage - self.reclaimable, 0), 0)",
        "return max(self.limit - self.usage, 0)", ("test_probe_memory.py",),
    ),
    "let a prompt run over the context": Break(
        "flashllm/engine/engine.py", "if ids.size > room:", "if False:",
        ("test_api.py::test_an_overlong_prompt_names_both_numbers",),
    ),
    "let ranges overlap": Break(
        "flashllm/checkpoints/safetensors.py", "if entry.begin != end:", "if entry.begin > end:",
        ("test_checkpoints_safetensors.py",),
    ),
    "no least size": Break(
        "flashllm/models/fields.py",
        "if not low <= value <= high:\n", "if value > high:\n",
        ("test_models_config.py",),
    ),
    "believe the config": Break(
        "flashllm/models/shapes.py", "        if expected != found:", "        if False:",
        ("test_models_shapes.py",),
    ),
    "believe a token's length": Break(
        "flashllm/tokenization/world.py", "if len(token) != int(match[3]) or not token:",
        "if not token:", ("test_tokenization_world.py",),
    ),
    "let a bomb off": Break(
        "flashllm/codecs/zstd.py", "if found.content_size != n_bytes or n_bytes == 0:",
        "if n_bytes == 0:", ("test_codecs_hostile.py",),
    ),
    "verify without looking": Break(
        "flashllm/container/verification.py",
        "_xxh64_check(plane.seed(frame), digest, check_items(frame))", "check_items(frame)",
        ("test_container_damage.py::test_every_flipped_byte_is_noticed",),
    ),
    "seed without the place": Break(
        "flashllm/container/base.py", "return (file_id + offset) % 2**64",
        "return file_id % 2**64", ("test_container_damage.py",),
    ),
    "open whatever lies there": Break(
        "flashllm/regular.py", "if not stat.S_ISREG(mode):", "if False:",
        ("test_container_hostile.py", "test_checkpoints_safetensors.py"),
    ),
    "forget the directory": Break(
        "flashllm/durable.py", "        os.fsync(fd)\n", "        pass\n",
        ("test_container_writer.py::test_the_order_of_durability",),
    ),
    "carry on after a sync that failed": Break(
        "flashllm/container/partial.py",
        "            self.remove()\n            raise ConversionError(f\"{self.final}: sync failed",
        "            pass\n        if False:\n            error = None\n"
        "            raise ConversionError(f\"{self.final}: sync failed",
        ("test_container_writer.py::test_failed_sync_leaves_nothing",),
    ),
    "leave what was read in the page cache": Break(
        "flashllm/storage/direct.py", "flags | os.O_DIRECT", "flags", ("test_storage_contract.py",)
    ),
    "map more than is needed": Break(
        "flashllm/cache/arena.py", "max(self.n_bytes, REGION_ALIGNMENT), **kind)",
        "max(self.n_bytes, REGION_ALIGNMENT) + 2**30, **kind)",
        ("test_file_changes.py::test_no_large_mappings",),
    ),
    "leave the source in the page cache": Break(
        "flashllm/checkpoints/files.py", "self._drop(offset + done, n_read)", "pass",
        ("test_checkpoints_safetensors.py", "test_conversion_interrupted.py"),
    ),
    "believe that memory was given": Break(
        "ext/fl_reader.c", "    fl_ticket *t = calloc(1, state_at + n_extents);\n\n    if (!t)",
        "    fl_ticket *t = calloc(1, state_at + n_extents);\n\n    if (0)", ("test_no_memory.py",),
    ),
    "a product that wraps": Break(
        "flashllm/checkpoints/safetensors.py",
        "n_bytes = math.prod(shape) * _DTYPE_BYTES[dtype]  #",
        "n_bytes = math.prod(shape) * _DTYPE_BYTES[dtype] % 2**32  #",
        ("test_checkpoints_safetensors.py",),
    ),
    "believe the size that is stated": Break(
        "flashllm/container/header.py", "stated_bytes == file_bytes,", "True,",
        ("test_container_damage.py", "test_container_hostile.py"),
    ),
    "round what should be kept": Break(
        "flashllm/conversion/layout.py",
        'return kinds.pop() if len(kinds) == 1 and kinds <= {"f16", "bf16", "f32"} else "f32"',
        'return "f16"', ("test_conversion_convert.py::test_keep_is_exact",),
    ),
    "take an interruption for an error": Break(
        "ext/fl_source.c", "const int soft = error == EINTR || error == EAGAIN;",
        "const int soft = error == EAGAIN;", ("test_storage_retries.py",),
    ),
    "write under the final name": Break(
        "flashllm/durable.py", 'final.with_name(final.name + ".partial")',
        "final.with_name(final.name)", ("test_durable.py", "test_container_writer.py"),
    ),
    "begin on a full disk": Break(
        "flashllm/container/partial.py", "if needed > free:", "if False:",
        ("test_container_writer.py", "test_disk_faults.py::test_a_full_disk_is_known_at_the_start"),
    ),
    "believe every recording": Break(
        "flashllm/models/repeats.py", "if all(a.tobytes() == b.tobytes()",
        "if True or all(a.tobytes() == b.tobytes()", ("test_repeats.py",),
    ),
    "repeat a position": Break(
        "ext/fl_calls.c", "if (position >= 0) t.attention.first_position = position;", "",
        ("test_repeats.py",),
    ),
    "repeat what streams now": Break(
        "flashllm/offload/store.py", "self.n_resized += 1", "pass", ("test_repeats.py",),
    ),
    "lend and keep": Break(
        "flashllm/engine/room.py", "        self._follow()()\n", "",
        ("test_room.py", "test_cap_budget.py::test_what_a_sequence_lends"),
    ),
    "lend what is held": Break(
        "flashllm/models/pages.py", "first, last = -(-(starts + held_bytes) // PAGE)",
        "first, last = (starts + held_bytes) // PAGE", ("test_room.py",),
    ),
    "keep the handle of a dropped stream": Break(
        "flashllm/api.py", "        self._lock.release()", "        del exc_info",
        ("test_lifetime.py::test_a_dropped_stream_frees_the_handle",),
    ),
}  # fmt: skip


def copy_tree(folder: Path) -> None:
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)
    if (ROOT / "build").exists():  # so that a break in C compiles one file
        shutil.copytree(ROOT / "build", folder / "build")


def caught_by(folder: Path, one: Break) -> str | None:
    """The first failing test under the break, or None."""
    path = folder / one.file
    text = path.read_text()
    if text.count(one.old) != 1:
        raise SystemExit(f"{one.file}: {one.old!r} stands there {text.count(one.old)} times")
    path.write_text(text.replace(one.old, one.new))
    try:
        if one.file.startswith("ext/"):
            build(folder)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                   *(f"tests/{name}" for name in one.tests)]  # fmt: skip
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=LONGEST_S,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:  # a test that hangs says nothing, and others must run
        return None
    finally:
        path.write_text(text)
        if one.file.startswith("ext/"):
            os.utime(path)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0:
        return None
    return failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}"


def build(folder: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)


def main(names: list[str]) -> int:
    missed, in_c = 0, False
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder))
        for name in names or BREAKS:
            if in_c and not BREAKS[name].file.startswith("ext/"):
                build(Path(folder))
            in_c = BREAKS[name].file.startswith("ext/")
            found = caught_by(Path(folder), BREAKS[name])
            print(f"{name}: {found or 'NOT CAUGHT'}", flush=True)
            missed += found is None
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
