"""Replays a sparse autoencoder that was trained for a few batches, and what is added to a block's output with it.

Recorded by the published code for SDXL-Turbo's blocks (batches of known vectors, no network). A file may hold any
number of steps; what was not recorded is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.diffusion.sparse_autoencoder import SparseAutoencoder, codes_of_map
from pipeline.diffusion.sparse_training import SparseLoss, SparseTraining, dead_codes
from pipeline.engine.engine import Engine
from tests.golden.checks import Check, equal, relative

STATE = {"W_enc": 0, "W_dec": 1, "b_pre": 2, "b_lat": 3}  # places among `parameters`


def as_recorded(name: str, tensor: Tensor) -> Tensor:
    """The decoder is recorded with a column for each feature, and is kept here with a row for each."""
    return tensor.mT if name.startswith("W_dec") else tensor


def close(name: str, ours: Tensor, golden: Tensor) -> Check:
    """Within 1e-5 of the largest golden value; of zeros, of 1."""
    if not golden.any():
        return Check(name, float(ours.abs().max()), 1e-5)
    return Check(name, relative(ours, golden), 1e-5)


def autoencoder_of(golden: dict[str, Tensor], settings: dict[str, Any], prefix: str = "") -> SparseAutoencoder:
    parameters = [as_recorded(name, golden[prefix + name]).clone() for name in STATE]
    return SparseAutoencoder(*parameters, settings["k"])


def replay_sae_concepts(golden: dict[str, Tensor], settings: dict[str, Any], engine: Engine) -> Iterator[Check]:
    """Codes, losses, gradients, counters and parameters of every recorded batch; then what hooks add."""
    if "X" in golden:
        yield from replay_training(golden, settings)
    yield from replay_hooks(golden, settings)


def replay_training(golden: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[Check]:
    """The codes of the first batch, then every batch as it is learnt from."""
    autoencoder = autoencoder_of(golden, settings)
    yield equal("sizes", autoencoder.encoder.shape, torch.tensor([settings["n_features"], settings["d"]]))
    codes = autoencoder.encode(golden["X"][0])
    if "encode0" in golden:
        yield close("codes", codes.dense(autoencoder.num_features), golden["encode0"])
    if "recon0" in golden:
        yield close("decoded", autoencoder.decode(codes), golden["recon0"])
    training = SparseTraining.begin(autoencoder, loss_of(golden, settings))
    for step in range(len(golden["X"])):  # the last ones may be recorded by what they leave alone
        yield from replay_step(step, golden, training)
    for name, place in STATE.items():
        if f"final_{name}" in golden:
            yield close(
                f"final {name}", as_recorded(name, autoencoder.parameters[place].detach()), golden[f"final_{name}"]
            )


def loss_of(golden: dict[str, Tensor], settings: dict[str, Any]) -> SparseLoss:
    """What was minimised. What a file does not say is the published default; without auxk there is one term."""
    aux_k = settings.get("auxk")
    return SparseLoss(
        scale=float(golden["mse_scale"]),
        dead_after=settings["dead_steps_threshold"],
        aux_k=aux_k or 0,
        aux_coefficient=0.0 if aux_k is None else settings.get("auxk_coef", 1 / 32),
        learning_rate=settings.get("lr", 1e-4),
        adam_eps=settings.get("adam_eps", 6.25e-10),
        as_published=True,
    )


def replay_step(step: int, golden: dict[str, Tensor], training: SparseTraining) -> Iterator[Check]:
    """One batch, taken apart where the recording is."""
    autoencoder, vectors = training.autoencoder, golden["X"][step]
    with torch.no_grad():
        preactivations = autoencoder.preactivations(vectors)
        decoded = autoencoder.decode(autoencoder.encode(vectors))
    losses = training.backward(vectors)
    if step < len(golden.get("losses", ())):
        yield close(f"losses {step}", torch.tensor(losses).double(), golden["losses"][step].double())
    if f"recons_{step}" in golden:
        yield close(f"reconstruction {step}", decoded, golden[f"recons_{step}"])
    if f"stats_{step}" in golden:
        yield equal(f"counters {step}", training.last_fired.tolist(), golden[f"stats_{step}"])
    if f"auxk_inds_{step}" in golden:
        yield from replay_dead(step, golden, preactivations, training)
    for name, place in STATE.items():
        if f"grad_{name}_{step}" in golden:
            grad = autoencoder.parameters[place].grad
            yield close(f"gradient of {name} {step}", as_recorded(name, grad), golden[f"grad_{name}_{step}"])
    training.keep_length()
    if f"grad_W_dec_adj_{step}" in golden:
        grad = autoencoder.directions.grad
        yield close(f"gradient without length {step}", as_recorded("W_dec", grad), golden[f"grad_W_dec_adj_{step}"])
    training.optimizer.step()
    if f"dec_norm_after_{step}" in golden:
        yield close(f"lengths {step}", autoencoder.directions.detach().norm(dim=1), golden[f"dec_norm_after_{step}"])


def replay_dead(
    step: int, golden: dict[str, Tensor], preactivations: Tensor, training: SparseTraining
) -> Iterator[Check]:
    """The dead features of every vector. Recorded are as many as asked for, filled up with living ones of value 0."""
    features, values = golden[f"auxk_inds_{step}"], golden[f"auxk_vals_{step}"]
    ours = torch.zeros_like(preactivations)
    if (codes := dead_codes(preactivations, training.last_fired, training.loss)) is not None:
        ours = codes.dense(ours.shape[1])
    theirs = torch.zeros_like(ours).scatter_add(1, features, values)
    yield close(f"dead features {step}", ours, theirs)


def replay_hooks(golden: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[Check]:
    """What is added to a block's output (B, D, h, w), and the output that codes alone make."""
    if "h_out" not in golden:
        return
    autoencoder = autoencoder_of(golden, settings, "final_" if "final_W_enc" in golden else "")
    output = golden["h_out"]
    if "add_global" in golden:
        everywhere = settings["global_value"] * direction_of(golden, autoencoder)
        yield close("added everywhere", output + everywhere, golden["add_global"])
    if "add_area" in golden:  # one map (h, w) for all, or one for each
        by_map = golden["amap"][..., None, :, :] * direction_of(golden, autoencoder)
        yield close("added by a map", output + by_map, golden["add_area"])
    if "recon_block" in golden:
        given = golden["h_in"]
        codes = torch.stack([codes_of_map(autoencoder, written) for written in output - given])
        decoded = (codes @ autoencoder.directions + autoencoder.bias).permute(0, 3, 1, 2)
        yield close("output of codes alone", given + decoded, golden["recon_block"])


def direction_of(golden: dict[str, Tensor], autoencoder: SparseAutoencoder) -> Tensor:
    """(D, 1, 1): the direction of the recorded feature."""
    return autoencoder.directions[int(golden["feature"])][:, None, None]
