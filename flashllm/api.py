"""The only composer: storage -> container -> store -> model -> engine, closed in reverse.

    from flashllm import LLM
    with LLM("model.flash", ram_budget="512MiB") as llm:
        print(llm.generate("Once upon a time").text)

A handle serves one generation at a time; a second one raises BusyError.  Handles are independent.
`resize`, `cancel` and `close` may be called while one is in flight, from any thread.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import numpy as np

from . import assembly
from .engine.engine import Engine
from .engine.group import Group
from .engine.request import Request
from .engine.results import Delta, Result
from .engine.sampling import SamplingParams
from .engine.snapshot import Snapshot
from .engine.totals import Totals
from .engine.turns import Turns
from .errors import BusyError, ClosedError, UsageError
from .governor import Governor, Source
from .planning import Plan, lent, needing_more, replan
from .predictors import Predictor
from .probe.memory import automatic_budget
from .settings import resolve
from .tokenization import no_tokenizer

Prompt = str | Sequence[int] | np.ndarray


class LLM:
    """An open model inside a RAM budget.

    `path`: a .flash container.  `ram_budget`: bytes, text such as "512MiB", or "50%" of the
    container file; it is the whole process as the kernel charges it (see docs/MEMORY.md); None
    means FLASHLLM_RAM_BUDGET, else what this machine leaves us.  `storage`: auto, direct, pread or
    mmap.  `n_context`: most tokens of one sequence.  `num_threads`: compute threads.  `kernels`:
    a kernel set's name.  `pin=False` keeps no weight in memory: every token reads all of them (the
    naive mode of benchmarks).  `mode`: exact (default), or approx: prompts are exact, decoding
    computes only the neurons that are predicted, by what was fitted to the container (MODEL.fit) at
    `recall` or by `predictors` (layer -> Predictor); recall is measured on the first and every
    `audit`-th decoded token.  Where no neuron is exactly zero (SiLU, GELU) `density` says what
    share of them to compute.  `speculate`: "auto" drafts tokens from the text so far and verifies
    them in one pass where that pays, a number drafts so many always; no token depends on it.
    `governor=True` gives memory back under memory pressure and takes it again slowly
    (docs/MEMORY.md); a source of pressure is followed instead of the kernel's.
    `reserve_bytes` of the budget are the caller's own, a line of the plan.
    `progress(done, total, label)` is called while loading and in prefill, `on_plan(plan)` before
    anything is loaded.

    Raises BudgetError below the floor, FormatError for a bad file, UnsupportedError for a backend
    or kernel set that this machine lacks.
    """

    def __init__(
        self,
        path: str,
        *,
        ram_budget: int | str | None = None,
        storage: str | None = None,
        n_context: int | None = None,
        num_threads: int | None = None,
        kernels: str | None = None,
        kv_type: str | None = None,
        prefill_chunk: int | None = None,
        io_depth: int | None = None,
        io_engine: str | None = None,
        policy: str | None = None,
        mode: str | None = None,
        recall: float | None = None,
        density: float | None = None,
        predictors: Mapping[int, Predictor] | None = None,
        audit: int | None = None,
        speculate: str | int | None = None,
        reserve_bytes: int = 0,
        pin: bool = True,
        debug: bool | None = None,
        governor: bool | Source | None = None,
        progress: Callable[[int, int, str], None] | None = None,
        on_plan: Callable[[Any], None] | None = None,
    ):
        started = time.perf_counter()
        self._lock = threading.Lock()
        self._turns = Turns()
        self._cancel = threading.Event()
        self._progress = progress
        self._request_now: Request | None = None
        self._stack: ExitStack | None = None
        self._governor: Governor | None = None
        with ExitStack() as stack:
            parts = assembly.open_parts(
                path,
                stack,
                ram_budget=ram_budget,
                storage=storage,
                n_context=n_context,
                num_threads=num_threads,
                kernels=kernels,
                kv_type=kv_type,
                prefill_chunk=prefill_chunk,
                io_depth=io_depth,
                io_engine=io_engine,
                policy=policy,
                mode=mode,
                recall=recall,
                density=density,
                predictors=predictors,
                audit=audit,
                speculate=speculate,
                reserve_bytes=reserve_bytes,
                pin=pin,
                debug=debug,
                on_plan=on_plan,
            )
            self.container, self.plan, self.tokenizer = parts.container, parts.plan, parts.tokenizer
            self.config, self.store, self.kernels = parts.config, parts.store, parts.kernels
            self.choice, self.model, self.memory = parts.choice, parts.model, parts.memory
            self.floors = assembly.make_floors(parts)
            self.io_engine = parts.io_engine
            self._engine = Engine(
                parts.model, parts.store, parts.state, drafts=parts.drafts, check=parts.check
            )
            self._opened_plan, self._kv_dtype = self.plan, parts.kv_dtype
            if self.plan.lends:
                self._engine.room.lend(weakref.WeakMethod(self._follow_room))
                self._keep(self._opened_plan, self.ram_budget, fill=False)
            self.store.load(progress)
            self._lending = assembly.Lending(parts)
            wanted = resolve("governor", governor).value
            if wanted:
                self._governor = Governor(
                    weakref.WeakMethod(self._follow), floor=assembly.open_floor(self._opened_plan),
                    most=self.ram_budget, free_bytes=lambda: automatic_budget().n_bytes,
                    source=None if wanted is True else wanted,
                )  # fmt: skip
                weakref.finalize(self, self._governor.close)
            self._stack = stack.pop_all()
        self.load_ms = (time.perf_counter() - started) * 1e3

    # -- lifetime

    def close(self) -> None:
        """Release memory, threads and descriptors; safe to call twice.

        A generation in flight ends as cancelled after its current token.
        """
        stack, self._stack = self._stack, None
        if stack is not None:
            self._cancel.set()
            if self._governor is not None:
                self._governor.close()
            self._turns.between(stack.close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End the generation in flight after its current token (from another thread)."""
        self._cancel.set()

    def resize(self, ram_budget: int | str) -> None:
        """Give this engine another budget while it is open, at once or before the next token.

        Weights are dropped from memory, or read into it again up to what was kept at open; the
        context and everything else stays as it was allocated.  No token depends on it.  When this
        returns the kernel has been given its pages back, and `plan` is the new plan.  Called in
        the middle of a step of the same thread (a signal handler, a callback) it takes effect
        when that step ends.

        Raises BudgetError, and changes nothing, below the floor of the open engine.
        """
        if self._stack is None:
            raise ClosedError("this LLM was closed")
        budget = assembly.budget_bytes(ram_budget, self.container.size)
        self._change(budget, lambda: True)
        if self._governor is not None:
            self._governor.set_most(budget)

    def _follow(self, budget: int) -> None:
        """The governor's resize; of no effect when the user has asked for less meanwhile."""
        self._change(budget, lambda: budget <= self._governor.most)

    def _change(self, budget: int, wanted: Callable[[], bool]) -> None:
        replan(self._opened_plan, budget)  # raises here even where `between` cannot

        def change() -> None:
            if wanted():
                self._follow_plan(self._opened_plan, budget)

        self._turns.between(change)

    def _follow_plan(self, opened: Plan, budget: int) -> None:
        """Be an engine that was opened with this plan, under this budget."""
        if self._stack is None:
            raise ClosedError("this LLM was closed")
        self._keep(opened, budget)

    def _follow_room(self) -> None:
        """The sequence has more or less of the memory that was planned for it."""
        self._keep(self._opened_plan, self.ram_budget)

    def _keep(self, opened: Plan, budget: int, *, fill: bool = True) -> None:
        self.plan = plan = replan(lent(opened, self._engine.room.spare()), budget)
        self.store.resize(plan.resident, ring_stages=plan.ring_stages, fill=fill)

    # -- what it says about itself

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def n_context(self) -> int:
        return self.plan.n_context

    @property
    def mode(self) -> str:
        return "exact" if self.model.approximation is None else "approx"

    @property
    def ram_budget(self) -> int:
        return self.plan.ledger.budget_bytes

    @property
    def totals(self) -> Totals:
        """Sums over the steps of the request in flight, or the last one."""
        return self._request_now.totals if self._request_now is not None else Totals()

    def live(self) -> dict[str, Any]:
        """The `flash` figures of the request in flight (or the last one), plus `rss` now and what
        the governor did, where there is one."""
        figures = self._request_now.figures() if self._request_now is not None else {}
        if self._governor is not None:
            figures = {**figures, "governor": self._governor.figures()}
        return {**figures, "rss": self.memory.rss()}

    # -- generation

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        state: Snapshot | None = None,
        **sampling: Any,
    ) -> Result | list[Result]:
        """Complete one prompt (text or token ids) or a list of them.

        Keyword arguments are SamplingParams' fields and win over `params`.  With `state`, each
        prompt goes on where `save_state` was called, as if it had all been said at once.

        The prompts of a list share each pass over the weights, every one with the tokens it would
        have alone; `params` may be a list too.  Their states take memory that kept weights give up
        meanwhile: as many run together as fit (`flash["sequences"]`; `flash["sequences_limit"]`
        says what stood against more).  A list is cancelled as a whole.
        """
        if _is_batch(prompt):
            listed = params if isinstance(params, Sequence) else [params] * len(prompt)
            if len(listed) != len(prompt):
                raise UsageError(f"{len(listed)} params for {len(prompt)} prompts")
            each = [SamplingParams.from_kwargs(one, **sampling) for one in listed]
            requests = [
                self._request(*pair, state) for pair in zip(prompt, each, strict=True)
            ]
            self._run_all(requests)
            return [request.result for request in requests]
        if isinstance(params, Sequence):
            raise UsageError("a list of params is for a list of prompts")
        request = self._request(prompt, SamplingParams.from_kwargs(params, **sampling), state)
        for _ in self._deltas(request):
            pass
        return request.result

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        state: Snapshot | None = None,
        **sampling: Any,
    ) -> Iterator[Delta]:
        """Yield text as it becomes known; the concatenation is `generate`'s text byte for byte.

        Each Delta is a str with `.tokens`; the last one carries `.finish_reason` and `.result`.
        """
        request = self._request(prompt, SamplingParams.from_kwargs(params, **sampling), state)
        return self._deltas(request)

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [n, vocab_size]: row i after ids[: i + 1].  Adds no BOS, needs no tokenizer.

        Raises BudgetError when the result would break the budget.
        """
        with self._exclusive(), self._step():
            self._engine.reset()
            ids = self._engine.check_ids(np.asarray(ids))
            n_bytes = 4 * ids.size * self.vocab_size
            assembly.admit_result(self.plan, self.memory, n_bytes)
            out = np.empty((ids.size, self.vocab_size), np.float32)
            self._engine.prefill(ids, Totals(), all_logits=out)
            return out

    def logit_pieces(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        piece_bytes: int,
        decoding: bool = False,
        totals: Totals | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """`logits` a piece at a time: (first row, float32 [k, vocab_size]) of at most
        `piece_bytes` (one row at least); each piece is valid until the next.

        With `decoding` all but the first id are taken in as decoding takes its tokens, which in
        approximate mode is another function.  What is read and computed is added to `totals`.
        """
        totals = Totals() if totals is None else totals
        with self._exclusive():
            self._engine.reset()
            ids = self._engine.check_ids(np.asarray(ids))
            step = max(1, piece_bytes // (4 * self.vocab_size))
            out = np.empty((min(step, ids.size), self.vocab_size), np.float32)
            for first in range(0, ids.size, step):
                part = ids[first : first + step]
                with self._step():
                    if decoding:
                        self._engine.follow(part, totals, out[: part.size])
                    else:
                        self._engine.prefill(part, totals, all_logits=out[: part.size])
                yield first, out[: part.size]

    def observe(
        self,
        ids: Sequence[int] | np.ndarray,
        observer: Callable[[int, np.ndarray, np.ndarray], None],
    ) -> None:
        """Take `ids` in afresh; `observer(layer, x, decided)` sees every sparse FFN's input and
        deciding pre-activations (models/ffn.py says what they are), chunk by chunk.

        What it keeps of them is the caller's to `lend`.
        """
        with self._exclusive():
            self._engine.reset()
            ids = self._engine.check_ids(np.asarray(ids))
            self.model.observer = observer
            try:
                self._engine.prefill(ids, Totals(), cancelled=self._cancel.is_set)
            finally:
                self.model.observer = None

    @contextmanager
    def lend(self, n_bytes: int) -> Iterator[None]:
        """Meanwhile the caller keeps `n_bytes` of this process inside the budget: kept weights give
        way to them, and come back.

        Raises BudgetError where they do not fit above the floor.
        """
        with self._lent(needing_more(self._opened_plan, "lent to the caller", n_bytes)):
            yield

    def save_state(self) -> Snapshot:
        """What the last sequence left in memory: a copy, to pass as `state=` or to `.save(path)`.

        The last token of a completion was not computed on yet; the copy remembers it as pending.
        A recurrent state has one size always, a KV cache that of its tokens.
        """
        with self._exclusive():
            length = self._engine.state.length
            views = self._engine.state.holding(length).values()
            assembly.admit_result(self.plan, self.memory, sum(view.nbytes for view in views))
            return self._engine.snapshot(self.container.digest)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of `text`; BOS as the tokenizer's own files say unless `add_bos` decides."""
        return self._tokenizer().encode(text, add_bos=add_bos)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer().decode(list(ids))

    # -- inside

    def _tokenizer(self):
        if self.tokenizer is None:
            raise no_tokenizer(self.container.path)
        return self.tokenizer

    def _exclusive(self):
        if self._stack is None:
            raise ClosedError("this LLM was closed")
        if not self._lock.acquire(blocking=False):
            raise BusyError("another generation is in flight on this handle")
        self._cancel.clear()
        return _Release(self._lock)

    @contextmanager
    def _step(self) -> Iterator[None]:
        """Nothing changes under the engine meanwhile, and it is open."""
        with self._turns.step():
            if self._stack is None:
                raise ClosedError("this LLM was closed")
            yield

    def _request(
        self, prompt: Prompt, params: SamplingParams, state: Snapshot | None = None
    ) -> Request:
        if state is not None and state.model != self.container.digest:
            raise UsageError("this state was saved by another model")
        ids = prompt
        if isinstance(prompt, str):
            ids = self.encode(prompt, add_bos=None if state is None else False)
        return Request(
            engine=self._engine,
            ids=ids,
            params=params,
            generation_config=assembly.generation_config(self.container),
            eos_ids=self.config.eos_ids,
            tokenizer=self.tokenizer,
            memory=self.memory,
            load_ms=self.load_ms,
            facts=self._facts(),
            cancelled=self._cancel.is_set,
            progress=self._progress,
            state=state,
            floors=self.floors.of,
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "ram_budget": self.ram_budget,
            "storage": self.choice.name,
            "io_engine": self.io_engine,
            "kernels": self.kernels.name,
            "prefill_chunk": self.plan.chunk,
            "speculate": str(self._engine.drafts),
            "sequences": 1,
            "sequences_limit": None,
        }

    def _deltas(self, request: Request) -> Iterator[Delta]:
        with self._exclusive():
            yield from self._run_one(request)

    def _run_one(self, request: Request) -> Iterator[Delta]:
        self._request_now = request
        yield from self._stepped(request.run())

    @contextmanager
    def _lent(self, plan: Plan) -> Iterator[None]:
        """Meanwhile the engine is one that was opened with `plan`: kept weights give way."""
        opened = self._opened_plan
        try:
            self._reopen(plan)
            yield
        except BaseException:
            # The traceback may hold what was lent: kept weights stay small until they are asked
            # for again, by the next loan or `resize`.
            self._opened_plan = opened
            raise
        with suppress(ClosedError):
            self._reopen(opened)

    def _stepped(self, steps: Iterator[Any]) -> Iterator[Any]:
        """A turn for each of the steps; after close() they are told that they are cancelled."""
        with closing(steps):
            while True:
                with self._turns.step():
                    out = next(steps, _END)
                if out is _END:
                    return
                yield out

    # -- a list of prompts

    def _run_all(self, requests: list[Request]) -> None:
        """As many together as fit, in order; the last one leaves its state to `save_state`."""
        with self._exclusive():
            while requests:
                opened, budget = self._opened_plan, self.ram_budget
                n, limit = self._lending.fitting(opened, budget, requests)
                group, requests = requests[:n], requests[n:]
                for request in group:
                    request.note(sequences=n, sequences_limit=limit)
                if n == 1:
                    for _ in self._run_one(group[0]):
                        pass
                else:
                    self._run_group(group)

    def _run_group(self, requests: list[Request]) -> None:
        self._request_now = requests[0]
        with self._lent(self._lending.with_states(self._opened_plan, requests)):
            self._share_passes(requests)

    def _share_passes(self, requests: list[Request]) -> None:
        states = [
            self.model.new_state(request.n_positions, self._kv_dtype) for request in requests[:-1]
        ]
        progress = self._progress
        group = Group(
            self._engine, requests, [*states, self._engine.state],
            cancelled=self._cancel.is_set,
            progress=progress and (lambda done, total: progress(done, total, "prompt")),
        )  # fmt: skip
        for _ in self._stepped(group.run()):
            pass

    def _reopen(self, opened: Plan) -> None:
        """Be an engine that was opened with this plan, under the present budget."""

        def change() -> None:
            self._follow_plan(opened, self.ram_budget)
            self._opened_plan = opened

        self._turns.between(change)


_END = object()  # of steps


class _Release:
    """Releases a lock that is already held."""

    def __init__(self, lock: threading.Lock):
        self._lock = lock

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


def _is_batch(prompt: Any) -> bool:
    """A list of prompts, as against one prompt given as text or as token ids."""
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 2
    if not isinstance(prompt, Sequence):
        raise UsageError(f"a prompt is text or token ids, not {type(prompt).__name__}")
    return bool(prompt) and isinstance(prompt[0], str | Sequence | np.ndarray)


__all__ = ["LLM", "SamplingParams", "Snapshot", "Result", "Delta"]
