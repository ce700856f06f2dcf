"""Attention that never holds a map where it need not, and attention between rows: what a call's controls do in a layer.

All that acts here are tensors, the parts of `engine/stacking.py`; which of them there are is known from a call's
layout, so that nothing inside the network is decided by a tensor's values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from pipeline.engine.controls import ANY, BACKGROUND, FOREGROUND, HIDDEN, Layer, Where
from pipeline.engine.stacking import Layout, Stacked
from pipeline.models.kernels import VECTOR_WIDTH

FEW_KEYS = 64  # filling up fewer costs more than it saves
PAIRS = 4096**2  # of places, whose mask is held at a time: 16 MB as it is, 64 where a CPU's kernel wants numbers
QUERIES = 1024  # whose explicit maps are held at a time: 8 heads over 4,096 places take 134 MB a row, tangents as much


def attention_probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Softmax of the scores, (..., N, M), in float32 or wider."""
    scores = (query @ key.transpose(-1, -2)) * scale
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention (R, heads, N, d) by its maps, of some queries at a time.

    Equal to the fused one within rounding, and slower. Forward-mode differentiation has no rule for fused kernels.
    """
    parts = [attention_probabilities(some, key, scale).to(value.dtype) @ value for some in query.split(QUERIES, dim=2)]
    return torch.cat(parts, dim=2)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention (R, heads, N, d) that never holds a map.

    On a CPU a prompt's 77 keys are filled up to the width of vector instructions with three that nobody attends to,
    which changes no sum (1.1 to 1.5 times as fast for heads of 8 to 160 numbers and 64 to 4,096 positions).
    """
    keys = key.shape[-2]
    fills_keys = mask is None and keys >= FEW_KEYS and query.dtype != torch.float64  # which is for parity, not speed
    if query.device.type == "cpu" and fills_keys and (more := -keys % VECTOR_WIDTH):
        key, value = (pad(states, (0, 0, 0, more)) for states in (key, value))
        mask = pad(query.new_zeros((1, 1, 1, keys)), (0, more), value=float("-inf"))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


@torch.library.custom_op(
    "shardedit::attention_of_distinct_rows",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor alike, float scale) -> Tensor",
)
def attention_of_distinct_rows(query: Tensor, key: Tensor, value: Tensor, alike: Tensor, scale: float) -> Tensor:
    """Fused attention (R, heads, N, d) of rows of which row r has the inputs of row `alike[r]`, with the same bits.

    An operator of its own, opaque to the compiler: how many rows differ changes from call to call, and every other
    shape stays the same.
    """
    distinct, place = alike.unique(return_inverse=True)
    if len(distinct) == len(alike):
        return fused_attention(query, key, value, None, scale).contiguous()
    return fused_attention(query[distinct], key[distinct], value[distinct], None, scale)[place].contiguous()


@attention_of_distinct_rows.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, alike: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape)


class Acting:
    """The controls of one network call at work inside of it, and what they have recorded so far."""

    def __init__(self, stacked: Stacked) -> None:
        self.layout: Layout = stacked.layout
        self.parts = self.layout.views(stacked.integers, stacked.floats)
        self.sums: list[Tensor] = []  # (R, S, h', w') per watched layer that has run
        self.recorded: dict[int, Tensor] = {}  # (slots, C, h', w') by number of the plan's room

    def attend(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """One layer's result (R, heads, N, d)."""
        if layer.kind == "self":
            return self._self_attention(layer, query, key, value, scale)
        if "watch" in self.parts and layer.index in self.layout.plan.watched_layers(self.layout.openings):
            self._watch(query, key, scale)
        return self._cross_attention(query, key, value, scale)

    def _cross_attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Maps are mixed without being made: (P_s A + P_t b) V = P_s (A V) + P_t (b V)."""
        if not self.layout.has("mixes.0.rows"):
            return fused_attention(query, key, value, None, scale)
        row, source = self.parts["mixes.0.rows"].unbind(1)
        keep, take = (self.parts[f"mixes.0.{name}"].to(value.dtype) for name in ("keep", "take"))
        own = fused_attention(query, key, value * keep[:, None, :, None], None, scale)
        taken = fused_attention(query[source], key[source], take[:, None] @ value[row], None, scale)
        return own.index_add(0, row, taken)

    def _watch(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Sums of explicit probabilities, in float32 or wider.

        A fused attention whose values are the weights gives the same without a map, rounded as the network is; on a CPU
        it is no faster at Stable Diffusion's sizes (heads of 64 to 160 numbers, 256 to 1,024 places, 1 and 4 sums).
        """
        weights = self.parts["watch"]  # (R, S, L)
        probabilities = attention_probabilities(query, key, scale).mean(dim=1)  # (R, N, L)
        sums = probabilities @ weights.to(probabilities).transpose(1, 2)
        shape = self.layout.shape
        grid = shape.plan.watched_grid(self.layout.openings, shape.height, shape.width)
        self.sums.append(sums.transpose(1, 2).unflatten(2, grid))

    def watched(self) -> Tensor | None:
        """(R, S, h/4, w/4), or the plan's own grid: mean over the layers that have run; None where none is watched."""
        return torch.stack(self.sums).mean(dim=0) if self.sums else None

    def _mixed_queries(self, layer: Layer, query: Tensor) -> Tensor:
        share = self.parts["queries.shares"][layer.index].to(query.dtype)[:, None, None, None]
        return query * (1 - share) + query[self.parts["queries.sources"]] * share

    def _self_attention(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.layout.has("queries.sources"):
            query = self._mixed_queries(layer, query)
        routed = [
            tensor.index_select(0, self.parts["routes"][layer.index, which]) if moved else tensor
            for which, (tensor, moved) in enumerate(
                zip((query, key, value), self.layout.routed[layer.index], strict=True)
            )
        ]
        attended = fused_attention(routed[0], routed[1], routed[2], None, scale)
        for number, layers in enumerate(self.layout.read_layers):
            if layer.index in layers and self.layout.has(f"reads.{number}.rows"):
                attended = self._read(number, layer, query, key, value, scale, attended)
        for number, layers in enumerate(self.layout.blend_layers):
            if layer.index in layers and self.layout.has(f"blends.{number}.rows"):
                attended = self._blend(number, attended)
        return attended

    def _read(
        self, number: int, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float, attended: Tensor
    ) -> Tensor:
        """Some rows' attention to the places of J rows side by side takes the place of their own."""
        rows, used = self.parts[f"reads.{number}.rows"], self.parts[f"reads.{number}.used"]
        reader = rows[:, 0]
        keys, values = (
            states[rows[:, 1:]].transpose(1, 2).flatten(2, 3)  # (E, heads, J N, d)
            for states in (key, value)
        )
        classes = self._classes(number, layer)
        if classes is None:
            read = fused_attention(query[reader], keys, values, None, scale)
        else:
            some = max(1, PAIRS // (query.shape[2] * keys.shape[2]))
            parts = [query[reader], keys, values, classes]
            if self.layout.plan.reads[number].weighted:
                parts.append(self.parts[f"reads.{number}.weights"])
            split = (tensor.split(some) for tensor in parts)
            read = torch.cat([_masked_attention(scale, *some_rows) for some_rows in zip(*split, strict=True)])
        # What slots that nobody uses have read is not written.
        written = torch.where(used[:, None, None, None] > 0, read, attended[reader])
        return attended.index_copy(0, reader, written)

    def _classes(self, number: int, layer: Layer) -> Tensor | None:
        """(E, 1 + J, h, w): of each place of the row that reads and of those that are read. None: all is read."""
        told_by = self.layout.plan.reads[number].classes
        if told_by is None or (told_by == "watched" and not self.sums):
            return None
        given = told_by == "given"  # (E, 1 + J, h, w), else (E, 2, h', w')
        classes = self.parts[f"reads.{number}.classes"] if given else self._watched_classes(number)
        size = layer.grid(self.layout.shape.height, self.layout.shape.width)
        return interpolate(classes.float(), size=size, mode="nearest").to(torch.uint8)

    def _watched_classes(self, number: int) -> Tensor:
        """(E, 2, h', w'): foreground of the row that reads and of the one that is read, by the layers that have run."""
        fields = self.watched()
        assert fields is not None
        fields = fields[self.parts[f"reads.{number}.watched"], 0]
        image = self.parts[f"reads.{number}.image"][:, None] > 0
        low = fields.masked_fill(~image, float("inf")).amin(dim=(2, 3), keepdim=True)
        high = fields.masked_fill(~image, float("-inf")).amax(dim=(2, 3), keepdim=True)
        share = (fields - low) / (high - low).clamp_min(torch.finfo(fields.dtype).tiny)
        inside = share >= self.parts[f"reads.{number}.thresholds"][:, None, None, None].to(share)
        return torch.where(inside, FOREGROUND, BACKGROUND)

    def _blend(self, number: int, attended: Tensor) -> Tensor:
        parts = (self.parts[f"blends.{number}.{name}"] for name in ("rows", "sources", "places", "shares"))
        return blended(attended, *parts)

    def features(self, residual: int, hidden: Tensor) -> Tensor:
        """A decoder block's hidden state (R, C, h', w') behind its second convolution."""
        if residual not in self.layout.taken:
            return hidden
        return hidden.index_select(0, self.parts["takes"][self.layout.taken.index(residual)])

    def put_out(self, where: Where, output: Tensor) -> None:
        """A decoder block's output (R, C, h', w')."""
        for number, record in enumerate(self.layout.plan.records):
            if record.where == where and self.layout.has(f"records.{number}.rows"):
                self.recorded[number] = output[self.parts[f"records.{number}.rows"]]

    def wrote(self, where: Where, given: Tensor, output: Tensor) -> Tensor:
        """A transformer block's output (R, C, h', w'), which it made of what it was given."""
        plan, changed = self.layout.plan, output
        for number, record in enumerate(plan.records):
            if record.where == where and self.layout.has(f"records.{number}.rows"):
                row = self.parts[f"records.{number}.rows"]
                self.recorded[number] = output[row] - given[row]
        for number, add in enumerate(plan.adds):
            if add.where == where and self.layout.has(f"adds.{number}.rows"):
                row = self.parts[f"adds.{number}.rows"]
                directions, maps, relative = (
                    self.parts[f"adds.{number}.{name}"].to(output.dtype) for name in ("directions", "maps", "relative")
                )
                added = torch.einsum("ekc,ekhw->echw", directions, maps)
                length = (output[row] - given[row]).norm(dim=1, keepdim=True)
                relative = relative[:, None, None, None]
                changed = changed.index_add(0, row, added * (length * relative + (1 - relative)))
        return changed


def blended(attended: Tensor, row: Tensor, source: Tensor, place: Tensor, share: Tensor) -> Tensor:
    """A layer's result (R, heads, N, d) in which E rows (E,) have taken a share of places of others, (E, N) each."""
    share = share.to(attended.dtype)[:, :, None, None]
    other = attended[source, :, place]  # (E, N, heads, d)
    own = attended[row].transpose(1, 2)
    return attended.index_copy(0, row, (own * (1 - share) + other * share).transpose(1, 2))


def _masked_attention(
    scale: float, query: Tensor, key: Tensor, value: Tensor, classes: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Attention of E rows to the places that their classes (E, 1 + J, h, w) let them read, each of which counts as many
    times as its row's weight (E, J) says: its logarithm is added to what queries and keys come to."""
    mask = readable(classes[:, 0].flatten(1), classes[:, 1:].flatten(1))[:, None]
    if weights is not None:
        counted = weights.log().to(query.dtype).repeat_interleave(classes[0, 0].numel(), dim=1)[:, None, None]
        mask = counted.expand(mask.shape).masked_fill(~mask, float("-inf"))
    return fused_attention(query, key, value, mask, scale)


def readable(own: Tensor, theirs: Tensor) -> Tensor:
    """(E, N, M) bool: which of M places each of N places reads, by their classes (E, N) and (E, M) in uint8, which
    every pair has once.

    A place whose class nobody has reads all that are not hidden: there is nothing to keep to. Where all are hidden, all
    are read.
    """
    theirs = torch.where((theirs == HIDDEN).all(dim=1, keepdim=True), ANY, theirs)
    meets = torch.stack([((theirs & bit) > 0).any(dim=1) for bit in (BACKGROUND, FOREGROUND)])  # (2, E)
    alone = ~(((own & BACKGROUND) > 0) & meets[0, :, None] | ((own & FOREGROUND) > 0) & meets[1, :, None])
    return (torch.where(alone, ANY, own)[:, :, None] & theirs[:, None, :]) > 0
