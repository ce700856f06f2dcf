"""What a server has answered: a small file for each question, so that a kill costs at most what was in flight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

Q = TypeVar("Q")
O = TypeVar("O")  # noqa: E741  an outcome
FAILED = ".failed.json"
"""How the file of an answer without use ends, where these are kept apart."""


class Store(Protocol):
    """Files by name, on any store. All but `names` may be called by many threads."""

    def names(self) -> set[str]:
        """Of all files."""

    def get(self, name: str) -> bytes | None:
        """A file; None where it is gone."""

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file, or none of it."""


class MemoryStore(Store):
    """Answers that last as long as the process."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def names(self) -> set[str]:
        """Of all files."""
        return set(self._files)

    def get(self, name: str) -> bytes | None:
        """A file; None where it is gone."""
        return self._files.get(name)

    def put(self, name: str, data: bytes) -> None:
        """Write a whole file."""
        self._files[name] = data


class Journal(Generic[Q, O]):
    """Outcomes of questions in a store.

    Args:
        store: of files.
        stem: of a question's file: other questions have others.
        write: an outcome as bytes.
        read: these back.
        failed: whether an outcome is of no use, and is kept apart.
    """

    def __init__(
        self,
        store: Store,
        *,
        stem: Callable[[Q], str],
        write: Callable[[O], bytes],
        read: Callable[[bytes], O],
        failed: Callable[[O], bool] = lambda outcome: False,
    ) -> None:
        self._store, self._stem, self._write, self._read, self._failed = store, stem, write, read, failed
        self._there = store.names()

    @property
    def is_empty(self) -> bool:
        """Whether it holds no answer."""
        return not self._there

    def find(self, question: Q) -> O | None:
        """What was answered before; None where nothing was, or the file is damaged."""
        stem = self._stem(question)
        name = next((one for one in (f"{stem}.json", f"{stem}{FAILED}") if one in self._there), "")
        data = self._store.get(name) if name else None
        try:
            return None if data is None else self._read(data)
        except (ValueError, KeyError, TypeError):
            return None

    def keep(self, question: Q, outcome: O) -> None:
        """Remember what was answered. May be called by many threads."""
        name = f"{self._stem(question)}{FAILED if self._failed(outcome) else '.json'}"
        self._store.put(name, self._write(outcome))
        self._there.add(name)
