"""Takes back damaged units and merged files, for the next run to make them again: `verify --repair`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeline.reading.storage import open_fs
from pipeline.recipe import SinkConfig
from pipeline.writing.baseline import Baseline, Counted
from pipeline.writing.cleaning import put_baseline
from pipeline.writing.files import remove
from pipeline.writing.indexing import belongs_to_merged, left_by_merging, replace_index
from pipeline.writing.lock import Claim
from pipeline.writing.manifest import KINDS
from pipeline.writing.merged import Index, Merged, Slot


def take_back(
    counted: Counted, damaged: Collection[str], broken: Sequence[str], sink: SinkConfig, claim: Claim
) -> None:
    """Let only these units count from now on; remove the files of all others, and those of no unit.

    Args:
        counted: the units that go on counting.
        damaged: paths of the contents of damaged merged files, as the index names them. Their units count no longer.
        broken: further files to be removed, relative to the run's folder.
        sink: where the run stands.
        claim: of the driver that repairs.

    Raises:
        RunAborted: another driver has taken the folder over.
        SinkError: something cannot be written or removed.
    """
    fs, root = open_fs(sink.folder, sink.storage_options)
    merged = Merged(fs, root, trusted=False)
    if merged.path or left_by_merging(fs, root):
        slots = {kind: tuple(_without(slot, damaged) for slot in merged.slots(kind)) for kind in KINDS}
        replace_index(sink, merged, Index(generation=claim.generation, slots=slots), claim)
    put_baseline(sink, Baseline.of(counted, claim.generation), claim)
    for path in broken:
        if not belongs_to_merged(path):  # those have gone with the index
            remove(fs, f"{root}/{path}")


def _without(slot: Slot, damaged: Collection[str]) -> Slot:
    return slot.model_copy(update={"file": None}) if slot.contents in damaged else slot
