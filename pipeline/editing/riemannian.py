"""Editing along the latent basis of the pullback metric (Park et al., arXiv 2307.12868).

At one noise level the directions of the latents are found that change the network's bottleneck most; the latents are
moved along one of them by x-space guidance, which keeps them plausible; DDIM then finishes the image. The basis and the
moves are made under the target prompt (it may be empty), inversion and sampling under the source prompt (the paper's is
empty). Directions stored from other images come by parallel transport.

Cost: with m = num_vectors + oversample and I iterations, m (2 I + 1) Jacobian products per image and target prompt,
each counted as one row; two rows per move, but one row for what all ways of a prompt begin with; one row per step from
the edit's level down, for each result. After `direct` also one row per step, whose residuals keep the background. Edits
of one image under one prompt share basis and moves. Memory: m vectors like the latents, m like the bottleneck. Masks:
none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.levels import Level
from pipeline.diffusion.steps import DDIM
from pipeline.diffusion.subspaces import transported
from pipeline.directions import Direction, StoredDirection
from pipeline.editing.base import EditingMethod
from pipeline.editing.observing import StepRecord, observer
from pipeline.editing.problems import Problem, raise_first
from pipeline.editing.walk import Predict, guided, no_masks, source_residuals, start_of, take_step
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Denoise, Denoised, EncodeText, Fork, Steps
from pipeline.engine.prompts import GuidedPrompt
from pipeline.engine.pullback import LocalBasis, Place, local_basis, size_problems
from pipeline.errors import EditError
from pipeline.inversion.base import Inversion
from pipeline.records import EditedLatents, EditRequest, Trajectory

TIMESTEPS = 1000  # T, of which `edit_time` and `late_noise` are shares
UNMOVED = Direction()  # of requests that name none


class Riemannian(EditingMethod):
    """Move the latents along a direction that changes the bottleneck much."""

    needs: ClassVar = frozenset({"DDIM steps", "path"})
    takes: ClassVar = frozenset({"source branch"})
    paper: ClassVar = "Understanding the Latent Space of Diffusion Models through Riemannian Geometry, arXiv 2307.12868"
    keeps_to_masks: ClassVar = False
    finds_bases: ClassVar = True

    method: Literal["riemannian"] = "riemannian"
    """Moves along directions of the latents that change the network's bottleneck most."""
    edit_time: float = Field(default=0.7, gt=0, le=1)
    """Where the latents are moved: at the step whose timestep is nearest to this share of 1000; 1: shape, 0.6: colour,
    expression."""
    num_vectors: int = Field(default=2, ge=1, le=4096)
    """n: vectors of the image's own basis; a stored direction is carried to what they span."""
    oversample: int = Field(default=3, ge=0, le=4096)
    """Vectors iterated beside these and dropped at the end: fewer iterations are needed."""
    max_iterations: int = Field(default=50, ge=1)
    """Iterations at most; they end once the basis has settled."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Sine of the angle, and share of the singular values, by which a settled basis still changes."""
    step_size: float = 1.0
    """delta: how far along the direction a move looks ahead."""
    move_scale: float = 1.0
    """gamma: factor of each move; 0: none. The paper has 0.1 for models without prompts."""
    late_noise: float = Field(default=0.0, ge=0, lt=1)
    """Share of 1000 below which sampling adds noise (eta 1), as the paper has it for models without prompts: 0.2. For
    inversion.method ddim; 0: nowhere."""
    directions: str = ""
    """Parquet file of stored directions, path or URL, as `shardedit geometry` writes it: those that the edits'
    direction.stored names."""
    min_kept: float = Field(default=0.1, ge=0, le=1)
    """Share of a stored direction that the image's own basis must hold; less is refused."""

    @property
    @override
    def guides(self) -> bool:
        return False

    @property
    @override
    def reads(self) -> str:
        return self.directions

    @property
    def num_rows(self) -> int:
        """m: vectors that are iterated."""
        return self.num_vectors + self.oversample

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if offers.bottleneck is None:
            yield (
                "riemannian multiplies with the Jacobian of the network's bottleneck, in forward and in reverse mode, "
                "which this model does not offer. Use a checkpoint of Stable Diffusion 1.x, 2.x or XL, or another "
                "editing.method"
            )
        else:
            yield from size_problems(self.num_rows, offers.bottleneck)

    @override
    def problems(
        self, request: EditRequest, inversion: Inversion, *, caption_follows: bool = False
    ) -> Iterator[Problem]:
        direction = request.direction or UNMOVED
        if direction.stored and not self.directions:
            yield Problem(
                "direction.stored without editing.directions",
                f"direction.stored '{direction.stored}' is named, and no file of directions. Set editing.directions",
            )
        if not direction.stored and (largest := max(direction.vectors)) >= self.num_vectors:
            yield Problem(
                "a vector beyond num_vectors",
                f"vector {largest} is asked for, and the basis has {self.num_vectors} from 0 on. Raise "
                "editing.num_vectors",
            )

    @override
    def pair_problems(self, inversion: Inversion) -> Iterator[str]:
        if self.late_noise and inversion.method != "ddim":
            yield (
                f"late_noise draws noise while sampling, which inversion.method '{inversion.method}' does not allow "
                "for. Use inversion.method ddim, or leave it out"
            )

    def step_among(self, levels: Sequence[Level]) -> int:
        """The step before which the latents are moved; of two as near the noisier one."""
        return min(range(len(levels)), key=lambda step: abs(levels[step].timestep - self.edit_time * TIMESTEPS))

    @override
    def edit(
        self, trajectory: Trajectory, request: EditRequest, user_mask: Tensor | None = None
    ) -> Steps[EditedLatents]:
        (found,) = yield from self.edit_all(trajectory, [request], user_mask)
        if isinstance(found, Exception):
            raise found
        return found

    @override
    def edit_all(
        self, trajectory: Trajectory, requests: Sequence[EditRequest], user_mask: Tensor | None = None
    ) -> Steps[list[EditedLatents | Exception]]:
        if user_mask is not None:
            raise_first(self.mask_problems())
        sampling = yield from Sampling.begin(self, trajectory)
        prompts = list(dict.fromkeys(request.target_prompt for request in requests))
        directions = {
            prompt: [request.direction or UNMOVED for request in requests if request.target_prompt == prompt]
            for prompt in prompts
        }
        edits = tuple(self._under_one_prompt(trajectory, sampling, prompt, directions[prompt]) for prompt in prompts)
        answers: list[list[EditedLatents | Exception] | Exception] = yield from side_by_side(edits)
        left = {
            prompt: iter(answer if isinstance(answer, list) else [answer] * len(directions[prompt]))
            for prompt, answer in zip(prompts, answers, strict=True)
        }
        return [next(left[request.target_prompt]) for request in requests]

    @override
    def bases(self, trajectory: Trajectory, requests: Sequence[EditRequest]) -> Steps[list[LocalBasis | Exception]]:
        prompts = list(dict.fromkeys(request.target_prompt for request in requests))
        answers: list[LocalBasis | Exception] = yield Fork(tuple(self._basis_under(trajectory, one) for one in prompts))
        found = dict(zip(prompts, answers, strict=True))
        return [found[request.target_prompt] for request in requests]

    def _basis_under(self, trajectory: Trajectory, prompt: str) -> Steps[LocalBasis]:
        place = yield from self.place(trajectory, prompt)
        return (yield from self.basis(trajectory, place))

    def place(self, trajectory: Trajectory, prompt: str) -> Steps[Place]:
        """Where an image is moved."""
        (conditioning,) = yield EncodeText((prompt,))
        step = self.step_among(trajectory.levels)
        return Place(latents=trajectory.latents[step], level=trajectory.levels[step], conditioning=conditioning)

    def basis(self, trajectory: Trajectory, place: Place) -> Steps[LocalBasis]:
        """The image's own basis; the iteration starts from its own noise."""
        draw = trajectory.source.editing_noise()
        start = torch.stack([draw().flatten() for _ in range(self.num_rows)])
        return (
            yield from local_basis(
                place, start, keep=self.num_vectors, max_iterations=self.max_iterations, tolerance=self.tolerance
            )
        )

    def _under_one_prompt(
        self, trajectory: Trajectory, sampling: Sampling, prompt: str, directions: Sequence[Direction]
    ) -> Steps[list[EditedLatents | Exception]]:
        """One basis, each way that is gone walked once, and a result for each direction and strength."""
        place = yield from self.place(trajectory, prompt)
        basis = yield from self.basis(trajectory, place)
        ways: dict[tuple[int | str, int], list[int]] = {}  # numbers of moves, by vector and sign
        refused: dict[Direction, Exception] = {}
        vectors: dict[int | str, Tensor] = {}
        for direction in directions:
            which = direction.stored or direction.vector
            try:
                vectors[which] = self._vector(trajectory, place, basis, direction)
            except EditError as error:
                refused[direction] = error
                continue
            sign = -1 if direction.strength < 0 else 1
            ways.setdefault((which, sign), []).append(abs(direction.strength))
        moved = yield from self._moved(place, vectors, ways)
        ends = yield from side_by_side([sampling.sample(latents) for latents in moved.values()])
        results = dict(zip(moved, ends, strict=True))

        def result(direction: Direction) -> EditedLatents | Exception:
            if direction in refused:
                return refused[direction]
            end = results[direction.stored or direction.vector, direction.strength]
            return end if isinstance(end, Exception) else EditedLatents(latents=end, masks=None)

        return [result(direction) for direction in directions]

    def _vector(self, trajectory: Trajectory, place: Place, basis: LocalBasis, direction: Direction) -> Tensor:
        """A unit vector (C, h, w) of the latents.

        Raises:
            EditError: the stored direction is of another place, or too little of it is left.
        """
        if not direction.stored:
            return basis.leading.tangents[direction.vector].view_as(place.latents)
        stored = stored_in(trajectory.source.stored, self.directions, direction.stored)
        if stored.timestep not in (None, basis.timestep):
            raise EditError(
                f"the direction '{stored.name}' was found at timestep {stored.timestep:g}, and the image is moved at "
                f"{basis.timestep:g}. Set editing.edit_time and inversion.num_steps as they were there"
            )
        if stored.shape != basis.shape:
            was, here = ("x".join(map(str, one)) for one in (stored.shape, basis.shape))
            raise EditError(
                f"the direction '{stored.name}' is of a bottleneck of {was}, and this image's is {here}. Set "
                "model.size and model.fit as they were there"
            )
        carried = transported(stored.feature.to(basis.leading.features), basis.leading)
        if carried.kept < self.min_kept:
            raise EditError(
                f"of the direction '{stored.name}' the image's basis of {self.num_vectors} keeps {carried.kept:.3f}, "
                f"less than editing.min_kept {self.min_kept:g}. Raise editing.num_vectors, edit nearer to pure noise "
                "(editing.edit_time), or lower editing.min_kept"
            )
        return carried.direction.view_as(place.latents)

    def _moved(
        self, place: Place, vectors: Mapping[int | str, Tensor], ways: Mapping[tuple[int | str, int], Sequence[int]]
    ) -> Steps[dict[tuple[int | str, int], Tensor]]:
        """The moved latents, by vector and signed number of moves. All ways begin with one row."""
        found: dict[tuple[int | str, int], Tensor] = {}
        goes = [way for way, counts in ways.items() if max(counts)]
        here = None
        if goes:
            denoised: Denoised = yield Denoise(place.latents[None], [place.level], [place.conditioning])
            here = denoised.predictions.noise[0]
        walks = tuple(
            guidance(place, sign * self.step_size * vectors[which], self.move_scale, max(ways[which, sign]), here)
            for which, sign in goes
        )
        paths = dict(zip(goes, (yield Fork(walks)), strict=True))
        for (which, sign), counts in ways.items():
            for moves in counts:
                path = paths.get((which, sign))
                if isinstance(path, Exception):
                    raise path
                found[which, sign * moves] = place.latents if not moves or path is None else path[moves]
        return found


def side_by_side(children: Sequence[Steps[Any]]) -> Steps[list[Any]]:
    """What several generators come to, or why one came to nothing.

    One alone runs in place of the caller, so that who looks on at its steps sees them.
    """
    if len(children) != 1:
        found: list[Any] = yield Fork(tuple(children))
        return found
    try:
        return [(yield from children[0])]
    except Exception as error:
        return [error]


def stored_in(files: Mapping[str, Mapping[str, StoredDirection]], file: str, name: str) -> StoredDirection:
    """A direction by its file and name. That it is of this model and layer was checked before the run.

    Raises:
        EditError: there is none of that name, which a row of its own may have asked for.
    """
    try:
        return files[file][name]
    except KeyError:
        raise EditError(
            f"editing.directions has no direction '{name}'. Name one that it has in the row's direction.stored"
        ) from None


def guidance(place: Place, ahead: Tensor, scale: float, moves: int, here: Tensor | None = None) -> Steps[list[Tensor]]:
    """x-space guidance: x + scale (eps(x + ahead) - eps(x)), repeated (section 3.3, equation 6).

    Args:
        place: where x starts.
        ahead: (C, h, w), the direction times its step size.
        scale: gamma.
        moves: how many.
        here: eps(x) of the first move, where it is known.

    Returns:
        x before the first move and after each.
    """
    path = [place.latents]
    for number in range(moves):
        latents = path[-1]
        known = here if number == 0 else None
        rows = [latents + ahead] if known is not None else [latents + ahead, latents]
        denoised: Denoised = yield Denoise(
            torch.stack(rows), [place.level] * len(rows), [place.conditioning] * len(rows)
        )
        noises = denoised.predictions.noise
        path.append(latents + scale * (noises[0] - (noises[1] if known is None else known)))
    return path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """From the level of the edit down to the image: what all results of a trajectory have in common."""

    editor: Riemannian
    trajectory: Trajectory
    first_step: int
    predict: Predict
    residuals: Tensor | None  # (N - first_step, C, h, w): what each step of the source misses its trajectory by

    @classmethod
    def begin(cls, editor: Riemannian, trajectory: Trajectory) -> Steps[Sampling]:
        """Under the prompt and guidance of the inversion."""
        prompt = yield from GuidedPrompt.encode(
            trajectory.source_prompt, trajectory.source_guidance, trajectory.source.negative_prompt
        )
        first = editor.step_among(trajectory.levels)
        residuals = None
        if trajectory.pinned:
            residuals = yield from source_residuals(trajectory, prompt, first)
        return cls(
            editor=editor,
            trajectory=trajectory,
            first_step=first,
            predict=guided(trajectory, prompt),
            residuals=residuals,
        )

    def sample(self, latents: Tensor) -> Steps[Tensor]:
        """Moved latents (C, h, w) down to clean ones."""
        trajectory = self.trajectory
        draw = trajectory.source.editing_noise()
        _, previous = start_of(trajectory, self.first_step)
        for number, step in enumerate(range(self.first_step, trajectory.num_steps)):
            prediction = yield from self.predict(latents, step)
            if trajectory.levels[step].timestep < self.editor.late_noise * TIMESTEPS:
                assert isinstance(trajectory.solver, DDIM), "pair_problems lets no other by"
                noisy = dataclasses.replace(trajectory.solver, eta=1.0)
                mean, sigma, previous = noisy.transition(step, latents, prediction, previous)
                latents = mean + sigma * draw()
            else:
                latents, previous = take_step(trajectory, step, latents, prediction, previous)
            if self.residuals is not None:
                latents = latents + self.residuals[number]
            if tell := observer():
                source = trajectory.latents[step + 1] if trajectory.pinned else None
                tell(StepRecord(step=step, latents=latents, masks=no_masks(latents), source_latents=source))
        return latents
