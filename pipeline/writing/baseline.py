"""Which commit of a unit counts: what a driver found when it began, and what it and later ones add.

    _baseline/GENERATION.json        every unit that was committed then, and by which generation; a bit for each

A driver that was paused may wake up in the middle of a write, long after another has taken over its folder
(writing/lock.py), and no store refuses that write. So before a driver writes anything else, it records the commits
that it goes on from: of earlier generations these count, and nothing that is written later. Where a unit has several
commits, that of the highest generation counts; where its files are damaged, no older one replaces it, and the unit is
done again.

What does not count never will, so anybody may remove it at any time. Before a driver removes what might have counted,
it writes what makes that noise (a baseline, a folded manifest, an index), *then* looks at the lock, then removes what
it had listed before. Either it finds that it was taken over, or a later driver finds what it wrote, and does not rely
on what it removes.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fsspec import AbstractFileSystem
from pydantic import ValidationError

from pipeline.common.showing import public_url
from pipeline.errors import SinkError
from pipeline.writing.files import NotAFileError, get, list_folder
from pipeline.writing.manifest import Manifest, Stored, split_unit_id
from pipeline.writing.paths import Bits, Generation, first_problem

log = logging.getLogger(__name__)

FOLDER = "_baseline"
LOOKS = 5  # attempts to read what is removed meanwhile, each time for a newer one


@dataclass(slots=True)
class Counted:
    """The generation of every unit that counts, at one bit each."""

    shards: dict[str, dict[int, int]] = field(default_factory=dict)  # by slug and generation: bit i stands for chunk i

    def add(self, manifest: Manifest) -> None:
        """Note a unit's commit."""
        slug, _ = split_unit_id(manifest.unit)
        generations = self.shards.setdefault(slug, {})
        generations[manifest.generation] = generations.get(manifest.generation, 0) | 1 << manifest.chunk

    def remove(self, manifest: Manifest) -> None:
        """Take a unit's commit back."""
        slug, _ = split_unit_id(manifest.unit)
        self.shards[slug][manifest.generation] &= ~(1 << manifest.chunk)

    def has(self, slug: str, chunk: int, generation: int) -> bool:
        """Whether this commit of the unit counts."""
        return bool(self.shards.get(slug, {}).get(generation, 0) >> chunk & 1)


class Baseline(Stored):
    """What counted when one driver began."""

    generation: Generation
    whole: bool  # shards that are not listed have no unit that counts; else nothing is said of them
    shards: dict[str, dict[Generation, Bits]]  # as in `Counted`, in hexadecimal digits

    @staticmethod
    def of(counted: Counted, generation: int, *, only: Iterable[str] | None = None) -> Baseline:
        """Of what counts.

        Args:
            counted: every unit that does.
            generation: of the driver.
            only: slugs of the shards that are the driver's, empty ones too; None where all are.
        """
        shards = counted.shards if only is None else {slug: counted.shards.get(slug, {}) for slug in only}
        return Baseline(
            generation=generation,
            whole=only is None,
            shards={
                slug: {generation: f"{bits:x}" for generation, bits in generations.items() if bits}
                for slug, generations in sorted(shards.items())
            },
        )

    def to_bytes(self) -> bytes:
        """One line per shard."""
        head = json.dumps({"generation": self.generation, "whole": self.whole})
        lines = ",\n".join(f"{json.dumps(slug)}: {json.dumps(shard)}" for slug, shard in self.shards.items())
        return f'{head.removesuffix("}")}, "shards": {{\n{lines}\n}}}}\n'.encode()

    def speaks_of(self, slug: str) -> bool:
        """Whether it says which of a shard's units counted."""
        return self.whole or slug in self.shards

    def generations(self, slug: str) -> dict[int, int]:
        """Of a shard's units, as in `Counted`."""
        return {generation: int(bits, 16) for generation, bits in self.shards.get(slug, {}).items()}

    def replaces(self, other: Baseline) -> bool:
        """Whether the other one says nothing more."""
        return other.generation < self.generation and (
            self.whole or (not other.whole and other.shards.keys() <= self.shards.keys())
        )


class Baselines:
    """The baselines in a run's folder, highest generation first.

    Raises:
        SinkError: they cannot be read.
    """

    def __init__(self, fs: AbstractFileSystem, root: str) -> None:
        self.all: list[Baseline] = []
        for _ in range(LOOKS):
            paths = sorted(path for path in list_folder(fs, f"{root}/{FOLDER}") if path.endswith(".json"))
            contents = [_content(fs, path) for path in paths]
            if None not in contents:
                break
            fs.invalidate_cache()
        else:
            raise SinkError(f"{public_url(f'{root}/{FOLDER}')} changes all the time. Run the same command again")
        for path, data in zip(reversed(paths), reversed(contents), strict=True):
            try:
                baseline = Baseline.model_validate_json(data or b"")
                if posixpath.basename(path) == posixpath.basename(baseline_path(baseline.generation)):
                    self.all.append(baseline)
                    continue
                why = "it bears another's name"
            except ValidationError as error:
                why = first_problem(error)
            log.warning("%s is damaged, and says nothing of what counts: %s", public_url(path), why)

    def of(self, slug: str) -> Baseline | None:
        """The one that counts for a shard; None where none speaks of it."""
        return next((baseline for baseline in self.all if baseline.speaks_of(slug)), None)

    def may_count(self, slug: str) -> Callable[[int, int], bool]:
        """Whether the commit of a shard's chunk and a generation counts, unless there is one of a higher generation."""
        baseline = self.of(slug)
        if baseline is None:
            return lambda chunk, generation: True
        begun, counted = baseline.generation, baseline.generations(slug)
        return lambda chunk, generation: generation >= begun or bool(counted.get(generation, 0) >> chunk & 1)


def _content(fs: AbstractFileSystem, path: str) -> bytes | None:
    try:
        return get(fs, path)
    except NotAFileError:
        return b""


def baseline_path(generation: int) -> str:
    """Where a driver's stands, relative to the run's folder."""
    return f"{FOLDER}/{generation:08d}.json"
