"""The ledger: every byte of the RAM budget, by name; the lines sum exactly to the budget.

Required lines are charged first; together they are the floor, and a budget below the floor is
refused by name.  What is left is granted to optional lines, and the rest becomes a line of its
own.  The ledger only counts: what the kernel measures is compared with it elsewhere.
"""

from __future__ import annotations

from ..errors import BudgetError
from ..units import KIB, MIB

# A thread's touched stack and its kernel stack.
THREAD_BYTES = 144 * KIB


class Ledger:
    """Named byte lines under one budget, in the order in which they were charged."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self._lines: dict[str, int] = {}
        self._notes: dict[str, str] = {}
        self._floor_bytes = 0

    def charge(self, name: str, n_bytes: int, *, note: str = "") -> None:
        """A line that must be there; part of the floor.  Refusal waits for `require`, which
        knows the whole floor."""
        self._add(name, n_bytes, note)
        self._floor_bytes += n_bytes

    def require(self, why: str = "") -> None:
        """BudgetError naming the floor when the required lines do not fit the budget."""
        if self._floor_bytes > self.budget_bytes:
            raise BudgetError(self.budget_bytes, self._floor_bytes, why)

    def grant(self, name: str, n_bytes: int, *, note: str = "") -> None:
        """An optional line; the caller has looked at `left_bytes`."""
        if n_bytes > self.left_bytes:
            raise AssertionError(f"ledger line {name!r} of {n_bytes}: {self.left_bytes} are left")
        self._add(name, n_bytes, note)

    def settle(self, name: str = "unused") -> None:
        """Put what is left on a line, so that the sum is the budget."""
        self.require()
        self._add(name, self.left_bytes, "")
        self.check()

    def _add(self, name: str, n_bytes: int, note: str) -> None:
        if n_bytes < 0 or n_bytes != int(n_bytes):
            raise AssertionError(f"ledger line {name!r} of {n_bytes} bytes")
        if name in self._lines:
            raise AssertionError(f"ledger line {name!r} charged twice")
        self._lines[name] = int(n_bytes)
        if note:
            self._notes[name] = note

    @property
    def floor_bytes(self) -> int:
        """Sum of the required lines so far."""
        return self._floor_bytes

    @property
    def left_bytes(self) -> int:
        """What no line has taken; negative before `require` has refused."""
        return self.budget_bytes - sum(self._lines.values())

    def __getitem__(self, name: str) -> int:
        return self._lines[name]

    def lines(self) -> dict[str, int]:
        return dict(self._lines)

    def check(self) -> None:
        """The lines sum exactly to the budget."""
        total = sum(self._lines.values())
        if total != self.budget_bytes:
            raise AssertionError(
                f"ledger lines sum to {total}, the budget is {self.budget_bytes}: {self._lines}"
            )

    def render(self) -> str:
        """The ledger as text: one line per name, bytes and MiB, then the sum."""
        rows = [*self._lines.items(), ("total", sum(self._lines.values()))]
        width = max(len(name) for name, _ in rows)
        digits = max(len(f"{n:,}") for _, n in rows)
        text = []
        for name, n in rows:
            note = f"  {self._notes[name]}" if name in self._notes else ""
            text.append(f"{name:<{width}}  {n:>{digits},} B  {n / MIB:>10.2f} MiB{note}")
        return "\n".join([*text[:-1], "-" * (width + digits + 20), text[-1]])
