"""How much to guess ahead: what was asked for, and what times say about it while it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError

MOST = 8  # tokens of a draft under "auto"
MOST_ASKED = 64
TRIAL = 3  # verified passes before they are judged, and passes without a draft to judge them by
REST, LONGEST_REST = 16, 256  # tokens without a draft after a loss; doubled by every further one
DECAY = 0.9  # weight of what is known against one more pass: about ten passes are remembered
MARGIN = 1.05  # a draft must be this much faster


@dataclass(frozen=True)
class Drafts:
    """What was asked for: drafts of up to `most` tokens (0: none), where they pay or `always`."""

    most: int = 0
    always: bool = False

    @classmethod
    def of(cls, asked: object) -> Drafts:
        """"off", "auto", or a number of tokens to draft whatever it costs."""
        if asked == "off":
            return cls()
        if asked == "auto":
            return cls(MOST)
        if isinstance(asked, str) and asked.isdecimal():
            asked = int(asked)
        if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= MOST_ASKED:
            raise UsageError(
                f"speculate must be off, auto or a number from 1 to {MOST_ASKED}, not {asked!r}"
            )
        return cls(asked, always=True)

    def __str__(self) -> str:
        return (str(self.most) if self.always else "auto") if self.most else "off"


NO_DRAFTS = Drafts()


@dataclass
class Pace:
    """Decides from times alone: whether to draft, and how much.

    Decayed sums: nanoseconds and tokens of passes of one token, and of verified drafts.
    """

    most: int
    always: bool = False  # draft whatever it costs
    length: int = 0  # of the next draft
    plain_ns: float = 0.0
    n_plain: float = 0.0
    drafted_ns: float = 0.0
    n_gained: float = 0.0
    n_trials: int = 0
    rest: int = 0  # tokens to go without a draft
    next_rest: int = REST
    n_losses: int = 0

    def __post_init__(self) -> None:
        self.length = self.most if self.always else min(self.most, MOST // 2)

    def wanted(self) -> int:
        """The tokens to draft now; 0 while the other way must be measured or has won."""
        if self.always:
            return self.most
        return self.length if self.rest == 0 and self.n_plain >= TRIAL * DECAY**TRIAL else 0

    def plain(self, ns: int) -> None:
        """A pass of one token took so long."""
        self.plain_ns = DECAY * self.plain_ns + ns
        self.n_plain = DECAY * self.n_plain + 1
        self.rest = max(0, self.rest - 1)

    def verified(self, ns: int, *, drafted: int, accepted: int) -> None:
        """A pass with a draft took so long, and brought one token more than it accepted."""
        self.drafted_ns = DECAY * self.drafted_ns + ns
        self.n_gained = DECAY * self.n_gained + 1 + accepted
        self.n_trials += 1
        if not self.always:
            longer = 2 * drafted if accepted == drafted else accepted + 1
            self.length = min(self.most, max(1, longer))
            if self.n_trials >= TRIAL:
                self._judge()

    def _judge(self) -> None:
        if self.drafted_ns * self.n_plain * MARGIN <= self.plain_ns * self.n_gained:
            self.next_rest = REST
            return
        self.n_losses += 1
        self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, LONGEST_REST)
        self.drafted_ns = self.n_gained = self.n_trials = 0
        self.length = min(self.most, MOST // 2)
