"""PIE-Bench (Ju et al., arXiv 2310.01506): 700 images of 512 x 512, ten kinds of edits, a mask each.

    FOLDER/mapping_file.json
    FOLDER/annotation_images/<image_path>

A mask is a list of (start, length) runs over the rows. The outermost rows and columns always count as inside: all
published numbers are measured so.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from pipeline.common.showing import public_url
from pipeline.errors import SourceError
from pipeline.evaluation.benchmarks.files import Folder
from pipeline.evaluation.items import Item
from pipeline.records import Concept, EditRequest, WordPair
from pipeline.writing.rows import encode_mask

SIDE = 512
MAPPING = "mapping_file.json"
IMAGES = "annotation_images"
STYLE = "9"
TYPES = {
    "0": "random",
    "1": "change object",
    "2": "add object",
    "3": "delete object",
    "4": "change content",
    "5": "change pose",
    "6": "change color",
    "7": "change material",
    "8": "change background",
    "9": "change style",
}
FIELDS = ("image_path", "original_prompt", "editing_prompt", "editing_type_id", "mask")


def items_of(folder: Folder, subset: Literal["all", "no_style"] = "all") -> Iterator[Item]:
    """The items, in the order of the mapping file.

    Args:
        folder: of the benchmark.
        subset: no_style leaves out type 9, as papers with n = 620 do.

    Raises:
        SourceError: the folder is no PIE-Bench.
    """
    data = folder.json(MAPPING)
    if not isinstance(data, Mapping) or not data:
        raise SourceError(f"{public_url(folder.url)}/{MAPPING} holds no items. Give the folder of PIE-Bench")
    known = [entry for entry in data.values() if isinstance(entry, Mapping) and set(FIELDS) & set(entry)]
    if not known:
        raise SourceError(
            f"{public_url(folder.url)}/{MAPPING} is of another version: no entry has any of {', '.join(FIELDS)}"
        )
    for key, entry in data.items():
        item = _item(str(key), entry, folder)
        if subset == "all" or item.edit_type != STYLE:
            yield item


def _item(key: str, entry: Any, folder: Folder) -> Item:
    if not isinstance(entry, Mapping) or (missing := [name for name in FIELDS if name not in entry]):
        lacks = "is no object" if not isinstance(entry, Mapping) else f"lacks {', '.join(missing)}"
        return Item(key=key, image=None, request=EditRequest(), problem=f"bad_entry: the mapping file's entry {lacks}")
    source, target = (without_brackets(str(entry[name])) for name in ("original_prompt", "editing_prompt"))
    notes = [
        "brackets_unbalanced" for name in ("original_prompt", "editing_prompt") if not is_balanced(str(entry[name]))
    ][:1]
    words = blend_words(entry.get("blended_word") or "", source, target)
    if words is None and str(entry.get("blended_word") or "").strip():
        notes.append("blend_words_not_in_prompts")
    path, kind = str(entry["image_path"]), str(entry["editing_type_id"])
    if (by_folder := re.match(r"(\d)_", path)) and by_folder[1] != kind:
        notes.append("type_is_not_the_folders")
    region, problem = None, ""
    try:
        region = encode_mask(decode_mask(entry["mask"]))
    except ValueError as error:
        problem = f"bad_mask: {error}"
    try:
        image = folder.get(posixpath.join(IMAGES, path))
    except ValueError as error:
        image, problem = None, problem or f"bad_path: {error}"
    if image is None and not problem:
        problem = f"missing_image: {IMAGES}/{path} is not there"
    return Item(
        key=key,
        image=image,
        request=request_of(source, target, str(entry.get("editing_instruction") or ""), words),
        edit_type=kind,
        region=region,
        facts={"image_path": path, "blended_word": entry.get("blended_word") or ""},
        problem=problem,
        notes=tuple(notes),
    )


def request_of(source: str, target: str, instruction: str, words: WordPair | None) -> EditRequest:
    """The edit in the words of every kind of method: two prompts, an instruction, and for methods that think in
    concepts the word that is new, or else the whole target prompt."""
    concept = " ".join(words.target) if words else target
    concepts = (Concept(prompt=concept),) if concept.strip() else ()
    return EditRequest(
        source_prompt=source, target_prompt=target, instruction=instruction, blend_words=words, concepts=concepts
    )


def without_brackets(text: str) -> str:
    """A prompt without the marks around what differs: the two characters go, nothing else."""
    return text.replace("[", "").replace("]", "")


def is_balanced(text: str) -> bool:
    """Whether every bracket has its other one."""
    depth = 0
    for char in text:
        depth += (char == "[") - (char == "]")
        if depth < 0:
            return False
    return depth == 0


def blend_words(text: str, source: str, target: str) -> WordPair | None:
    """ "cake bread" as words of the two prompts; None where there are none, or a prompt lacks its own."""
    words = str(text).split()
    if len(words) < 2 or not (has_word(source, words[0]) and has_word(target, words[1])):
        return None
    return WordPair(source=(words[0],), target=(words[1],))


def has_word(prompt: str, word: str) -> bool:
    """Whether a prompt has a word, whatever its case and the punctuation around it."""
    return word.casefold() in re.findall(r"[\w'-]+", prompt.casefold())


def decode_mask(runs: Sequence[int]) -> Bool[np.ndarray, "512 512"]:
    """A run-length code as a mask, True where the edit may act, its border always.

    Args:
        runs: start, length, start, length ...; 0-based places of the flattened rows. Runs that overlap count once, and
            what reaches over the end is cut.

    Raises:
        ValueError: it is no list of pairs of whole numbers from 0.
    """
    if not isinstance(runs, Sequence) or isinstance(runs, (str, bytes)):
        raise ValueError(f"the mask is {type(runs).__name__}, not a list of runs")
    if len(runs) % 2:
        raise ValueError(f"the mask has {len(runs)} numbers; runs come in pairs of start and length")
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in runs):
        raise ValueError("the mask holds what is no whole number from 0")
    size = SIDE * SIDE
    edges = np.zeros(size + 1, dtype=np.int64)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        edges[min(start, size)] += 1
        edges[min(start + length, size)] -= 1
    mask = (edges[:-1].cumsum() > 0).reshape(SIDE, SIDE)
    mask[[0, -1], :] = True
    mask[:, [0, -1]] = True
    return mask


def dump_mapping(items: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A mapping file."""
    return json.dumps(items, ensure_ascii=False).encode()
