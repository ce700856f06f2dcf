"""Interventions: concepts of sparse autoencoders that are written into the network, and who knows them.

What a request says is an `Intervention`; what a folder of autoencoders holds is a `Library`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder

BLOCK = re.compile(r"(?:down_blocks\.\d{1,2}|mid_block|up_blocks\.\d{1,2})\.attentions\.\d{1,2}", re.ASCII)


def _block_name(name: str) -> str:
    if not BLOCK.fullmatch(name):
        raise ValueError(
            f"'{name[:80]}' names no transformer block. Write it as diffusers does: up_blocks.1.attentions.0"
        )
    return name


GuidanceBranch = Literal["cond", "uncond"]
"""Whose row: the prompt's, or that of what it is guided against."""

Share = Annotated[float, Field(ge=0, le=1)]
ConceptName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
BlockName = Annotated[str, AfterValidator(_block_name)]
Box = tuple[float, float, float, float]


class Intervention(BaseModel):
    """Concepts that are added to what the network's blocks write, or taken from it: where, when and how strongly."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    add: tuple[ConceptName, ...] = ()
    """Concepts to add, by their names in the library."""
    remove: tuple[ConceptName, ...] = ()
    """Concepts to take away, in the region."""
    features: dict[BlockName, tuple[Annotated[int, Field(ge=0)], ...]] = Field(default_factory=dict)
    """Features to add by their numbers, by block: for autoencoders without a dictionary."""
    form: Literal["direction", "template"] = "direction"
    """How concepts are written. direction: one vector, the same wherever it is written. template: place by place, as
    codes of images that show a concept differ from those of others; the library must have been labelled with
    template_size."""
    strength: float = Field(default=1.0, ge=-1000, le=1000)
    """Factor of the concepts' directions; 0: nothing. Negative turns them round."""
    relative: bool | None = None
    """Whether directions are made as long as what the block itself wrote at the place, times the strength; otherwise
    they are the features' own. None: with a region, as in the paper; a template has lengths of its own."""
    region: Literal["predicted"] | Box | None = None
    """Left, top, right, bottom as shares of the image, from 0 to 1. predicted: where what is removed is predicted to be
    when the window begins, or what is added where nothing is removed. None: everywhere."""
    subtract: Literal["none", "elsewhere", "predicted", "active"] = "none"
    """What becomes of the added concepts outside the region. elsewhere: they are subtracted everywhere; predicted:
    where they are predicted to be; active: their codes are taken away, and those of what is removed inside."""
    window: tuple[Share, Share] = (0.0, 1.0)
    """Steps in which it acts, as shares of their number: from (included) and to (not included). Early ones place
    objects, middle ones change a style."""
    branch: Literal["cond", "uncond", "both"] = "cond"
    """Whose row is changed. both: added under the prompt and subtracted under what that is guided against."""
    blocks: tuple[BlockName, ...] = ()
    """Blocks that are written to, as diffusers names them; none: all of the library."""

    @model_validator(mode="after")
    def _says_what_and_where(self) -> Intervention:
        if not (self.add or self.remove or self.features):
            raise ValueError("names no concept. Give add, remove or features")
        if isinstance(self.region, tuple):
            left, top, right, bottom = self.region
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    f"region {list(self.region)} is not inside the image: left and right, top and bottom are shares "
                    "from 0 to 1, the smaller one first"
                )
        if self.subtract != "none" and self.region is None and not (self.subtract == "active" and self.remove):
            raise ValueError(f"subtract: {self.subtract} is about what is outside a region. Give region")
        if self.subtract != "none" and not (self.add or self.features) and self.subtract != "active":
            raise ValueError(f"subtract: {self.subtract} is about what is added. Give add, or leave subtract out")
        if self.features and (self.region == "predicted" and not (self.add or self.remove)):
            raise ValueError("features by number have no names to predict a region by. Give region as a box")
        if self.form == "template" and self.features:
            raise ValueError("features by number have no template. Give form: direction, or concepts by name")
        if self.form == "template" and self.relative:
            raise ValueError(
                "a template has lengths of its own, and relative: true asks for others. Leave relative out"
            )
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window {list(self.window)} has no step in it. Write the smaller share first")
        return self

    @model_serializer(mode="wrap")
    def _keeps_its_hash(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes from before there were templates are the same recipes."""
        data: dict[str, Any] = plain(self)
        if self.form == "direction":
            data.pop("form", None)
        return data

    @property
    def is_relative(self) -> bool:
        """Whether it is measured by what the block wrote."""
        if self.form == "template":
            return False
        return self.region is not None if self.relative is None else self.relative

    @property
    def names(self) -> tuple[str, ...]:
        """All concepts that it names."""
        return (*self.add, *self.remove)

    @property
    def row(self) -> GuidanceBranch:
        """Whose autoencoders it is written with."""
        return "uncond" if self.branch == "uncond" else "cond"

    @property
    def located_by(self) -> tuple[str, ...]:
        """The concepts whose place is its region, where that is predicted."""
        return self.remove or self.add

    def in_window(self, step: int, num_steps: int) -> bool:
        """Whether a step is one of those in which it acts."""
        return self.window[0] * num_steps <= step < self.window[1] * num_steps

    @property
    def can_matter(self) -> bool:
        """Whether it can change anything: without strength it cannot, unless it takes codes away."""
        return self.strength != 0.0 or self.subtract == "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """A region as codes of one autoencoder tell it."""

    features: tuple[int, ...]
    weights: tuple[float, ...]
    threshold: float  # it is where the weighted sum of codes is above
    iou: float  # of that with the labelled regions


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Template:
    """By how much codes differ, place by place, between images that show a concept and those that do not."""

    features: tuple[int, ...]  # K of the autoencoder's
    maps: Tensor  # (K, h', w') on the map that it was made of


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptFeatures:
    """A concept as features of one autoencoder: what tells it, what writes it, and what tells its place."""

    telling: Telling  # whether it is there, and where
    amounts: tuple[float, ...]  # codes that the features have where the concept is, less those that they have elsewhere
    placing: Telling  # where it is in an image that shows it
    template: Template | None = None  # what writes it place by place; None: the library was labelled without

    @property
    def features(self) -> tuple[int, ...]:
        """That write it."""
        return self.telling.features


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockAutoencoder:
    """An autoencoder, what it was trained on, and the names that its features have."""

    autoencoder: SparseAutoencoder
    block: str
    branch: GuidanceBranch
    timestep: float | None  # None: its origin does not say, and it serves any
    model: str  # name; "" where the origin does not say
    model_digest: str  # ""
    concepts: Mapping[str, ConceptFeatures] = field(default_factory=dict)


class Target(NamedTuple):
    """What an intervention means at one block and step."""

    entry: BlockAutoencoder
    add: tuple[ConceptFeatures, ...]
    remove: tuple[ConceptFeatures, ...]


class Library(Protocol):
    """Autoencoders by what they are asked for."""

    def targets(self, wanted: Intervention, timestep: float, reach: float) -> Sequence[Target]:
        """Every block that an intervention writes to at a timestep, with what is written.

        Raises:
            ValueError: a block, a concept, a feature or a timestep near enough is not there; says which there are.
        """

    def located(self, name: str, timestep: float, reach: float) -> tuple[BlockAutoencoder, ConceptFeatures]:
        """The autoencoder that tells best where a concept is, and by what.

        Raises:
            ValueError: see `targets`.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Autoencoders:
    """The autoencoders of a folder.

    Args:
        entries: at least one.
        where: the folder, for errors.
    """

    entries: tuple[BlockAutoencoder, ...]
    where: str

    @property
    def names(self) -> set[str]:
        """Of all concepts."""
        return {name for entry in self.entries for name in entry.concepts}

    def targets(self, wanted: Intervention, timestep: float, reach: float) -> Sequence[Target]:
        """See `Library`."""
        found = []
        for block in self.blocks_of(wanted):
            entry = self.nearest(block, wanted.row, timestep, reach)
            numbered = self._numbered(entry, wanted.features.get(block, ()))
            add = (*numbered, *(entry.concepts[name] for name in wanted.add if name in entry.concepts))
            remove = tuple(entry.concepts[name] for name in wanted.remove if name in entry.concepts)
            if add or remove:
                found.append(Target(entry, add, remove))
        if wanted.form == "template" and (without := self._untemplated(wanted, [target.entry for target in found])):
            raise ValueError(self.lacking_template(without))
        for name in wanted.names:
            if not any(name in target.entry.concepts for target in found):
                raise ValueError(self.unknown(name, f"at timestep {timestep:g}, in the blocks that are written to"))
        return found

    def located(self, name: str, timestep: float, reach: float) -> tuple[BlockAutoencoder, ConceptFeatures]:
        """See `Library`."""
        near = [self.nearest(block, "cond", timestep, reach) for block in self._blocks()]
        knowing = [entry for entry in near if name in entry.concepts]
        if not knowing:
            raise ValueError(self.unknown(name, f"at timestep {timestep:g}"))
        best = max(knowing, key=lambda entry: entry.concepts[name].placing.iou)
        return best, best.concepts[name]

    def _blocks(self) -> list[str]:
        return list(dict.fromkeys(entry.block for entry in self.entries))

    def blocks_of(self, wanted: Intervention) -> Sequence[str]:
        """The blocks that an intervention writes to."""
        return wanted.blocks or (self._blocks() if wanted.names else tuple(wanted.features))

    def nearest(self, block: str, branch: GuidanceBranch, timestep: float, reach: float) -> BlockAutoencoder:
        """The autoencoder of a block that was trained nearest to a timestep; of another branch where there is no other.

        Raises:
            ValueError: there is none, or only farther ones than `reach`.
        """
        of_block = [entry for entry in self.entries if entry.block == block]
        if not of_block:
            raise ValueError(self.lacking(block))
        of_branch = [entry for entry in of_block if entry.branch == branch] or of_block

        def distance(entry: BlockAutoencoder) -> float:
            return 0.0 if entry.timestep is None else abs(entry.timestep - timestep)

        best = min(of_branch, key=distance)
        if distance(best) > reach:
            raise ValueError(
                f"the nearest autoencoder of the block '{block}' in '{self.where}' is of timestep {best.timestep:g}, "
                f"and the step is at {timestep:g}, more than {reach:g} away. Narrow the window, train one there, or "
                "raise editing.reach"
            )
        return best

    def _numbered(self, entry: BlockAutoencoder, features: Sequence[int]) -> tuple[ConceptFeatures, ...]:
        count = entry.autoencoder.num_features
        if beyond := [number for number in features if number >= count]:
            raise ValueError(
                f"feature {beyond[0]} is named, and the autoencoder of '{entry.block}' has {count} from 0 on"
            )
        alone = [Telling(features=(number,), weights=(1.0,), threshold=0.0, iou=0.0) for number in features]
        return tuple(ConceptFeatures(telling=one, amounts=(1.0,), placing=one) for one in alone)

    def untemplated(self, wanted: Intervention) -> str | None:
        """The first concept that an intervention writes by a template which the library lacks; None: there is none."""
        return self._untemplated(wanted, self.entries) if wanted.form == "template" else None

    def _untemplated(self, wanted: Intervention, entries: Sequence[BlockAutoencoder]) -> str | None:
        return next(
            (
                name
                for name in wanted.names
                for entry in entries
                if name in entry.concepts and entry.concepts[name].template is None
            ),
            None,
        )

    def lacking_template(self, name: str) -> str:
        """What is said where a concept is to be written by a template, and there is none."""
        return (
            f"the concept '{name}' of '{self.where}' has no template. Run `shardedit sae label` with template_size on "
            "images some of which do not show it, or give form: direction"
        )

    def lacking(self, block: str) -> str:
        """What is said where there is no autoencoder of a block."""
        return f"'{self.where}' has no autoencoder of the block '{block}'. It has: {', '.join(self._blocks())}"

    def unknown(self, name: str, at: str = "") -> str:
        """What is said where a concept is not known, or not where it is needed."""
        if not (names := self.names):
            return (
                f"'{self.where}' has no dictionary, hence no concept '{name}'. Run `shardedit sae label`, or name "
                "features by their numbers"
            )
        if name in names:
            return f"the concept '{name}' of '{self.where}' is not known {at}. Choose another window or other blocks"
        near = difflib.get_close_matches(name, sorted(names), n=5, cutoff=0.4) or sorted(names)[:5]
        return f"'{self.where}' has no concept '{name}'. The nearest are: {', '.join(near)}"
