"""Controls: how the rows of one `Denoise` call read each other inside the network, what is added, what is recorded.

A control is data: numbers, rows by their place in the call, layers by their names. It holds no code that runs inside
the model. The rows of a call with a control are a group and share one network call.

A network call carries the parts of all its groups as two tensors (`stacking.py`). Which parts there are, and for how
many rows, says the `Plan`. It follows from settings alone, never from a step's numbers, so that rows of one kind always
meet the same computation, and a compiled network is one graph per kind.

Order within a layer. `MixQueries` comes first: what is said of queries below is said of those that it leaves. A `Route`
picks queries, keys and values; the layer attends; a `Mix` adds to the result, a `Read` takes its place, both from the
queries, keys and values before any route; then `Blend`. Behind a transformer block comes `Add`; `Record` sees what the
block wrote without it. `Watch` reads queries and keys before any route and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

NetworkPart = Literal["down", "mid", "up", "double", "single"]
"""Of a UNet; or of a transformer: blocks that hold image and text apart, and blocks that hold them in one stream."""

WATCHED_FACTOR = 4  # latents' side over the side of the maps that are watched (LEDITS++, section 3.3)

# Classes of places in a `Read`, as sets of bits: a place reads the places that it shares a bit with. One that would
# read none reads all that are not hidden.
HIDDEN, BACKGROUND, FOREGROUND, ANY = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer of the network, told by its name; never by counting calls."""

    kind: Literal["self", "cross", "joint"]  # joint: over image and text, of a transformer without a UNet's stages
    index: int  # of its transformer block, in order of execution, from 0; its self- and cross-attention share it
    place: NetworkPart
    index_in_place: int  # among the blocks of its place, from 0
    factor: int  # latents' side over the side of its map
    # Whether its values are swapped between rows where a method swaps values alone: of FLUX in some blocks only.
    swaps_values: bool = True

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of its map for latents of (height, width)."""
        return -(-height // self.factor), -(-width // self.factor)


def watched_grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of what is watched on latents of (height, width)."""
    return -(-height // WATCHED_FACTOR), -(-width // WATCHED_FACTOR)


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """One residual block of the network's decoder."""

    index: int  # of its up block, in order of execution, from 0
    index_in_block: int
    factor: int  # latents' side over the side of its features


@dataclass(frozen=True, slots=True)
class Transformer:
    """One stack of transformer layers: what it writes, output minus input, can be added to and recorded."""

    place: NetworkPart
    index_in_place: int  # among those of its place, from 0
    factor: int  # latents' side over the side of its hidden state
    channels: int


@dataclass(frozen=True, slots=True)
class DecoderBlock:
    """One block of the decoder: what it puts out, behind its upsampler, can be recorded."""

    factor: int  # latents' side over the side of its output; of several blocks of one factor the first is meant
    channels: int


@dataclass(frozen=True, slots=True)
class Openings:
    """Where a network lets controls in, in order of execution. One per model."""

    layers: tuple[Layer, ...] = ()  # self-attention, one per transformer block
    joint: tuple[Layer, ...] = ()  # joint attention, one per block; a model has these or those
    watched: frozenset[int] = frozenset()  # indices of those whose attention to the text is watched
    watched_factor: int = WATCHED_FACTOR  # latents' side over that of what is watched
    residuals: tuple[ResidualBlock, ...] = ()
    transformers: tuple[Transformer, ...] = ()
    decoder: tuple[DecoderBlock, ...] = ()

    def transformer(self, where: Where) -> Transformer | None:
        """The one of a name, if there is one."""
        named = (one for one in self.transformers if (one.place, one.index_in_place) == where)
        return next(named, None)

    def recordable(self, where: Where) -> Transformer | DecoderBlock | None:
        """What a name that a `Record` has means here, if anything."""
        if where[0] != "decoder":
            return self.transformer(where)
        return next((one for one in self.decoder if one.factor == where[1]), None)


Where = tuple[NetworkPart | Literal["decoder"], int]
"""Names a `Transformer`, its place and which one there; or a `DecoderBlock`, "decoder" and the factor of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Chooses self-attention layers, or joint ones: those that fulfil every condition."""

    kind: Literal["self", "joint", "any"] = "self"
    swapping_values: bool = False  # those alone whose values are swapped
    place: NetworkPart | None = None
    min_factor: int = 1
    max_factor: int | None = None
    min_index: int = 0
    min_index_in_place: int = 0
    indices: frozenset[int] | None = None

    def picks(self, layer: Layer) -> bool:
        """Whether a layer is one of them."""
        return (
            layer.kind != "cross"
            and self.kind in (layer.kind, "any")
            and (layer.swaps_values or not self.swapping_values)
            and self.place in (None, layer.place)
            and self.min_factor <= layer.factor
            and (self.max_factor is None or layer.factor <= self.max_factor)
            and layer.index >= self.min_index
            and layer.index_in_place >= self.min_index_in_place
            and (self.indices is None or layer.index in self.indices)
        )


@lru_cache(maxsize=1024)
def resolved(layers: Layers, openings: Openings) -> frozenset[int]:
    """Indices of the transformer blocks that a choice means in a network."""
    return frozenset(layer.index for layer in (*openings.layers, *openings.joint) if layers.picks(layer))


@dataclass(frozen=True, slots=True)
class Residuals:
    """Chooses residual blocks of the decoder."""

    factor: int
    index_in_block: int

    def picks(self, block: ResidualBlock) -> bool:
        """Whether a block is one of them."""
        return (block.factor, block.index_in_block) == (self.factor, self.index_in_block)


# What follows are the parts of a control. Rows are places in the call, from 0; tensors lie on the CPU; L is the number
# of keys of cross-attention, h and w are the latents' size, h' and w' that of a layer's map.


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """Record S sums over tokens of a row's own cross-attention, mean over heads and over the watched layers."""

    row: int
    weights: Tensor  # (S, L)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Route:
    """A row's self-attention uses other rows' queries, keys or values. None: its own."""

    row: int
    layers: Layers
    query: int | None = None
    key: int | None = None
    value: int | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MixQueries:
    """A row's queries of self-attention become `share * queries(source) + (1 - share) * queries(row)`, first of all."""

    row: int
    source: int
    layers: Layers
    share: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Mix:
    """In every cross-attention layer a row's map becomes `map(source) @ take + map(row) * keep`."""

    row: int
    source: int
    take: Tensor  # (L, L)
    keep: Tensor  # (L,)


@dataclass(frozen=True, slots=True, eq=False)
class GivenClasses:
    """Classes of places, nearest neighbours in maps of other sizes."""

    own: Tensor  # (h, w) integers, of the row that reads
    theirs: Tensor  # (J, h, w), of the rows that are read


@dataclass(frozen=True, slots=True, eq=False)
class WatchedClasses:
    """Foreground where a row's first watched sum reaches a share of its range, by the watched layers that have run."""

    own: int  # a watched row, for the row that reads
    theirs: int  # for the row that is read; there is one
    threshold: float
    image: Tensor  # (h/4, w/4) bool: where the range is taken; without the padding of an image


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Read:
    """A row's self-attention reads J rows' places side by side; with classes, every place those of its class."""

    row: int
    sources: tuple[int, ...]  # J; itself where it keeps its own
    layers: Layers
    classes: GivenClasses | WatchedClasses | None = None
    weights: tuple[float, ...] | None = None  # J, above 0: a place counts as so many of its kind; None: once

    @property
    def told_by(self) -> Literal["given", "watched"] | None:
        """Where its classes come from."""
        if self.classes is None:
            return None
        return "given" if isinstance(self.classes, GivenClasses) else "watched"


@dataclass(frozen=True, slots=True, eq=False)
class TakeFeatures:
    """The hidden state of a row behind the second convolution of residual blocks, before their shortcut, becomes that
    of another."""

    row: int
    source: int
    blocks: Residuals


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Blend:
    """After self-attention a row takes a share of other places' result, the rest stays its own. N places, row by row.

    Everything is read before anything is written.
    """

    row: int
    layers: Layers  # of one size of map
    sources: Tensor  # (N,) rows
    places: Tensor  # (N,) places of these
    shares: Tensor  # (N,)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Add:
    """Add K directions to what a transformer block gives, `maps[k] * directions[k]` at each place."""

    row: int
    where: Where
    directions: Tensor  # (K, C)
    maps: Tensor  # (K, h', w')
    relative: bool = False  # times the length of what the block wrote at the place


@dataclass(frozen=True, slots=True)
class Record:
    """Record what a transformer block wrote, or what a decoder block puts out, (C, h', w')."""

    row: int
    where: Where


Part = Watch | Route | MixQueries | Mix | Read | TakeFeatures | Blend | Add | Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Room for the `Read`s of a group."""

    layers: Layers
    slots: int
    sources: int = 1  # J
    classes: Literal["given", "watched"] | None = None
    weighted: bool = False  # whether places may count more or less than once, of given classes

    def __post_init__(self) -> None:
        if self.weighted and self.classes != "given":
            raise ValueError("places are weighted where their classes are given")

    def suits(self, part: Read) -> bool:
        """Whether a part finds its place here; one without classes reads everything."""
        same = (part.layers, len(part.sources)) == (self.layers, self.sources)
        return same and part.told_by in (None, self.classes) and (self.weighted or part.weights is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blends:
    """Room for the `Blend`s of a group."""

    layers: Layers
    slots: int

    def suits(self, part: Blend) -> bool:
        """Whether a part finds its place here."""
        return part.layers == self.layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Adds:
    """Room for the `Add`s of a group."""

    where: Where
    slots: int
    directions: int = 1  # K, at most

    def suits(self, part: Add) -> bool:
        """Whether a part finds its place here."""
        return part.where == self.where and len(part.directions) <= self.directions


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Room for the `Record`s of a group."""

    where: Where
    slots: int

    def suits(self, part: Record) -> bool:
        """Whether a part finds its place here."""
        return part.where == self.where


class FreeU(NamedTuple):
    """Factors of the decoder's two coarsest blocks (Si et al., arXiv 2309.11497), for all rows of a call."""

    skip_1: float  # s1, of the low frequencies of what the first block skips over
    skip_2: float  # s2, of the second
    backbone_1: float  # b1, of half the channels of what the first block is given
    backbone_2: float  # b2, of the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which parts the calls of a kind have, and for how many rows of each group (slots)."""

    sums: int = 0  # S that each row may watch
    # Whose cross-attention is watched, all of one size of map. None: that at a quarter of the latents' side.
    watched: Layers | None = None
    routes: bool = False
    query_mixes: bool = False
    mixes: int = 0  # slots
    reads: tuple[Reads, ...] = ()
    takes: tuple[Residuals, ...] = ()
    blends: tuple[Blends, ...] = ()
    adds: tuple[Adds, ...] = ()
    records: tuple[Records, ...] = ()
    free_u: FreeU | None = None

    def watched_layers(self, openings: Openings) -> frozenset[int]:
        """Indices of the transformer blocks whose cross-attention is watched in a network."""
        return openings.watched if self.watched is None else resolved(self.watched, openings)

    def watched_grid(self, openings: Openings, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of what is watched on latents of (height, width)."""
        if self.watched is None:
            return watched_grid(height, width)
        (grid,) = {layer.grid(height, width) for layer in openings.layers if self.watched.picks(layer)}
        return grid


PLAIN = Plan(sums=1)
"""Of calls without a control."""

GROUPED = Plan(sums=4, routes=True, mixes=1)
"""Of editors whose target reads one source: they share network calls."""


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """What the rows of one call do to each other. The same data for every call that repeats it."""

    parts: tuple[Part, ...]
    plan: Plan = GROUPED

    @property
    def watches(self) -> bool:
        """Whether cross-attention is watched."""
        return any(isinstance(part, Watch) for part in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a control recorded."""

    # (R, S, h/4, w/4) per row, or on the plan's own grid; zeros for sums that nobody watched. None: no `Watch`
    watched: Tensor | None
    recorded: tuple[Tensor, ...] = ()  # (C, h', w') each, in the order of the `Record`s
