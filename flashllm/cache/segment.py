"""A segment: one plane's slots, and the tables that say which frame lies where.

Knows frame numbers, slot numbers, addresses and pins; nothing of files, policies or what a frame
means.  Every verb works on arrays.  What stays true (`check` says it in code):

- `frame_slot` and `slot_frame` are inverse of each other, -1 = none; `n_used` slots hold a frame;
- `addresses[frame]` is where the decoded frame can be read now, 0 = absent: the slot's address
  once published, or an address lent for the time of a lease;
- a slot whose frame is placed but not published (its read is in flight) is pinned;
- a pinned slot is never evicted;
- slots from `n_slots` on, up to `n_most`, hold nothing: their memory may be gone.
"""

from __future__ import annotations

import numpy as np

NONE = -1


class Segment:
    """`n_slots` slots of `slot_bytes` from `address`, for a plane of `n_frames` frames; by `resize`
    up to `n_most`, that many unless said."""

    def __init__(
        self, *, name: str, n_frames: int, n_slots: int, slot_bytes: int, address: int,
        n_most: int | None = None,
    ):  # fmt: skip
        n_most = n_slots if n_most is None else n_most
        if not 0 <= n_slots <= n_most <= n_frames:
            raise AssertionError(f"{name}: {n_slots} to {n_most} slots for {n_frames} frames")
        self.name, self.n_frames, self.n_slots = name, n_frames, n_slots
        self.n_most = n_most  # tables are so long, whatever `resize` says
        self.slot_bytes = slot_bytes
        self.slot_address = np.uint64(address) + np.arange(n_most, dtype=np.uint64) * np.uint64(
            slot_bytes
        )
        self.frame_slot = np.full(n_frames, NONE, dtype=np.int32)
        self.slot_frame = np.full(n_most, NONE, dtype=np.int32)
        self.addresses = np.zeros(n_frames, dtype=np.uint64)
        self.pins = np.zeros(n_most, dtype=np.int16)
        self.n_used = 0
        self._lent: list[np.ndarray | slice] = []

    @staticmethod
    def table_bytes(n_frames: int, n_slots: int) -> int:
        """Bytes of a segment's tables (addresses 8 and slot number 4 per frame; 14 per slot)."""
        return n_frames * 12 + n_slots * 14

    # ------------------------------------------------------------------------------------- pins

    def pin(self, slots: np.ndarray) -> None:
        """One more pin on each of these distinct slots."""
        self.pins[slots] += np.int16(1)

    def unpin(self, slots: np.ndarray) -> None:
        """One pin less on each of these distinct slots."""
        left = self.pins[slots] - np.int16(1)
        if left.size and left.min() < 0:
            bad = np.asarray(slots)[left < 0]
            raise AssertionError(f"{self.name}: unpin of slots {bad.tolist()} without a pin")
        self.pins[slots] = left

    def barred(self) -> np.ndarray:
        """bool[n_most]: slots that cannot be victims, being pinned or empty."""
        return (self.pins > 0) | (self.slot_frame < 0)

    @property
    def n_free(self) -> int:
        return self.n_slots - self.n_used

    def resize(self, n_slots: int) -> None:
        """Use the first `n_slots` slots from now on; those beyond must be empty."""
        if not 0 <= n_slots <= self.n_most or (self.slot_frame[n_slots:] != NONE).any():
            self._broken(f"cannot use {n_slots} of {self.n_most} slots: more would be lost")
        self.n_slots = n_slots

    # ---------------------------------------------------------------------------------- content

    def place(self, frames: np.ndarray) -> np.ndarray:
        """Reserve the lowest free slots for these distinct absent frames, in the order given.

        Returns the slots (int32), each with one pin; the frames stay absent until `publish`.
        """
        n = len(frames)
        if n > self.n_free:
            raise AssertionError(f"{self.name}: place {n} frames, {self.n_free} slots are free")
        present = self.frame_slot[frames] != NONE
        if present.any():
            raise AssertionError(
                f"{self.name}: frames {np.asarray(frames)[present].tolist()} are already placed"
            )
        slots = np.flatnonzero(self.slot_frame[: self.n_slots] < 0)[:n].astype(np.int32)
        self.slot_frame[slots] = frames
        self.frame_slot[frames] = slots
        self.pins[slots] = 1
        self.n_used += n
        return slots

    def publish(self, slots: np.ndarray) -> None:
        """The frames placed in these slots have arrived: their addresses appear in the table."""
        self.addresses[self.slot_frame[slots]] = self.slot_address[slots]

    def evict(self, slots: np.ndarray) -> None:
        """Empty these distinct slots; refuses pinned and empty ones."""
        frames = self.slot_frame[slots]
        bad = (self.pins[slots] != 0) | (frames < 0)
        if bad.any():
            raise AssertionError(
                f"{self.name}: evict of pinned or empty slots {np.asarray(slots)[bad].tolist()}"
            )
        self.addresses[frames] = 0
        self.frame_slot[frames] = NONE
        self.slot_frame[slots] = NONE
        self.n_used -= len(frames)

    def recount(self) -> None:
        """Set `n_used`, after a native request that was interrupted before it could be noted."""
        self.n_used = int(np.count_nonzero(self.slot_frame >= 0))

    def abandon(self, slots: np.ndarray) -> None:
        """Frames placed but never read (the read failed): drop their pin and empty the slots."""
        self.unpin(slots)
        self.evict(slots)

    # ---------------------------------------------------------------------------------- lending

    def lend(self, frames: np.ndarray | slice, addresses: np.ndarray) -> None:
        """Let absent frames appear at these addresses (not in slots) until `take_back`."""
        self.show(frames, addresses, frames)

    def note_lent(self, frames: list[slice]) -> None:
        """Absent frames that native code has let appear: `take_back` ends it."""
        self._lent += frames

    def show(
        self, frames: np.ndarray | slice, addresses: np.ndarray, lent: np.ndarray | slice
    ) -> None:
        """Absent frames have arrived at these addresses: those of `lent` among them appear until
        `take_back`; the others, placed, are in their slots and published."""
        if self.addresses[frames].any():
            raise AssertionError(f"{self.name}: lending frames that are present")
        self.addresses[frames] = addresses
        self._lent.append(lent)

    def take_back(self) -> None:
        """End every lending: those frames are absent again."""
        for frames in self._lent:
            self.addresses[frames] = 0
        self._lent.clear()

    # ----------------------------------------------------------------------------------- checks

    def check(self, *, idle: bool = False) -> None:
        """Every invariant of the door sign; `idle` also demands that nothing is pinned or lent."""
        used = np.flatnonzero(self.slot_frame >= 0)
        if len(used) != self.n_used:
            self._broken(f"{len(used)} slots hold frames, n_used says {self.n_used}")
        if len(used) and used[-1] >= self.n_slots:
            self._broken(f"slot {used[-1]} holds a frame, {self.n_slots} slots are in use")
        placed = np.flatnonzero(self.frame_slot >= 0)
        if len(placed) != self.n_used:
            self._broken(f"{len(placed)} frames have slots, n_used says {self.n_used}")
        frames = self.slot_frame[used]
        if len(used) and frames.max() >= self.n_frames:
            self._broken(f"a slot holds frame {int(frames.max())} of {self.n_frames}")
        back = self.frame_slot[frames]
        if (back != used).any():
            at = int(np.flatnonzero(back != used)[0])
            self._broken(
                f"slot {used[at]} holds frame {frames[at]}, whose slot is said to be {back[at]}"
            )
        if self.n_most and self.pins.min() < 0:
            self._broken(f"slot {int(self.pins.argmin())} has {int(self.pins.min())} pins")
        pinned_empty = (self.slot_frame < 0) & (self.pins != 0)
        if pinned_empty.any():
            self._broken(f"empty slot {int(np.flatnonzero(pinned_empty)[0])} is pinned")
        expected = np.zeros(self.n_frames, dtype=np.uint64)
        expected[frames] = self.slot_address[used]
        lent = np.zeros(self.n_frames, dtype=bool)
        for some in self._lent:
            lent[some] = True
        if (lent & (expected != 0)).any():
            self._broken("a frame is both lent and in a slot")
        loading = (expected != 0) & (self.addresses == 0)
        slots = self.frame_slot[loading]
        if (self.pins[slots] == 0).any():
            self._broken(f"slots {slots[self.pins[slots] == 0].tolist()} load without a pin")
        wrong = ~lent & ~loading & (self.addresses != expected)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            self._broken(
                f"frame {at} has address {int(self.addresses[at]):#x}, "
                f"its slot {int(self.frame_slot[at])} is at {int(expected[at]):#x}"
            )
        if idle and (self.pins.any() or self._lent):
            self._broken(
                f"idle with {int(np.count_nonzero(self.pins))} pinned slots and "
                f"{int(np.count_nonzero(lent))} lent frames"
            )

    def _broken(self, what: str) -> None:
        raise AssertionError(f"segment {self.name}: {what}")
