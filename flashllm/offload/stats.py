"""What a step did, counted in one place and handed out as one value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepStats:
    """Counters of one step, or summed over steps with `add`.

    Bytes are bytes of the file, padding included.  Bundles are counted for sparse planes only.
    """

    steps: int = 0
    bytes_read: int = 0  # submitted to the device by the stream and on demand
    reads: int = 0
    bytes_useful: int = 0  # of those, bytes of items that were asked for
    audit_bytes: int = 0  # read for audits; not part of bytes_read
    bundles_read: int = 0  # of sparse planes: in the frames that were read for their sake
    bytes_dropped: int = 0  # read ahead for a program that was then left
    hits: int = 0  # active bundles that were resident
    misses: int = 0  # active bundles that were not
    wait_ns: int = 0  # the caller stood still for reads or decoding
    decode_wait_ns: int = 0  # of that, for decoding: the bytes had been read
    decode_ns: int = 0  # thread time
    submit_ns: int = 0  # the caller asked for reads, in native code
    planes_swept: int = 0  # sparse planes read whole
    planes_picked: int = 0  # sparse planes read bundle by bundle
    prefetch_bytes: int = 0  # read on advice; not part of bytes_read
    prefetch_reads: int = 0
    prefetch_unused_bytes: int = 0  # of those, evicted without ever being used
    prefetch_dropped: int = 0  # frames advised and not read: no room, or the read failed

    def add(self, other: StepStats) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, int]:
        # Once per token: dataclasses.asdict would copy deeply and cost 0.1 ms.
        return {name: getattr(self, name) for name in self.__slots__}
