"""Training of a sparse autoencoder: one batch at a time, in one process or in several that share the batch.

    loss = s mean (x - x')^2 + alpha mean (r - r')^2 / mean (r - mean r)^2

r = x - x' is what is missed, held fixed, and r' what dead features alone would make of it: so they learn what the
living ones leave (Gao et al., arXiv 2406.04093, appendix A.2). s makes the first term 1 for who always answers with the
mean. Memory: the parameters, their gradients and two moments; one (B, F) matrix of a batch, and its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.diffusion.sparse_autoencoder import Codes, SparseAutoencoder, dead, strongest, unit_rows


class Workers:
    """The processes that share every batch: what each is given comes back as if one had had all of it.

    As it stands there is one, which has the whole batch.
    """

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all of them."""
        return tensor

    def any(self, tensor: Tensor) -> Tensor:
        """Of booleans: where one of them has True."""
        return tensor


ALONE = Workers()


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseLoss:
    """What is minimised, and how."""

    scale: float  # s: 1 / the mean variance of a sample of vectors
    dead_after: int  # batches of silence after which a feature counts as dead
    aux_k: int = 256  # dead features that a vector may have; 0: none, and dead ones stay so
    aux_coefficient: float = 1.0 / 32.0  # alpha
    learning_rate: float = 1e-4
    adam_eps: float = 6.25e-10
    # As the published code: directions are made unit before a step and not behind it, so that they are off by up to a
    # percent when used; the second term stands where nothing is dead, too; and b, which r and r' both have, takes a
    # gradient of it.
    as_published: bool = False


class Losses(NamedTuple):
    """The terms of the loss of one batch, of all workers together."""

    reconstruction: float  # s mean (x - x')^2
    auxiliary: float  # alpha times the rest


def variance_scale(vectors: Float[Tensor, "B D"]) -> float:
    """s of a sample of vectors.

    Raises:
        ValueError: they are all the same.
    """
    variance = float((vectors - vectors.mean(dim=0)).square().mean())
    if not variance > 0.0:
        raise ValueError("all vectors are the same: there is nothing to learn of them")
    return 1.0 / variance


def dead_codes(preactivations: Float[Tensor, "B F"], last_fired: Int[Tensor, "F"], loss: SparseLoss) -> Codes | None:
    """The strongest dead features of each vector; None where none is dead, or none are wanted."""
    is_dead = dead(last_fired, loss.dead_after)
    count = min(loss.aux_k, int(is_dead.sum()))
    if not count:
        return None
    return strongest(preactivations.masked_fill(~is_dead, -torch.inf), count)


@dataclass(slots=True, eq=False)
class SparseTraining:
    """An autoencoder in training: all that a checkpoint must hold to go on to the same bits."""

    autoencoder: SparseAutoencoder
    loss: SparseLoss
    last_fired: Int[Tensor, "F"]  # batches since each feature last had a code above `FIRES_ABOVE`
    batches: int = 0
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        for parameter in self.autoencoder.parameters:
            parameter.requires_grad_()
        self.optimizer = torch.optim.Adam(
            self.autoencoder.parameters, lr=self.loss.learning_rate, eps=self.loss.adam_eps
        )

    @classmethod
    def begin(cls, autoencoder: SparseAutoencoder, loss: SparseLoss) -> SparseTraining:
        """Nothing is dead before a batch has been seen."""
        silent = torch.zeros(autoencoder.num_features, dtype=torch.int64, device=autoencoder.bias.device)
        return cls(autoencoder, loss, silent)

    def update(self, vectors: Float[Tensor, "B D"], workers: Workers = ALONE) -> Losses:
        """Learn from one batch, of which this process has `vectors` and the other workers the rest."""
        found = self.backward(vectors, workers)
        for parameter in self.autoencoder.parameters:
            assert parameter.grad is not None
            parameter.grad = workers.total(parameter.grad)
        self.keep_length()
        self.optimizer.step()
        if not self.loss.as_published:
            with torch.no_grad():
                self.autoencoder.directions.copy_(unit_rows(self.autoencoder.directions))
        self.batches += 1
        return found

    def backward(self, vectors: Float[Tensor, "B D"], workers: Workers = ALONE) -> Losses:
        """Count who fired, and leave this process's share of the gradients in the parameters."""
        self.optimizer.zero_grad()
        autoencoder = self.autoencoder
        count = workers.total(vectors.new_tensor(float(len(vectors)))) * autoencoder.size  # numbers of the whole batch
        preactivations = autoencoder.preactivations(vectors)
        codes = strongest(preactivations, autoencoder.k)
        decoded = autoencoder.decode(codes)
        # Before the dead are told: who has just fired is not dead.
        fired = workers.any(codes.fired(autoencoder.num_features))
        self.last_fired = torch.where(fired, 0, self.last_fired) + 1
        reconstruction = self.loss.scale * (vectors - decoded).square().sum() / count
        auxiliary = self._auxiliary(vectors, decoded.detach(), preactivations, count, workers)
        (reconstruction + auxiliary).backward()
        return Losses(float(workers.total(reconstruction.detach())), float(workers.total(auxiliary.detach())))

    def _auxiliary(
        self, vectors: Tensor, decoded: Tensor, preactivations: Tensor, count: Tensor, workers: Workers
    ) -> Tensor:
        """This process's share of the second term; 0 where no feature is dead."""
        codes = dead_codes(preactivations, self.last_fired, self.loss)
        if codes is None and not self.loss.as_published:  # for all workers, which count alike
            return vectors.new_zeros(())
        missed = vectors - decoded
        rows = count / self.autoencoder.size
        mean = workers.total(missed.sum(dim=0)) / rows
        spread = workers.total((missed - mean).square().sum()) / count
        if not spread > 0.0:
            return vectors.new_zeros(())
        error = missed if codes is None else missed - self.autoencoder.combined(codes)
        if self.loss.as_published:
            error = error + (self.autoencoder.bias.detach() - self.autoencoder.bias)
        return self.loss.aux_coefficient * error.square().sum() / count / spread

    @torch.no_grad()
    def keep_length(self) -> None:
        """Make directions unit, and take from their gradients what would only change their length."""
        directions, grad = self.autoencoder.directions, self.autoencoder.directions.grad
        assert grad is not None
        directions.copy_(unit_rows(directions))
        grad -= (grad * directions).sum(dim=1, keepdim=True) * directions

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from, by name; tensors are copies."""
        names = ("encoder", "directions", "bias", "latent_bias")
        found: dict[str, Any] = {
            name: parameter.detach().clone() for name, parameter in zip(names, self.autoencoder.parameters, strict=True)
        }
        moments = self.optimizer.state_dict()["state"]
        for at, name in enumerate(names):
            for moment in ("exp_avg", "exp_avg_sq"):
                if at in moments:
                    found[f"{name}.{moment}"] = moments[at][moment].clone()
        return {**found, "last_fired": self.last_fired.clone(), "batches": torch.tensor(self.batches)}

    @classmethod
    def of_state(cls, state: dict[str, Any], k: int, loss: SparseLoss) -> SparseTraining:
        """Training as `state` left it."""
        names = ("encoder", "directions", "bias", "latent_bias")
        encoder, directions, bias, latent_bias = (state[name].clone() for name in names)
        autoencoder = SparseAutoencoder(encoder, directions, bias, latent_bias, k)
        made = cls(autoencoder, loss, state["last_fired"].clone(), int(state["batches"]))
        if made.batches:
            step = torch.tensor(float(made.batches))
            moments = {
                at: {"step": step.clone(), **{key: state[f"{name}.{key}"].clone() for key in ("exp_avg", "exp_avg_sq")}}
                for at, name in enumerate(names)
            }
            made.optimizer.load_state_dict({**made.optimizer.state_dict(), "state": moments})
        return made
