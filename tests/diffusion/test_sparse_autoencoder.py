"""Sparse autoencoders: codes, what dead features learn, workers that share a batch, what is found of known truth."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.diffusion.sparse_autoencoder import (
    Codes,
    SparseAutoencoder,
    codes_of_map,
    dead,
    explained_variance,
    geometric_median,
    initial,
    strongest,
)
from pipeline.diffusion.sparse_training import ALONE, SparseLoss, SparseTraining, Workers, dead_codes, variance_scale

D, F, K, B = 8, 24, 3, 40
LOSS = SparseLoss(scale=1.0, dead_after=2, aux_k=5, learning_rate=1e-2)


def vectors(seed: int, count: int = B) -> Tensor:
    return torch.randn((count, D), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoencoder(k: int = K) -> SparseAutoencoder:
    return initial(vectors(0), F, k, torch.Generator().manual_seed(1))


def trained(loss: SparseLoss = LOSS, silenced: int = 0, batches: int = 0) -> SparseTraining:
    """In training, with the last `silenced` features unable to fire, and dead."""
    made = autoencoder()
    made.latent_bias[F - silenced :] = -100.0
    training = SparseTraining.begin(made, loss)
    training.last_fired[F - silenced :] = loss.dead_after + 1
    for number in range(batches):
        training.update(vectors(10 + number))
    return training


def test_codes_are_the_k_largest_positive_answers_and_all_of_them_make_a_plain_encoder() -> None:
    made, some = autoencoder(), vectors(2)
    codes = made.encode(some)
    answers = (some - made.bias) @ made.encoder.T + made.latent_bias
    assert (codes.values >= 0).all()
    assert codes.features.shape == (B, K)
    kept = codes.dense(F)
    least_kept = torch.where(kept > 0, kept, torch.inf).amin(dim=1)
    assert (torch.where(kept > 0, -torch.inf, answers).amax(dim=1) <= least_kept).all()
    assert ((kept > 0).sum(dim=1) == (answers > 0).sum(dim=1).clamp_max(K)).all()
    torch.testing.assert_close(autoencoder(k=F).encode(some).dense(F), answers.relu())
    low = strongest(-torch.ones((1, F)), K)
    assert not low.values.any(), "negative answers are no codes"


def test_sparse_and_dense_decoding_agree_and_a_map_is_encoded_place_by_place() -> None:
    made = autoencoder()
    some = vectors(3)
    codes = made.encode(some)
    torch.testing.assert_close(made.decode(codes), codes.dense(F) @ made.directions + made.bias, atol=1e-6, rtol=0)
    written = some[:6].T.reshape(D, 2, 3)
    torch.testing.assert_close(codes_of_map(made, written), codes.dense(F)[:6].view(2, 3, F))


def test_parameters_that_do_not_go_together_are_refused() -> None:
    made = autoencoder()
    with pytest.raises(ValueError, match="24x8 does not go with directions"):
        SparseAutoencoder(made.encoder, made.directions.T, made.bias, made.latent_bias, K)
    with pytest.raises(ValueError, match="k is 25"):
        SparseAutoencoder(*made.parameters, 25)


def test_directions_stay_unit_and_their_gradients_change_no_length() -> None:
    training = trained()
    for number in range(3):
        training.backward(vectors(10 + number))
        training.keep_length()
        grad, directions = training.autoencoder.directions.grad, training.autoencoder.directions
        assert float((grad * directions.detach()).sum(dim=1).abs().max()) < 1e-12
        training.optimizer.step()
    training.update(vectors(20))
    torch.testing.assert_close(training.autoencoder.directions.norm(dim=1), torch.ones(F, dtype=torch.float64))
    published = trained(replace(LOSS, as_published=True), batches=3)
    assert float((published.autoencoder.directions.norm(dim=1) - 1).abs().max()) > 1e-4, "as the golden has it"


def test_counters_go_up_with_every_batch_and_begin_anew_where_a_feature_fires() -> None:
    training = trained(silenced=4)
    before = training.last_fired.clone()
    fired = training.autoencoder.encode(vectors(5)).fired(F)
    training.update(vectors(5))
    assert torch.equal(training.last_fired, torch.where(fired, 1, before + 1))
    assert torch.equal(dead(training.last_fired, 2), training.last_fired >= 3)


def test_dead_features_learn_of_what_is_missed_and_no_living_one_does() -> None:
    training = trained(silenced=4)
    training.autoencoder.latent_bias.data[F - 4 :] = -1.0  # may answer, and is never among the k
    some = vectors(6)
    answers = training.autoencoder.preactivations(some).detach()
    codes = dead_codes(answers, training.last_fired, LOSS)
    assert codes is not None
    assert codes.features.shape == (B, 4), "no more than there are"
    assert (codes.features >= F - 4).all()
    alone = replace(LOSS, scale=0.0)  # the second term alone
    training = SparseTraining(training.autoencoder, alone, training.last_fired)
    losses = training.backward(some)
    assert losses.auxiliary > 0
    for parameter in (training.autoencoder.encoder, training.autoencoder.directions, training.autoencoder.latent_bias):
        assert parameter.grad is not None
        assert not parameter.grad[: F - 4].any()
        assert parameter.grad[F - 4 :].any()


def test_without_dead_features_or_with_aux_k_0_there_is_no_second_term() -> None:
    assert trained().backward(vectors(7)).auxiliary == 0.0
    assert trained(replace(LOSS, aux_k=0), silenced=4).backward(vectors(7)).auxiliary == 0.0


def test_vectors_that_are_decoded_exactly_give_no_second_term_and_no_nan() -> None:
    training = trained(silenced=4)
    exact = training.autoencoder.bias.detach().repeat(B, 1)
    training.autoencoder.latent_bias.data.fill_(-1.0)
    losses = training.backward(exact)
    assert losses == (0.0, 0.0)
    assert all(bool(torch.isfinite(one.grad).all()) for one in training.autoencoder.parameters if one.grad is not None)


class Side(Workers):
    """One of two workers, in threads: each waits until the other has said its part."""

    def __init__(self, own: int, said: list[Any], meeting: threading.Barrier) -> None:
        self.own, self.said, self.meeting = own, said, meeting

    def _both(self, tensor: Tensor) -> list[Tensor]:
        self.said[self.own] = tensor
        self.meeting.wait(60)
        both = list(self.said)
        self.meeting.wait(60)
        return both

    def total(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._both(tensor)).sum(dim=0)

    def any(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._both(tensor)).any(dim=0)


def test_two_workers_with_a_part_of_every_batch_each_learn_what_one_learns_of_all_of_it() -> None:
    one, pair = trained(silenced=4), [trained(silenced=4), trained(silenced=4)]
    for training in (one, *pair):
        training.autoencoder.latent_bias.data[F - 4 :] = -1.0
    losses = [one.update(vectors(30 + number)) for number in range(4)]
    said, meeting, heard = [None, None], threading.Barrier(2), [[], []]

    def work(own: int) -> None:
        for number in range(4):
            whole = vectors(30 + number)
            part = whole[:10] if own == 0 else whole[10:]  # unequal parts, too
            heard[own].append(pair[own].update(part, Side(own, said, meeting)))

    threads = [threading.Thread(target=work, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses[0].auxiliary > 0
    for training, told in zip(pair, heard, strict=True):
        torch.testing.assert_close(torch.tensor(told), torch.tensor(losses))
        assert torch.equal(training.last_fired, one.last_fired)
        for ours, theirs in zip(training.autoencoder.parameters, one.autoencoder.parameters, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_training_goes_on_from_a_state_to_the_same_bits() -> None:
    whole = trained(silenced=4, batches=6)
    part = trained(silenced=4, batches=3)
    state = copy.deepcopy(part.state())
    part.update(vectors(99))  # what a state holds stays
    again = SparseTraining.of_state(state, K, LOSS)
    for number in range(3, 6):
        again.update(vectors(10 + number))
    assert again.batches == 6
    assert all(
        torch.equal(one, other) for one, other in zip(again.state().values(), whole.state().values(), strict=True)
    )


def test_the_geometric_median_is_moved_less_by_a_stray_vector_than_the_mean_is() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1000.0, 0.0]])
    median = geometric_median(points)
    distances = [float((points - point).norm(dim=1).sum()) for point in (median, median + 0.01, median - 0.01)]
    assert min(distances) == distances[0]
    assert float(median.norm()) < 2


def test_the_scale_makes_the_mean_a_loss_of_one_and_vectors_that_are_all_alike_are_refused() -> None:
    some = vectors(8)
    missed = (some - some.mean(dim=0)).square().mean()
    assert float(missed) * variance_scale(some) == pytest.approx(1.0)
    assert explained_variance(some, some.mean(dim=0).expand_as(some)) == pytest.approx(0.0)
    assert explained_variance(some, some) == 1.0
    with pytest.raises(ValueError, match="nothing to learn"):
        variance_scale(torch.ones((4, 2)))


def drawn(count: int, generator: torch.Generator, truth: Tensor, weights: Tensor) -> Tensor:
    """Vectors of three known directions each, the frequent ones more often."""
    chosen = torch.multinomial(weights.expand(count, -1), 3, generator=generator)
    amplitudes = 0.5 + torch.rand((count, 3), generator=generator)
    return (truth[chosen] * amplitudes[..., None]).sum(dim=1)


def recovery(aux_k: int, seed: int, batches: int = 3000) -> tuple[float, float]:
    """Share of dead features, and mean best cosine with the known directions, after training."""
    generator = torch.Generator().manual_seed(seed)
    truth = normalize(torch.randn((96, 32), generator=generator), dim=1)
    weights = 1.0 / torch.arange(1, 97, dtype=torch.float32)
    sample = drawn(4096, generator, truth, weights)
    made = initial(sample, 192, 4, generator)
    made.latent_bias[: 192 * 3 // 4] -= 1.0
    loss = SparseLoss(scale=variance_scale(sample), dead_after=30, aux_k=aux_k, learning_rate=3e-3)
    training = SparseTraining.begin(made, loss)
    for _ in range(batches):
        training.update(drawn(256, generator, truth, weights), ALONE)
    fresh = drawn(32768, generator, truth, weights)
    silent = 1.0 - float(made.encode(fresh).fired(192).double().mean())
    return silent, float((truth @ made.directions.detach().T).amax(dim=1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_second_term_brings_dead_features_back_and_finds_more_of_what_is_there(seed: int) -> None:
    dead_without, found_without = recovery(0, seed)
    dead_with, found_with = recovery(32, seed)
    assert dead_with <= dead_without - 0.02
    assert found_with >= found_without + 0.02


def test_codes_fire_above_a_thousandth() -> None:
    codes = Codes(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1.0, 1e-3], [2e-3, 0.0]]))
    assert codes.fired(5).tolist() == [True, False, True, False, False]
