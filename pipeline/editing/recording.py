"""What an editor records of the network's blocks: at which steps, and which places of it are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.diffusion.levels import Level
from pipeline.editing.problems import PUNCTUATION
from pipeline.engine.calls import Conditioning
from pipeline.errors import EditError
from pipeline.recordings import Recorded, Recording, RecordingKey
from pipeline.records import Source

TIMESTEPS = 1000  # of which times are shares
MOST_WORDS = 16  # of a prompt that are watched
NO_THINGS = (
    "a an and are as at be by for from has he her his in into is it its of on or over she some that the their there "
    "these this those to under very was were wearing with"
)
UNNAMING = frozenset(NO_THINGS.split())


def recorded_at(record: Recording | None, levels: Sequence[Level]) -> dict[int, list[RecordingKey]]:
    """What is to be recorded, by step: each time at the step whose timestep is nearest, of two the noisier one.

    Raises:
        EditError: two times are one step.
    """
    if record is None:
        return {}
    steps = {
        time: min(range(len(levels)), key=lambda step: abs(levels[step].timestep - time * TIMESTEPS))
        for time in record.times
    }
    if len(set(steps.values())) < len(steps):
        raise EditError(
            f"record.times {list(record.times)} are not as many steps: of {len(levels)}, {sorted(steps.values())} are "
            "the nearest. Raise inversion.num_steps, or leave out a time"
        )
    found: dict[int, list[RecordingKey]] = {}
    for key in record.all_keys():
        found.setdefault(steps[key.time], []).append(key)
    return found


def words_of(prompt: Conditioning) -> tuple[tuple[str, ...], Tensor]:
    """The words of a prompt that name something, each once, `MOST_WORDS` at most, and the weights (S, L) of their
    tokens."""
    words = [word.strip(PUNCTUATION).casefold() for word in prompt.prompt.split()]
    names = [word for word in dict.fromkeys(words) if word and word not in UNNAMING][:MOST_WORDS]
    weights = torch.zeros((len(names), prompt.length))
    for number, name in enumerate(names):
        places = prompt.places_of({at for at, word in enumerate(words) if word == name})
        weights[number, places] = 1.0
    return tuple(names), weights


def kept(
    written: Tensor, key: RecordingKey, step: int, level: Level, positions: int | None, source: Source
) -> Recorded:
    """What a block wrote, (D, h', w'), at places that the image's noise draws: the same for all blocks of a size."""
    channels, height, width = (int(side) for side in written.shape)
    count, wanted = height * width, positions or height * width
    chosen = torch.arange(count)
    if wanted < count:
        draw, most = source.editing_noise(), source.latents.numel()
        numbers = torch.cat([draw().flatten() for _ in range(-(-count // most))])[:count]
        chosen = numbers.argsort()[:wanted].sort().values
    return Recorded(
        key=key,
        step=step,
        timestep=level.timestep,
        shape=(channels, height, width),
        positions=tuple(chosen.tolist()),
        vectors=written.reshape(channels, -1)[:, chosen].mT.float(),
    )
