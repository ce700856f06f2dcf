"""ImgEdit-Bench, basic suite (Ye et al., arXiv 2505.20275): 737 instructions in nine types.

FOLDER/basic_edit.json      {key: {"id": "animal/000342021.jpg", "prompt": ..., "edit_type": ...}}
FOLDER/origin/<id>          the pictures; the folder's name may be another, `origin_img_root` in the official scripts
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.common.showing import public_url
from pipeline.errors import SourceError
from pipeline.evaluation.benchmarks.files import Folder, is_plain_name
from pipeline.evaluation.items import Item
from pipeline.records import EditRequest

TABLE = "basic_edit.json"
IMAGES = "origin"
CRITERIA: dict[str, tuple[str, str, str]] = {
    "replace": ("Prompt Compliance", "Visual Naturalness", "Physical & Detail Integrity"),
    "remove": ("Prompt Compliance", "Visual Naturalness", "Physical & Detail Integrity"),
    "add": ("Prompt Compliance", "Visual Naturalness", "Physical & Detail Coherence"),
    "adjust": ("Prompt Compliance", "Visual Seamlessness", "Physical & Detail Fidelity"),
    "style": ("Style Fidelity", "Content Preservation", "Rendering Quality"),
    "action": ("Action Fidelity", "Identity Preservation", "Visual & Anatomical Coherence"),
    "extract": ("Object Identity", "Mask Precision", "Visual Quality"),
    "background": ("Instruction Compliance", "Visual Seamlessness", "Physical Consistency"),
    "compose": ("Instruction Compliance", "Visual Naturalness", "Physical Consistency & Fine Detail"),
}
"""What a judge is asked about each type of edit, by the names under which it answers."""


def items_of(folder: Folder, images: str = IMAGES) -> Iterator[Item]:
    """The items, in the order of the table, which is not sorted.

    Args:
        folder: of the benchmark.
        images: name of the folder in it that holds the pictures.

    Raises:
        SourceError: the folder is no ImgEdit-Bench.
    """
    data = folder.json(TABLE)
    if not isinstance(data, Mapping) or not data:
        raise SourceError(f"{public_url(folder.url)}/{TABLE} holds no items. Give the folder of ImgEdit-Bench")
    if not any(isinstance(entry, Mapping) and "edit_type" in entry for entry in data.values()):
        raise SourceError(
            f"{public_url(folder.url)}/{TABLE} is no basic suite: its entries have no edit_type. The other suites "
            "are judged by other rules"
        )
    for key, entry in data.items():
        yield _item(str(key), entry, folder, images)


def _item(key: str, entry: Any, folder: Folder, images: str) -> Item:
    problem = "" if is_plain_name(key) else f"bad_key: the key '{key[:100]}' cannot be the name of a file"
    if not isinstance(entry, Mapping) or not {"id", "prompt", "edit_type"} <= set(entry):
        problem = "bad_entry: the entry lacks id, prompt or edit_type"
    if problem:
        return Item(key=key, image=None, request=EditRequest(), problem=problem)
    path, kind, prompt = str(entry["id"]), str(entry["edit_type"]), str(entry["prompt"])
    image = None
    try:
        image = folder.get(posixpath.join(images, path))
    except ValueError as error:
        problem = f"bad_path: {error}"
    if image is None and not problem:
        problem = f"missing_image: {images}/{path} is not there"
    if kind not in CRITERIA:
        problem = f"unknown_type: edit_type '{kind[:100]}' is none of {', '.join(CRITERIA)}"
    elif not prompt.strip():
        problem = "no_instruction: the entry's prompt is empty"
    return Item(
        key=key,
        image=image,
        request=EditRequest(instruction=prompt, target_prompt=prompt),
        edit_type=kind,
        facts={"id": path},
        problem=problem,
    )
