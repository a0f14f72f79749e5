"""How the parts are put together: the helper of `api`, and of the verbs that only plan."""

from __future__ import annotations

from .estimating import Estimate, estimate
from .lending import Lending
from .opening import Parts, generation_config, load_tokenizer, make_floors, open_parts, read_config
from .plan import admit_result, open_floor
from .wishes import budget_bytes

__all__ = [
    "Estimate",
    "Lending",
    "Parts",
    "admit_result",
    "budget_bytes",
    "estimate",
    "generation_config",
    "load_tokenizer",
    "make_floors",
    "open_floor",
    "open_parts",
    "read_config",
]
