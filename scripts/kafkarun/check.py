"""Decides whether what a topic holds is what its producer was promised. Pure: no client here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from kafkarun.payload import Payloads

_EXAMPLES_MAX = 5
# What a producer gets for a batch that the broker had stored before, when the first ack was lost.
UNKNOWN_OFFSET = -1001


class Ledger:
    """The records that the broker has acknowledged: partition → sequence number → offset."""

    def __init__(self) -> None:
        self._acks: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        # A copy, because another thread may be adding a partition.
        return sum(len(acks) for acks in list(self._acks.values()))

    def add(self, partition: int, seq: int, offset: int) -> None:
        self._acks.setdefault(partition, {})[seq] = offset

    def merge(self, other: "Ledger") -> None:
        for partition, acks in other._acks.items():
            self._acks.setdefault(partition, {}).update(acks)

    def partitions(self) -> list[int]:
        return sorted(self._acks)

    def acked(self, partition: int) -> Mapping[int, int]:
        return self._acks.get(partition, {})

    def retained(self, log_starts: Mapping[int, int]) -> "Ledger":
        """The part that has to be there still when logs start at these offsets."""
        kept = Ledger()
        for partition, acks in self._acks.items():
            start = log_starts[partition]
            kept._acks[partition] = {seq: at for seq, at in acks.items() if at >= start}
        return kept


@dataclass(frozen=True)
class Report:
    """Numbers of records; all but the first two are zero if the log kept its word."""

    acked: int
    consumed: int
    lost: int = 0  # acked and not there
    duplicated: int = 0  # there a second time
    reordered: int = 0  # there after a record that was sent later
    misplaced: int = 0  # there, but not at the offset of its ack
    corrupt: int = 0  # not a record of this producer, or not all of one
    examples: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        return not any((self.lost, self.duplicated, self.reordered, self.misplaced, self.corrupt))

    @property
    def unacked(self) -> int:
        """Records that are there without an ack (of a killed broker, an aborted transaction)."""
        return self.consumed - self.corrupt - self.duplicated - (self.acked - self.lost)

    def __str__(self) -> str:
        counts = [f"{getattr(self, f.name):,} {f.name}" for f in fields(self)[:-1]]
        return "; ".join([", ".join(counts), *self.examples])


class PartitionCheck:
    """Follows one partition from its first offset on."""

    def __init__(self, partition: int, acked: Mapping[int, int], payloads: Payloads) -> None:
        self._partition = partition
        self._acked = acked
        self._payloads = payloads
        self._seen: set[int] = set()
        self._last_seq = -1
        self._counts = dict.fromkeys(("duplicated", "reordered", "misplaced", "corrupt"), 0)
        self._consumed = 0
        self._examples: list[str] = []

    def see(self, offset: int, value: bytes | None) -> None:
        self._consumed += 1
        origin = self._payloads.origin(value)
        if origin is None or origin.partition != self._partition:
            self._note("corrupt", offset, None)
            return
        seq = origin.seq
        if seq in self._seen:
            self._note("duplicated", offset, seq)
            return
        self._seen.add(seq)
        if seq < self._last_seq:
            self._note("reordered", offset, seq)
        self._last_seq = max(self._last_seq, seq)
        if self._acked.get(seq, UNKNOWN_OFFSET) not in (offset, UNKNOWN_OFFSET):
            self._note("misplaced", offset, seq)

    def report(self) -> Report:
        lost = sorted(self._acked.keys() - self._seen)
        where = [f"lost: seq {seq}, acked at {self._at(self._acked[seq])}" for seq in lost]
        return Report(
            acked=len(self._acked),
            consumed=self._consumed,
            lost=len(lost),
            examples=tuple((self._examples + where)[:_EXAMPLES_MAX]),
            **self._counts,
        )

    def _note(self, problem: str, offset: int, seq: int | None) -> None:
        self._counts[problem] += 1
        if len(self._examples) < _EXAMPLES_MAX:
            self._examples.append(f"{problem}: seq {seq} at {self._at(offset)}")

    def _at(self, offset: int) -> str:
        return f"partition {self._partition} offset {offset}"


def total(reports: Iterable[Report]) -> Report:
    """The sum over partitions."""
    listed = list(reports)
    examples = tuple(example for report in listed for example in report.examples)
    counted = [field.name for field in fields(Report)[:-1]]
    sums = {name: sum(getattr(report, name) for report in listed) for name in counted}
    return Report(**sums, examples=examples[:_EXAMPLES_MAX])
