"""What interventions write into the network at one step, as parts of a control; and where concepts are.

Nothing is encoded inside the network: what a step must know of its codes is recorded by a call before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.diffusion.sparse_autoencoder import codes_of_map
from pipeline.engine.controls import Add, Adds, Control, Plan, Record, Records, Transformer, Watch
from pipeline.errors import EditError
from pipeline.interventions import BlockAutoencoder, ConceptFeatures, GuidanceBranch, Intervention, Target
from pipeline.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Term:
    """K directions that are added to what one block writes, each by a map of its own."""

    block: Transformer
    directions: Tensor  # (K, C)
    maps: Tensor  # (K, h', w')
    relative: bool  # times the length of what the block wrote at the place
    branch: str  # of the intervention

    def for_row(self, branch: GuidanceBranch) -> Tensor | None:
        """Its maps for a row; None: it leaves that row alone."""
        if self.branch == branch:
            return self.maps
        if self.branch == "both":
            return self.maps if branch == "cond" else -self.maps
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where one intervention acts, and where its concepts are, on maps of any size."""

    intervention: Intervention
    placement: Placement | None  # of the image on its canvas; None: it fills the canvas
    predicted: Tensor | None = None  # (h', w') bool, of one block: where its concepts were predicted to be
    added_predicted: Tensor | None = None  # the same, of what is added
    codes: Mapping[str, Tensor] = field(default_factory=dict)  # (h', w', F) of this step, by block

    def region(self, grid: tuple[int, int]) -> Tensor:
        """(h', w') in {0, 1}: where concepts are added, and removed."""
        box = self.intervention.region
        if box is None:
            return torch.ones(grid)
        if box == "predicted":
            assert self.predicted is not None, "a region is predicted before it is used"
            return resized(self.predicted, grid)
        return box_on(box, grid, self.placement)

    def signs(self, grid: tuple[int, int]) -> Tensor:
        """(h', w') in {-1, 0, 1}: where what is added is added, and where it is subtracted."""
        region = self.region(grid)
        if self.intervention.subtract == "elsewhere":
            return 2.0 * region - 1.0
        if self.intervention.subtract == "predicted":
            assert self.added_predicted is not None, "see `region`"
            return region - resized(self.added_predicted, grid) * (1.0 - region)
        return region


def box_on(box: tuple[float, float, float, float], grid: tuple[int, int], placement: Placement | None) -> Tensor:
    """(h', w') in {0, 1}: the cells of a map that are at least half inside a box, and at least one.

    Args:
        box: left, top, right, bottom as shares of the image.
        grid: rows and columns of the map.
        placement: of the image.

    Raises:
        EditError: the box is not on the canvas.
    """
    if placement is None:
        placement = Placement(original=grid, crop=(0, 0, *grid), scaled=grid, offset=(0, 0), canvas=grid)
    found = torch.zeros(grid)
    try:
        found[placement.part_in(box, grid)] = 1.0
    except ValueError as error:
        raise EditError(str(error)) from None
    return found


def resized(found: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map of another size, nearest neighbours: (h', w') in {0, 1}."""
    return interpolate(found[None, None].float(), size=grid, mode="nearest")[0, 0]


def predicted_place(entry: BlockAutoencoder, concept: ConceptFeatures, written: Tensor) -> Tensor:
    """(h', w') bool: where a concept is, by what a block wrote, (C, h', w')."""
    told_by = concept.placing
    codes = codes_of_map(entry.autoencoder, written)[..., list(told_by.features)]
    return (codes @ codes.new_tensor(told_by.weights)) > told_by.threshold


def direction_of(entry: BlockAutoencoder, concepts: Sequence[ConceptFeatures]) -> Tensor:
    """(C,): the directions of some concepts' features, as much of each as they have where the concept is."""
    directions = entry.autoencoder.directions
    found = directions.new_zeros(directions.shape[1])
    for concept in concepts:
        found = found + directions.new_tensor(concept.amounts) @ directions[list(concept.features)]
    return found


def terms_of(target: Target, places: Places, block: Transformer, grid: tuple[int, int]) -> list[Term]:
    """What an intervention writes to one block, on maps of one size."""
    wanted, entry = places.intervention, target.entry
    region, signs = places.region(grid), places.signs(grid)
    takes_codes = wanted.subtract == "active"
    pairs: list[tuple[Sequence[ConceptFeatures], Tensor]] = [(target.add, signs)]
    if not takes_codes:
        pairs.append((target.remove, -region))
    found = []
    if wanted.form == "template":
        directions, maps = templated(entry, pairs, grid)
        if bool(maps.any()):
            found.append(_term(block, directions, wanted.strength * maps, wanted, relative=False))
        pairs = []
    for concepts, where in pairs:
        direction = direction_of(entry, concepts)
        length = float(direction.norm())
        if length > 0.0 and bool(where.any()):
            scale = wanted.strength / length if wanted.is_relative else wanted.strength
            found.append(_term(block, direction[None], scale * where[None], wanted, relative=wanted.is_relative))
    if takes_codes:
        outside = 1.0 - region if wanted.region is not None else torch.zeros(grid)
        for concepts, where in ((target.add, outside), (target.remove, region)):
            numbers = sorted({number for concept in concepts for number in positive(concept)})
            if numbers and bool(where.any()):
                codes = places.codes[entry.block][..., numbers].movedim(-1, 0)
                directions = entry.autoencoder.directions[numbers]
                found.append(_term(block, directions, -codes * where, wanted, relative=False))
    return found


def templated(
    entry: BlockAutoencoder, pairs: Sequence[tuple[Sequence[ConceptFeatures], Tensor]], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Directions (K, C) and maps (K, h', w'): templates of concepts, each times where it is written, (h', w').

    K is never more than C: of more features the channels themselves are the directions, and the sum is the same.
    """
    directions = entry.autoencoder.directions
    maps = directions.new_zeros((len(directions), *grid))
    for concepts, where in pairs:
        for concept in concepts:
            assert concept.template is not None, "a library without is refused before"
            if numbers := list(concept.template.features):
                own = concept.template.maps.to(maps)
                maps[numbers] += where * interpolate(own[None], size=grid, mode="bilinear", align_corners=False)[0]
    used = maps.flatten(1).any(dim=1).nonzero()[:, 0]
    if len(used) <= directions.shape[1]:
        return directions[used], maps[used]
    written = torch.einsum("kc,khw->chw", directions[used], maps[used])
    return torch.eye(len(written)).to(written), written


def positive(concept: ConceptFeatures) -> list[int]:
    """The features that speak for a concept."""
    return [number for number, amount in zip(concept.features, concept.amounts, strict=True) if amount > 0]


def _term(block: Transformer, directions: Tensor, maps: Tensor, wanted: Intervention, *, relative: bool) -> Term:
    return Term(
        block=block,
        directions=directions.detach().float(),
        maps=maps.detach().float(),
        relative=relative,
        branch=wanted.branch,
    )


@dataclass(frozen=True, slots=True)
class Wish:
    """A recording of what a block writes, of one row."""

    block: Transformer
    branch: GuidanceBranch


def control_of(
    terms: Sequence[Term],
    wishes: Sequence[Wish],
    rows: Sequence[GuidanceBranch],
    watched: Tensor | None = None,
    sums: int = 0,
) -> Control | None:
    """What one step adds and records; None: nothing.

    Args:
        terms: what is added.
        wishes: what is recorded; comes back in this order.
        rows: of the call.
        watched: (S, L), sums over tokens whose attention is recorded of the prompt's row.
        sums: room for them: the same for all prompts.

    Raises:
        EditError: a row that something is said of is not there.
    """
    wanted = {branch for term in terms for branch in ("cond", "uncond") if term.branch in (branch, "both")}
    wanted |= {wish.branch for wish in wishes} | ({"cond"} if watched is not None else set())
    if missing := wanted - set(rows):
        raise EditError(
            f"the {min(missing)} branch is named, and at this guidance_scale there is no such row. Set "
            "editing.guidance_scale to another number than 0 or 1, or name the other branch"
        )
    parts: list[Add | Record | Watch] = []
    adds, records = [], []
    for block in dict.fromkeys(term.block for term in terms):
        where = (block.place, block.index_in_place)
        for relative in (False, True):
            some = [term for term in terms if term.block == block and term.relative == relative]
            count = 0
            for row, branch in enumerate(rows):
                acting = [(term.directions, maps) for term in some if (maps := term.for_row(branch)) is not None]
                if acting:
                    directions, maps = (torch.cat(parts_of_it) for parts_of_it in zip(*acting, strict=True))
                    parts.append(Add(row=row, where=where, directions=directions, maps=maps, relative=relative))
                    count = max(count, len(directions))
            if count:
                adds.append(Adds(where=where, slots=len(rows), directions=_room_for(count)))
    for wish in wishes:
        parts.append(Record(row=rows.index(wish.branch), where=(wish.block.place, wish.block.index_in_place)))
    for recorded in dict.fromkeys(part.where for part in parts if isinstance(part, Record)):
        records.append(Records(where=recorded, slots=len(rows)))
    if watched is not None:
        parts.append(Watch(rows.index("cond"), watched))
    if not parts:
        return None
    return Control(tuple(parts), Plan(sums=sums, adds=tuple(adds), records=tuple(records)))


def _room_for(count: int) -> int:
    """The next power of two: few sizes, so that calls of many images are of one kind."""
    return 1 << (count - 1).bit_length()
