"""Null-text Inversion (Mokady et al., arXiv 2211.09794): unconditional embeddings that hold guidance on the trajectory.

After plain DDIM inversion the unconditional text embedding is optimised step by step, from the noisiest level down, so
that one guided step lands on the inverted latents. Guided sampling of the source prompt then returns the image.

Cost: N rows of inversion, then per step 2 + 3 J with J updates of the embedding (a backward pass counts as two forward
ones), fewer where the loss falls under its limit early. Updates of different images share network calls. Memory: 2 N +
1 latents and N embeddings per image, 12 MB at 77 x 768 and 50 steps. Deterministic. Reconstruction: nearly exact, at
the guidance that was optimised for and no other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from pipeline.diffusion.guidance import classifier_free_guidance
from pipeline.diffusion.levels import Prediction
from pipeline.engine.backbone import Offers
from pipeline.engine.calls import Conditioning, Denoise, Denoised, EncodeText, Steps
from pipeline.inversion.ddim import DDIMInversion
from pipeline.records import Source, Trajectory, UncondScope


class NullTextInversion(DDIMInversion):
    """DDIM inversion, and one optimised unconditional embedding per step."""

    provides: ClassVar = frozenset({"DDIM steps", "path"})
    demands: ClassVar = frozenset({"unconditional prompt"})
    exact: ClassVar = "nearly, at the guidance that it was optimised for"
    paper: ClassVar = "Null-text Inversion for Editing Real Images using Guided Diffusion Models, arXiv 2211.09794"

    method: Literal["null_text"] = "null_text"  # type: ignore[assignment]  # tag of the union
    """Null-text inversion: DDIM inversion, and one optimised unconditional embedding per step."""
    edit_guidance_scale: float = Field(default=7.5, allow_inf_nan=False)
    """Guidance scale of the editor that will use the embeddings."""
    num_inner_steps: int = Field(default=10, ge=0)
    """J: updates of the embedding per step, at most; 0: none."""
    early_stop_epsilon: float = Field(default=1e-5, ge=0)
    """Mean squared error of latents at which a step is done; 2e-5 more at every later step."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Learning rate of Adam at the first step."""
    learning_rate_steps: int | None = Field(default=None, ge=1)
    """Over how many steps the learning rate would fall to zero. None: twice num_steps. The published code has 100
    whatever the number of steps, which is the same at its 50."""
    uncond_scope: UncondScope = "all"
    """Which branches of an editor take the embeddings: all, or the source branch alone."""

    @property
    @override
    def uncond_for(self) -> UncondScope:
        return self.uncond_scope

    @property
    @override
    def made_for_guidance(self) -> float:
        return self.edit_guidance_scale

    @override
    def model_problems(self, offers: Offers) -> Iterator[str]:
        yield from super().model_problems(offers)
        if not offers.embedding_gradients:
            yield (
                "null_text optimises text embeddings, and this model gives no gradients to them. Use inversion.method "
                "negative_prompt"
            )

    @override
    def invert(self, source: Source) -> Steps[Trajectory]:
        trajectory = yield from super().invert(source)
        cond, empty = yield EncodeText((source.prompt, ""))
        uncond = yield from self.optimise(trajectory, cond, empty)
        return dataclasses.replace(
            trajectory,
            uncond=uncond,
            uncond_scope=self.uncond_scope,
            source_guidance=self.edit_guidance_scale,
            second_order=None,  # embeddings are optimised for plain steps
        )

    def optimise(
        self, trajectory: Trajectory, cond: Conditioning, start: Conditioning
    ) -> Steps[tuple[Conditioning, ...]]:
        """What the network is told without a prompt at each of the N steps: embeddings of float32 or wider, on the CPU.

        Args:
            trajectory: whose latents the guided steps shall land on.
            cond: the source prompt.
            start: whose embedding (L, D) to begin with; what else it has stays.
        """
        outside = trajectory.latents.dtype
        uncond = start
        latents = trajectory.latents[0]
        stored = []
        for step, (level, _) in enumerate(trajectory.solver.steps):
            if self.edit_guidance_scale == 1.0 or self.num_inner_steps == 0:
                stored.append(uncond)  # the loss does not depend on the embedding, or nobody may change it
                continue
            denoised: Denoised = yield Denoise(latents[None], [level], [cond])
            objective = Objective(trajectory, step, latents, denoised.predictions[0], self.edit_guidance_scale)
            embedding = uncond.embedding.detach().to("cpu", outside, copy=True)  # of its own; what is stored stays
            rate = self.learning_rate * (1.0 - step / (self.learning_rate_steps or 2 * self.num_steps))
            adam = torch.optim.Adam([embedding], lr=rate)
            for _ in range(self.num_inner_steps):
                attempt: Denoised = yield Denoise(
                    latents[None], [level], [start.replacing(embedding=embedding)], cotangent=objective.gradient
                )
                assert attempt.embedding_grads is not None
                loss = objective.loss(attempt.predictions[0])
                embedding.grad = attempt.embedding_grads[0].to(outside)
                adam.step()
                if loss < self.early_stop_epsilon + step * 2e-5:
                    break
            uncond = start.replacing(embedding=embedding)
            stored.append(uncond)
            # The embedding has changed since the last prediction. What was achieved is gone on with, not what was
            # aimed at: an error stays visible to later steps, which can answer it.
            final: Denoised = yield Denoise(latents[None], [level], [uncond])
            latents = objective.landing(final.predictions[0])
        return tuple(stored)


@dataclasses.dataclass(frozen=True, slots=True)
class Objective:
    """How far a guided step from `latents` lands from the trajectory, as a function of the unconditional prediction."""

    trajectory: Trajectory
    step: int
    latents: Tensor  # (C, h, w)
    cond_pred: Prediction  # (C, h, w)
    guidance_scale: float

    def landing(self, uncond_pred: Prediction) -> Tensor:
        """Latents (C, h, w) after the guided step."""
        guided = classifier_free_guidance(uncond_pred, self.cond_pred, self.guidance_scale)
        return self.trajectory.solver.transition(self.step, self.latents, guided, None).mean

    def loss(self, uncond_pred: Prediction) -> float:
        """Mean squared distance to the trajectory's next latents."""
        return float(self._distance(uncond_pred))

    def _distance(self, uncond_pred: Prediction) -> Tensor:
        return (self.landing(uncond_pred) - self.trajectory.latents[self.step + 1]).square().mean()

    def gradient(self, uncond_pred: Prediction) -> Prediction:
        """Of the loss, with respect to either half of the prediction: (C, h, w). Never touches the model."""
        with torch.enable_grad():
            predicted = uncond_pred.both(lambda half: half.detach().requires_grad_())
            by_noise, by_data = torch.autograd.grad(self._distance(predicted), [predicted.noise, predicted.data])
        return Prediction(by_noise, by_data)
