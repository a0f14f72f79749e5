"""A cache of frames as it is easily told: dictionaries, one frame at a time, sorting everything."""

from __future__ import annotations


def slow_misses(
    steps, n_slots: int, name: str, k: int = 5, decay: float = 0.99
) -> list[tuple[int, int]]:
    """(clock, frame) of every miss of policy `name` over the frames wanted in each step.

    Hits stay, victims go by rank; of more misses than slots those least recently used find none.
    """
    slot_of: dict[int, int] = {}
    uses: dict[int, list[int]] = {}  # slot -> clocks of use since its frame came
    last: dict[int, int] = {}
    missed = []
    for clock, wanted in enumerate(steps):
        wanted = [int(f) for f in wanted]
        hits = [f for f in wanted if f in slot_of]
        missing = [f for f in wanted if f not in slot_of]
        missed += [(clock, f) for f in missing]
        for f in hits:
            uses[slot_of[f]].append(clock)

        def rank(f, clock=clock):
            slot = slot_of[f]
            if name == "lru":
                key = uses[slot][-1]
            elif name == "window":
                key = max(0, uses[slot][-1] - (clock - k))
            elif name == "lfu":
                key = sum(decay ** (clock - c) for c in uses[slot])
            else:
                key = -next((c for c in range(clock + 1, len(steps)) if f in steps[c]), len(steps))
            return (round(key, 9), slot)

        n_evict = max(0, len(missing) - (n_slots - len(slot_of)))
        for f in sorted((f for f in slot_of if f not in wanted), key=rank)[:n_evict]:
            del uses[slot_of.pop(f)]
        free = [s for s in range(n_slots) if s not in slot_of.values()]
        chosen = sorted(missing, key=lambda f: (-last.get(f, -1), missing.index(f)))[: len(free)]
        for f, slot in zip(sorted(chosen), free, strict=False):
            slot_of[f] = slot
            uses[slot] = [clock]
        last |= dict.fromkeys(wanted, clock)
    return missed
