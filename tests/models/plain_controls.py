"""Controls by their formulas, on diffusers' own UNet: every map is made, rows are looped over, hooks look into modules.

What `pipeline/models/attention.py` computes fused and stacked is held against this. It shares the naming of layers with
it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.engine.controls import (
    ANY,
    HIDDEN,
    Add,
    Blend,
    Control,
    GivenClasses,
    Layer,
    Mix,
    MixQueries,
    Read,
    Record,
    Route,
    TakeFeatures,
    Watch,
    WatchedClasses,
    Where,
)
from pipeline.models.unet import PLACES, attention_layers

Groups = Sequence[tuple[int, Control]]


class PlainControls:
    """A UNet that was never opened, and the parts of a call's groups, with rows counted over the whole call."""

    def __init__(self, unet: Any, groups: Groups) -> None:
        self.unet = unet
        self.parts = [(start, part) for start, control in groups for part in control.parts]
        self.plan = groups[0][1].plan
        self.maps: dict[int, list[Tensor]] = {}  # (S, h', w') per watched layer, by row
        self.recorded: list[tuple[int, Where, Tensor]] = []
        self.size = (0, 0)
        processors = {}
        for name, layer in attention_layers(unet).items():
            processors[name] = _Processor(self, layer)
        unet.set_attn_processor(processors)
        levels = len(unet.config.block_out_channels)
        for index, block in enumerate(unet.up_blocks):
            for place, residual in enumerate(block.resnets):
                key = (2 ** (levels - 1 - index), place)
                residual.conv2.register_forward_hook(lambda _, __, hidden, key=key: self.features(key, hidden))
        seen: set[int] = set()
        for index, block in enumerate(unet.up_blocks):
            factor = 2 ** max(0, levels - 2 - index)
            if factor not in seen:  # the first of each size
                seen.add(factor)
                block.register_forward_hook(lambda _, __, output, factor=factor: self.put_out(factor, output))
        for start, place_ in PLACES.items():
            part = getattr(unet, start)
            blocks = [part] if place_ == "mid" else list(part)
            for number, module in enumerate(one for block in blocks for one in getattr(block, "attentions", ())):
                where = (place_, number)
                module.register_forward_hook(
                    lambda _, given, output, where=where: (self.wrote(where, given[0], output[0]),)
                )

    def of(self, kind: type[Any]) -> list[tuple[int, Any]]:
        """Parts of a kind, with the first row of their group."""
        return [(start, part) for start, part in self.parts if isinstance(part, kind)]

    def predict(self, inputs: Tensor, times: Tensor, context: Tensor) -> Tensor:
        """One call."""
        self.size = (inputs.shape[-2], inputs.shape[-1])
        with torch.no_grad():
            return self.unet(inputs, times, encoder_hidden_states=context).sample

    def watched(self, row: int) -> Tensor:
        """(S, h', w') by the layers so far."""
        return torch.stack(self.maps[row]).mean(dim=0)

    def cross(self, layer: Layer, maps: Tensor, value: Tensor) -> Tensor:
        """(R, heads, N, d), by maps (R, heads, N, L)."""
        chosen = self.plan.watched
        if (
            (layer.place != "mid" and layer.factor == 4)
            if chosen is None
            else chosen.picks(replace(layer, kind="self"))
        ):
            for start, part in self.of(Watch):
                mean = maps[start + part.row].mean(dim=0)  # (N, L)
                field = (part.weights.to(mean) @ mean.T).unflatten(1, layer.grid(*self.size))
                self.maps.setdefault(start + part.row, []).append(field)
        mixed = maps.clone()
        for start, part in self.of(Mix):
            take, keep = part.take.to(maps), part.keep.to(maps)
            mixed[start + part.row] = maps[start + part.source] @ take + maps[start + part.row] * keep
        return mixed @ value

    def self_(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(R, heads, N, d), row by row."""
        own, query = query, query.clone()
        for start, part in self.of(MixQueries):
            if part.layers.picks(layer):
                row, source = start + part.row, start + part.source
                query[row] = part.share * own[source] + (1 - part.share) * own[row]
        rows = [_attend(query[row], key[row], value[row], scale) for row in range(len(query))]
        for start, part in self.of(Route):
            if part.layers.picks(layer):
                q, k, v = (
                    states[start + (part.row if source is None else source)]
                    for states, source in ((query, part.query), (key, part.key), (value, part.value))
                )
                rows[start + part.row] = _attend(q, k, v, scale)
        for start, part in self.of(Read):
            if part.layers.picks(layer):
                keys = torch.cat([key[start + source] for source in part.sources], dim=1)
                values = torch.cat([value[start + source] for source in part.sources], dim=1)
                allowed = self.allowed(start, part, layer)
                if part.weights is not None:  # as many of their kind, one after the other
                    assert allowed is not None
                    times = torch.tensor([int(one) for one in part.weights]).repeat_interleave(key.shape[2])
                    keys, values = (states.repeat_interleave(times, dim=1) for states in (keys, values))
                    allowed = allowed.repeat_interleave(times, dim=1)
                rows[start + part.row] = _attend(query[start + part.row], keys, values, scale, allowed)
        before = torch.stack(rows)
        for start, part in self.of(Blend):
            if part.layers.picks(layer):
                for place in range(before.shape[2]):
                    other = before[start + int(part.sources[place]), :, int(part.places[place])]
                    share = float(part.shares[place])
                    rows[start + part.row][:, place] = share * other + (1 - share) * before[start + part.row, :, place]
        return torch.stack(rows)

    def allowed(self, start: int, part: Read, layer: Layer) -> Tensor | None:
        """(N, J N) bool, place by place."""
        if isinstance(part.classes, WatchedClasses):
            fields = []
            for row in (part.classes.own, part.classes.theirs):
                if start + row not in self.maps:
                    return None
                field = self.watched(start + row)[0]
                inside = field[part.classes.image]
                fields.append((field - inside.min()) / (inside.max() - inside.min()) >= part.classes.threshold)
            classes = torch.stack(fields).long() + 1
        elif isinstance(part.classes, GivenClasses):
            classes = torch.cat([part.classes.own[None], part.classes.theirs])
        else:
            return None
        at_layer = interpolate(classes[None].double(), size=layer.grid(*self.size), mode="nearest")[0].long()
        own, theirs = at_layer[0].flatten().tolist(), at_layer[1:].flatten().tolist()
        if all(one == HIDDEN for one in theirs):
            theirs = [ANY] * len(theirs)
        allowed = []
        for one in own:
            row = [other != HIDDEN and (one == other or ANY in (one, other)) for other in theirs]
            allowed.append(row if any(row) and one != HIDDEN else [other != HIDDEN for other in theirs])
        return torch.tensor(allowed)

    def features(self, key: tuple[int, int], hidden: Tensor) -> Tensor:
        """Behind a second convolution."""
        taken = hidden.clone()
        for start, part in self.of(TakeFeatures):
            if key == (part.blocks.factor, part.blocks.index_in_block):
                taken[start + part.row] = hidden[start + part.source]
        return taken

    def put_out(self, factor: int, output: Tensor) -> None:
        """Behind a decoder block."""
        for start, part in self.of(Record):
            if part.where == ("decoder", factor):
                self.recorded.append((start + part.row, part.where, output[start + part.row]))

    def wrote(self, where: Where, given: Tensor, output: Tensor) -> Tensor:
        """Behind a transformer block."""
        changed = output.clone()
        for start, part in self.of(Add):
            if part.where == where:
                written = output[start + part.row] - given[start + part.row]
                length = written.norm(dim=0) if part.relative else torch.ones(written.shape[1:])
                for direction, field in zip(part.directions, part.maps, strict=True):
                    added = direction.to(output)[:, None, None] * field.to(output) * length
                    changed[start + part.row] += added
        for start, part in self.of(Record):
            if part.where == where:
                self.recorded.append((start + part.row, where, output[start + part.row] - given[start + part.row]))
        return changed


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(dim=-1) @ value


class _Processor:
    def __init__(self, owner: PlainControls, layer: Layer) -> None:
        self.owner, self.layer = owner, layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if self.layer.kind == "self":
            attended = self.owner.self_(self.layer, query, key, value, attn.scale)
        else:
            maps = (query @ key.transpose(-1, -2) * attn.scale).softmax(dim=-1)
            attended = self.owner.cross(self.layer, maps, value)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
