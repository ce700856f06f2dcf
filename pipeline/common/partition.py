"""Part I of N of a run's shards: every Nth of the sorted listing, from the Ith on. The whole run is part 0 of 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Partition:
    """Which indexes of a listing: those that leave the remainder `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    def of(self, listing: Sequence[T]) -> Sequence[T]:
        """This partition's part of a listing. All partitions must have it in the same order."""
        return listing[self.index :: self.count]

    def overlaps(self, other: Partition) -> bool:
        """Whether some index of a long enough listing is in both (the Chinese remainder theorem)."""
        return (self.index - other.index) % gcd(self.count, other.count) == 0

    def covers(self, other: Partition) -> bool:
        """Whether every index of the other one is in this one."""
        return other.count % self.count == 0 and other.index % self.count == self.index

    @staticmethod
    def parsed(text: str) -> Partition:
        """Parse "I/N".

        Raises:
            ValueError: it is not of that form, or I is not below N.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ValueError(f"'{text}' is no partition: give I/N, with I from 0 to N-1, as in 0/4")
        return Partition(int(index), int(count))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Partition()
