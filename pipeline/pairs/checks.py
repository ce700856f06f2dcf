"""One pair, looked at: what is missing, broken, unchanged, displaced, said wrongly, or masked beside its change.

Cost: two decodings and an alignment, about 0.15 s for 512 x 512 on one core.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.pairs.alignment import Alignment, align
from pipeline.pairs.records import Pair, Seen
from pipeline.reading.decoder import Decodes

MAX_PIXELS = 64_000_000
THUMB = 16  # pixels of a side
# Levels, of means over 8 x 8 pixels: what encoding again does to luma and to a channel. JPEG of quality 75 against 95
# stays below both on photographs; an edit of 8 x 8 pixels is above.
COPY_LUMA, COPY_CHANNEL, COPY_MEAN = 4.0, 10.0, 5.0  # and the mean over all pixels
COPY_GRAIN = 0.3  # where it is larger: a share of the mean difference to the squares' own means, the picture's grain
CHANGED = 16.0  # levels of a pixel, smoothed, that count as a change
BEYOND_NOISE = 4.0  # times the middle pixel's difference: what an encoder changes everywhere is no edit
FEWEST_CHANGED = 0.0005  # share of the image: less may be noise
MISSED = 0.5  # share of the change that lies outside of the mask
INVERTED = 2.0  # mean change outside over that inside, of a mask whose sides are exchanged
EDGE = 0.02  # of the longer side, around a mask, that counts as inside
PLACEHOLDERS = re.compile(
    r"(none|null|nan|n/a|todo|tbd|string|prompt|instruction|placeholder|lorem ipsum.*|<[^<>]*>|\{[^{}]*\})"
)
MOJIBAKE = re.compile(r"\ufffd|[ÃÂ][\u0080-\u00bf]|â€|ã€|ï¼")
KINDS = {"JPEG": ("jpg", "jpeg", "jfif", "mpo"), "PNG": ("png",), "WEBP": ("webp",), "GIF": ("gif",), "BMP": ("bmp",)}

Figures = dict[str, float | str | None]


class Look:
    """Looks at pairs, one by one.

    Args:
        decoder: decodes strangers' bytes, within limits.
    """

    def __init__(self, decoder: Decodes) -> None:
        self._decoder = decoder

    def __call__(self, pair: Pair) -> Seen:
        """What is kept of a pair."""
        found = list(_said(pair))
        pictures: list[np.ndarray | None] = []
        for what, data, path in (("source", pair.source, pair.paths[0]), ("edited", pair.edited, pair.paths[1])):
            pixels, problem = self._decoded(what, data, path, found)
            found += problem
            pictures.append(pixels)
        source, edited = pictures
        figures: Figures = {}
        if source is not None and edited is not None:
            found += self._compared(pair, source, edited, figures)
        return Seen(
            id=pair.id,
            shard=pair.shard,
            index=pair.index,
            part=pair.part,
            split=pair.split,
            turn=pair.turn,
            prompt=(pair.prompt or "").strip(),
            source=_digest(source, pair.source),
            edited=_digest(edited, pair.edited),
            source_thumb=thumb(source),
            edited_thumb=thumb(edited),
            hash=None if source is None else dhash(source),
            findings=tuple(found),
            figures=figures,
        )

    def _decoded(
        self, what: str, data: bytes | None, path: str, found: list[tuple[str, str]]
    ) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
        if data is None:
            return None, [("missing", f"{what}: {path} is not there" if path else f"{what}: there is none")]
        try:
            pixels, _ = self._decoder.image(data, MAX_PIXELS)
        except DecodeError as error:
            return None, [("broken", f"{what}: {error}")]
        return pixels, list(_misnamed(what, data, path))

    def _compared(
        self, pair: Pair, source: np.ndarray, edited: np.ndarray, figures: Figures
    ) -> Iterator[tuple[str, str]]:
        size, other = source.shape[:2], edited.shape[:2]
        if size != other:
            yield "size_differs", f"source {size[1]} x {size[0]}, edited {other[1]} x {other[0]}"
        elif np.array_equal(source, edited):
            yield "unchanged", "the result is the input"
            return
        mask, problems = self._mask(pair, size)
        yield from problems
        found = _aligned(source, edited, mask)
        figures |= found.columns()
        if size == other and found.verdict not in ("misaligned", "undecided") and is_copy(source, edited):
            yield "unchanged", "the result is the input, encoded again"
            return
        yield from _displaced(found)
        if mask is not None and size == other and found.verdict in ("aligned", "undetermined", "undecided"):
            yield from mask_findings(source, edited, mask, figures)

    def _mask(self, pair: Pair, size: tuple[int, int]) -> tuple[Bool[np.ndarray, "H W"] | None, list[tuple[str, str]]]:
        if pair.mask is None:
            return None, [("missing", "mask: there is none")] if pair.wants_mask else []
        try:
            levels = self._decoder.mask(pair.mask, MAX_PIXELS, 1, size)
        except DecodeError as error:
            return None, [("mask_broken", str(error))]
        problems = []
        if levels.shape != size:
            problems.append(("mask_size", f"mask {levels.shape[1]} x {levels.shape[0]}, source {size[1]} x {size[0]}"))
            levels = np.asarray(Image.fromarray(levels).resize((size[1], size[0]), Image.Resampling.NEAREST))
        if ((levels > 8) & (levels < 247)).mean() > 0.01:
            problems.append(("mask_gray", "values between black and white"))
        return levels > 127, problems


def _aligned(source: np.ndarray, edited: np.ndarray, mask: np.ndarray | None) -> Alignment:
    """Outside of the mask; where nothing fits there the mask may be the wrong one, and is not asked."""
    if mask is None or not mask.any() or mask.all():
        return align(source, edited)
    found = align(source, edited, mask)
    if found.verdict not in ("unrelated", "undetermined"):
        return found
    without = align(source, edited)
    return found if without.verdict in ("unrelated", "undetermined") else without


def _said(pair: Pair) -> Iterator[tuple[str, str]]:
    """What is wrong with a pair's texts."""
    if pair.problem and pair.source is not None and pair.edited is not None:
        yield "broken", f"row: {pair.problem}"
    if pair.elsewhere:
        yield "path_differs", f"{pair.elsewhere}: one file alone has such a name, under another path"
    if pair.part:  # said once, of the pair's first result
        return
    if pair.prompt is None or not pair.prompt.strip():
        yield "prompt_empty", "no instruction"
        return
    text = pair.prompt.strip()
    if PLACEHOLDERS.fullmatch(text.lower()):
        yield "prompt_placeholder", text[:80]
    if MOJIBAKE.search(text):
        yield "prompt_mojibake", text[:80]
    if any(text.count(left) != text.count(right) for left, right in ("()", "[]", "{}")):
        yield "prompt_brackets", text[:80]
    if pair.source_prompt and pair.source_prompt.strip() == (pair.target_prompt or "").strip():
        yield "prompts_equal", pair.source_prompt[:80]


def _misnamed(what: str, data: bytes, path: str) -> Iterator[tuple[str, str]]:
    name = path.rpartition("/")[2]
    kind = name.rpartition(".")[2].lower() if "." in name else ""
    starts = {
        "JPEG": data[:3] == b"\xff\xd8\xff",
        "PNG": data[:4] == b"\x89PNG",
        "WEBP": data[8:12] == b"WEBP",
        "GIF": data[:4] == b"GIF8",
    }
    for true_kind, is_it in starts.items():
        if is_it and kind and kind not in KINDS[true_kind] and any(kind in names for names in KINDS.values()):
            yield "extension_differs", f"{what}: {name} is {true_kind}"


def _displaced(found: Alignment) -> Iterator[tuple[str, str]]:
    if found.verdict == "unrelated":
        yield "alignment_unrelated", "no shift, zoom or turn lays the result on the input"
        if found.note == "mirrored":
            yield "mirrored", "the result is the input's mirror image"
    elif found.verdict == "misaligned" and found.note == "aspect":
        yield "misaligned", "another aspect ratio"
    elif found.verdict in ("misaligned", "undecided"):
        kind = "misaligned" if found.verdict == "misaligned" else "alignment_undecided"
        yield (
            kind,
            f"shift {found.dx:+.2f}, {found.dy:+.2f} px; scale {found.sx:.4f}, {found.sy:.4f}; "
            f"turn {found.rotation:+.2f} degrees; corner {found.corner_px:.2f} px",
        )


def is_copy(source: UInt8[np.ndarray, "H W 3"], edited: UInt8[np.ndarray, "H W 3"]) -> bool:
    """Whether two pictures differ by their encoding alone: in grain, not in any place's mean."""
    difference = source.astype(np.float32) - edited
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)
    apart = float(np.abs(difference).mean())
    if apart > COPY_MEAN:  # gravel and grass lose more to an encoder than faces
        levels = source.astype(np.float32) @ weights
        if apart > COPY_GRAIN * float(np.abs(levels - _boxed(levels, 8)).mean()):
            return False
    luma = _boxed(difference @ weights, 8)
    if float(np.abs(luma).max()) > COPY_LUMA:
        return False
    return all(float(np.abs(_boxed(difference[..., at], 8)).max()) < COPY_CHANNEL for at in range(3))


def mask_findings(
    source: UInt8[np.ndarray, "H W 3"],
    edited: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "H W"],
    figures: Figures,
) -> Iterator[tuple[str, str]]:
    """Whether a mask covers what changed, of pictures that lie on one another."""
    if not mask.any():
        yield "mask_empty", "nothing is white"
        return
    if mask.all():
        yield "mask_full", "everything is white"
        return
    difference = np.abs(source.astype(np.float32) - edited).mean(axis=2)
    smooth = _boxed(difference)
    strong = np.where(smooth > max(CHANGED, BEYOND_NOISE * float(np.median(smooth))), smooth, 0)
    figures["mask_share"] = float(mask.mean())
    inside, outside = float(difference[mask].mean()), float(difference[~mask].mean())
    figures["change_inside"], figures["change_outside"] = inside, outside
    if (strong > 0).mean() < FEWEST_CHANGED:
        return
    missed = float(strong[~_grown(mask)].sum() / strong.sum())
    figures["change_missed"] = missed
    most_is_outside = outside > INVERTED * inside and missed > MISSED / 2
    if missed > MISSED or most_is_outside:  # the surroundings of a small edit are most of it
        yield "mask_misses_change", f"{missed:.0%} of the change lies outside of the mask"


def _boxed(values: Float[np.ndarray, "H W"], side: int = 5) -> Float[np.ndarray, "H W"]:
    """Means over squares: grain and JPEG's edges are no change."""
    before, after = side // 2 + 1, side - side // 2 - 1
    padded = np.pad(values, ((before, after), (before, after)), mode="edge")
    total = np.cumsum(np.cumsum(padded, axis=0, dtype=np.float64), axis=1)
    sums = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    return np.asarray(sums / side**2, dtype=np.float32)


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and its surroundings."""
    reach = max(2, math.ceil(EDGE * max(mask.shape)))
    counts = np.cumsum(
        np.cumsum(np.pad(mask.astype(np.int64), ((reach + 1, reach), (reach + 1, reach))), axis=0), axis=1
    )
    span = 2 * reach + 1
    return np.asarray(counts[span:, span:] - counts[:-span, span:] - counts[span:, :-span] + counts[:-span, :-span] > 0)


def _digest(pixels: np.ndarray | None, data: bytes | None) -> bytes:
    if pixels is not None:
        return hashlib.blake2b(pixels.tobytes(), digest_size=16, key=str(pixels.shape).encode()).digest()
    return b"" if data is None else hashlib.blake2b(data, digest_size=16).digest()


def thumb(pixels: np.ndarray | None) -> bytes:
    """16 x 16 levels of luma."""
    if pixels is None:
        return b""
    return Image.fromarray(pixels).resize((THUMB, THUMB), Image.Resampling.BOX, reducing_gap=2.0).convert("L").tobytes()


def dhash(pixels: UInt8[np.ndarray, "H W 3"]) -> int:
    """Difference hash of 64 bits: whether each of 8 x 9 means of luma is brighter than its left neighbour."""
    small = np.asarray(Image.fromarray(pixels).resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)
