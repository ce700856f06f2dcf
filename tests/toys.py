"""A toy editor and a toy inversion, as somebody would add them: each is a class, and a line in its registry."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.steps import DDIM
from pipeline.editing.base import EditingMethod
from pipeline.editing.problems import Problem, target_problems
from pipeline.editing.walk import guided, no_masks, walk
from pipeline.engine.calls import Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Source, Trajectory


class ToyInversion(Inversion):
    """The image under the same noise at every level."""

    provides: ClassVar = frozenset({"DDIM steps", "levels alone"})
    exact: ClassVar = "none"
    paper: ClassVar = "Toys, arXiv 0000.00000"

    method: Literal["toy_inversion"] = "toy_inversion"
    """A toy."""
    num_steps: int = Field(default=4, ge=1)
    """Steps of the sampler."""

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        steps = source.schedule.steps(self.num_steps, source.size)
        noise = source.draw_noise()
        noised = [step.start.noised(source.latents, noise) for step in steps]
        latents = torch.stack([*noised, source.latents])
        return Trajectory(method=self.method, source=source, solver=DDIM(steps=steps), latents=latents)
        yield


class ToyEditor(EditingMethod):
    """Walk under the target prompt, unguided."""

    paper: ClassVar = "More toys, arXiv 0000.00001"

    method: Literal["toy_editor"] = "toy_editor"
    """A toy."""
    spring: float = 0.5
    """How far it jumps."""

    @property
    @override
    def guides(self) -> bool:
        return False

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        yield from target_problems(self.method, request)

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        prompt = yield from GuidedPrompt.encode(request.target_prompt, 1.0, "")
        latents = yield from walk(trajectory, 0, guided(trajectory, prompt))
        return EditedLatents(latents=latents, masks=no_masks(latents))


def main() -> None:
    """Put both into the registries, before anything has read them, and print what the package makes of them."""
    from pipeline.editing import EDITORS
    from pipeline.inversion import INVERSIONS

    EDITORS["toy_editor"], INVERSIONS["toy_inversion"] = ToyEditor, ToyInversion

    from demo_world.methods import method_of, valid_pairs
    from pipeline.looking.counting import RowCounter
    from pipeline.looking.printing import show_methods
    from pipeline.recipe import Recipe, recipe_from
    from pipeline.settings.reference import markdown

    pair = method_of("toy_inversion", "toy_editor", 3)
    request = EditRequest(target_prompt="a hat")
    sections = {"source": {"shards": "-"}, "edits": request.model_dump(), "sink": {"folder": "-"}}
    recipe = recipe_from({**sections, **pair.model_dump()})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        show_methods()
    found = {
        "pairs": valid_pairs(),
        "methods": printed.getvalue(),
        "reference": markdown(),
        "schema": json.dumps(Recipe.model_json_schema()),
        "planned": RowCounter(recipe).rows({"edit": request}),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
