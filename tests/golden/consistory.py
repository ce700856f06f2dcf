"""Replays of ConsiStory's operators, one layer at a time: see replay.py.

Attention and injection go the whole way: what the method says, stacked as for a network call, and acted on in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.subject import (
    Matches,
    best_matches,
    correspondences,
    otsu_threshold,
    smoothed,
    subject_mask,
    taken_shares,
    thinned,
)
from pipeline.editing.consistory import ConsiStory
from pipeline.editing.sharing import (
    Rows,
    injected_features,
    mixed_queries,
    most_sources,
    others_of,
    shared_attention,
    who_reads_whom,
)
from pipeline.engine.controls import (
    HIDDEN,
    Blends,
    Control,
    GivenClasses,
    Layer,
    Layers,
    Openings,
    Part,
    Plan,
    Read,
    Reads,
)
from pipeline.engine.engine import Engine
from pipeline.engine.stacking import Shape, stack
from pipeline.models.attention import Acting, blended, fused_attention
from tests.golden.checks import Check

LAYER = Layer("self", 0, "up", 0, 1)
LAYERS = Layers(place="up")
EXACT = 0.0
ROUNDING = 1e-5  # absolute, of the README


def replay_consistory(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Masks, shared attention, query mixing, correspondence, injection."""
    first, last, count = settings["query_strength"]
    editor = ConsiStory(
        mask_dropout=settings["dropout"], injection_strength=settings["alpha"], query_strength=(first, last)
    )
    steps = 10 * (count - 1)  # of which the first tenth, and one more, mixes queries
    if "cross_maps" in golden:
        yield from replay_masks(golden, settings)
    if "hidden" in golden:
        yield from replay_attention(golden, settings, editor, steps)
    if "dift" in golden:
        yield from replay_correspondence(golden, settings)
    if "inject_in" in golden:
        yield from replay_injection(golden, settings, editor, steps)
    if "anchor_in" in golden:
        yield from replay_anchors(golden, settings, editor, steps)


def difference(ours: Tensor, golden: Tensor) -> float:
    """The largest difference; the numbers are of the order of 1."""
    assert ours.shape == golden.shape, f"ours {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    return float((ours.double() - golden.double()).abs().max())


def unequal(ours: Tensor, golden: Tensor) -> float:
    """Share of numbers that differ."""
    assert ours.shape == golden.shape, f"ours {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    return float((ours != golden).double().mean())


def side(places: int) -> int:
    return math.isqrt(places)


def replay_masks(golden: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[Check]:
    """Averaged over heads of the conditional half, then over all stored maps."""
    images, heads = settings["batch"], settings["heads"]
    stored = [maps.unflatten(0, (2, images, heads))[1].mean(dim=1) for maps in golden["cross_maps"]]
    stored += [golden["cross_extra"]] if "cross_extra" in golden else []
    maps = torch.stack(stored).mean(dim=0).mT  # (B, tokens, places)
    maps = maps.unflatten(2, (side(maps.shape[2]),) * 2)
    for size in settings["resolutions"]:
        masks = []
        for image in range(images):
            tokens = [int(token) for token in golden["token_indices"][:, image] if token >= 0]
            masks.append(subject_mask(maps[image, tokens], (size, size)))
        found = torch.stack(masks).flatten(1)
        yield Check(f"masks at {size}, share of different places", unequal(found, golden[f"mask_{size}"]), EXACT)
        uniform = torch.where(golden[f"drop_{size}"], 0.0, 1.0)
        kept = thinned(golden[f"mask_{size}"], uniform, settings["dropout"])
        yield Check(f"thinned masks at {size}", unequal(kept, golden[f"maskdrop_{size}"]), EXACT)


def replay_attention(
    golden: dict[str, Tensor], settings: dict[str, Any], editor: ConsiStory, steps: int
) -> Iterator[Check]:
    images, places = settings["batch"], golden["hidden"].shape[1]
    size = side(places)
    rows, reads = Rows(images, 2), golden["mapping"]
    anchors = int(reads.all(dim=0).sum())
    others = reads & ~torch.eye(images, dtype=torch.bool)
    if not others[:, anchors:].any():  # else it is no mapping of anchors and scenes, and only the attention is ours
        yield Check("who reads whom", unequal(who_reads_whom(images, anchors), reads), EXACT)
    shown = golden[f"maskdrop_{size}"].unflatten(1, (size, size))
    parts = shared_attention(reads, shown, LAYERS, (size, size), rows)
    keys = keys_of(parts, images, places)
    yield Check("keys that are read", unequal(keys, golden[f"ext_key_masks_{size}"]), EXACT)
    readers = 2 * sum(map(bool, others_of(reads)))
    rooms = (Reads(layers=LAYERS, slots=readers, sources=most_sources(reads), classes="given"),) if readers else ()
    # In the first step nobody is read and nothing mixed, so that its strength is a published number without use.
    mixes = {0: settings["query_strength"][0]} | dict(editor.query_strengths(steps))
    queries = [mixes.get(step, 0.0) for step in range(settings["query_strength"][2])]
    strengths = torch.tensor(queries, dtype=torch.float64)
    yield Check("strengths", difference(strengths, golden["strengths"].double()), 1e-7)
    hidden, vanilla = golden["hidden"], golden["vanilla_in"]
    yield Check("plain", difference(attended(golden, settings, vanilla, (), Plan()), golden["out_vanilla"]), ROUNDING)
    extended = attended(golden, settings, hidden, parts, Plan(reads=rooms))
    yield Check("extended", difference(extended, golden["out_ext"]), ROUNDING)
    yield Check("queries", difference(vanilla @ golden["wq"].mT, golden["vanilla_q"]), ROUNDING)
    if "out_ext_q" in golden:
        mixed = [*parts, *mixed_queries(rows, LAYERS, queries[settings["query_step"]])]
        plan = Plan(query_mixes=True, reads=rooms)
        found = attended(golden, settings, torch.cat([hidden, vanilla]), mixed, plan)
        yield Check("extended, with mixed queries", difference(found[: len(hidden)], golden["out_ext_q"]), ROUNDING)


def keys_of(parts: Sequence[Part], images: int, places: int) -> Tensor:
    """(B, B places): which keys the conditional row of each image sees, image after image."""
    keys = torch.eye(images, dtype=torch.bool).repeat_interleave(places, dim=1)  # its own, where it reads nobody else
    for part in parts:
        assert isinstance(part, Read)
        assert isinstance(part.classes, GivenClasses)
        if part.row >= images:
            for source, classes in zip(part.sources, part.classes.theirs, strict=True):
                start = (source - images) * places
                keys[part.row - images, start : start + places] |= classes.flatten() != HIDDEN
    return keys


def attended(
    golden: dict[str, Tensor], settings: dict[str, Any], hidden: Tensor, parts: Sequence[Part], plan: Plan
) -> Tensor:
    """The layer's output (R, places, C) under controls."""
    size, heads = side(hidden.shape[1]), settings["heads"]
    query, key, value = (
        (hidden @ golden[name].mT).unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("wq", "wk", "wv")
    )
    scale = query.shape[-1] ** -0.5
    acting = acting_of(parts, plan, len(hidden), size)
    if acting is None:
        found = fused_attention(query, key, value, None, scale)
    else:
        found = acting.attend(LAYER, query, key, value, scale)
    return found.transpose(1, 2).flatten(2) @ golden["wo"].mT + golden["bo"]


def acting_of(parts: Sequence[Part], plan: Plan, rows: int, size: int) -> Acting | None:
    shape = Shape(plan=plan, group=rows, rows=rows, length=7, height=size, width=size)
    openings = Openings(layers=(LAYER,))
    stacked = stack([(0, Control(tuple(parts), plan))], None, shape, openings, dtype=torch.float64)
    return None if stacked is None else Acting(stacked)


def replay_correspondence(golden: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[Check]:
    smooth = smoothed(golden["dift"])
    yield Check("smoothed features", difference(smooth, golden["dift_smooth"]), ROUNDING)
    images = settings["batch"]
    everybody = torch.ones((images, images), dtype=torch.bool)
    for size in settings["resolutions"]:
        if f"nn_{size}" in golden:
            masks = golden[f"mask_{size}"].unflatten(1, (size, size))
            places, distances = correspondences(golden["dift_smooth"], masks, everybody)
            yield Check(f"nearest places at {size}", unequal(places, golden[f"nn_{size}"]), EXACT)
            apart = ~torch.eye(images, dtype=torch.bool)
            away = difference(distances[apart], golden[f"nd_{size}"][apart])
            yield Check(f"distances at {size}", away, ROUNDING)
            yield Check("nobody is its own match", unequal(distances[~apart], golden[f"nd_{size}"][~apart]), EXACT)


def replay_injection(
    golden: dict[str, Tensor], settings: dict[str, Any], editor: ConsiStory, steps: int
) -> Iterator[Check]:
    """The order-free result; the published code reads rows that it has written before."""
    size = side(golden["inject_in"].shape[1])
    matches = best_matches(golden[f"nn_{size}"], golden[f"nd_{size}"], golden["inject_map"])
    thresholds = torch.tensor([otsu_threshold(distances) for distances in matches.distances])
    yield Check("thresholds", difference(thresholds, golden["otsu_dist"]), ROUNDING)
    masks = golden[f"mask_{size}"]
    for name, step in (("inject_out_snapshot", settings["curr_step"]), ("inject_out_early", 3)):
        if name in golden:
            found = injected(golden["inject_in"], matches, masks, settings, editor.injection_range(steps), step)
            yield Check(name, difference(found, golden[name]), ROUNDING)


def replay_anchors(
    golden: dict[str, Tensor], settings: dict[str, Any], editor: ConsiStory, steps: int
) -> Iterator[Check]:
    """The images behind the anchors take after them, and the anchors, which are read as they are, after nobody."""
    features = torch.cat([golden["anchor_feat"], golden["anchor_in"]])
    count, anchors, size = len(features), len(golden["anchor_feat"]), side(features.shape[1])
    places = torch.zeros((count, count, features.shape[1]), dtype=torch.int64)
    distances = torch.full(places.shape, float("inf"), dtype=features.dtype)
    places[anchors:, :anchors] = golden[f"anchor_nn_{size}"]
    distances[anchors:, :anchors] = golden[f"anchor_nd_{size}"]
    reads = torch.zeros((count, count), dtype=torch.bool)
    reads[anchors:, :anchors] = True
    matches = best_matches(places, distances, reads)
    masks = golden[f"mask_{size}"][:count]
    found = injected(features, matches, masks, settings, editor.injection_range(steps), settings["curr_step"])
    yield Check("cached anchors", difference(found[anchors:], golden["anchor_out"]), ROUNDING)


def injected(
    features: Tensor, matches: Matches, masks: Tensor, settings: dict[str, Any], window: range, step: int
) -> Tensor:
    """Attention outputs (B, places, C) after injection at a step."""
    if step not in window:
        return features
    count, size = len(features), side(features.shape[1])
    parts = injected_features(matches, taken_shares(matches, masks, settings["alpha"]), LAYERS, Rows(count, 1))
    acting = acting_of(parts, Plan(blends=(Blends(layers=LAYERS, slots=count),)), count, size)
    if acting is None:  # nobody takes anything
        return features
    heads = features.unflatten(-1, (settings["heads"], -1)).transpose(1, 2)
    rows = [acting.parts[f"blends.0.{name}"] for name in ("rows", "sources", "places", "shares")]
    return blended(heads, *rows).transpose(1, 2).flatten(2)
