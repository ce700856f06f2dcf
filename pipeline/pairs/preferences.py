"""Pairs of a better and a worse result of one source and one instruction, for trainers that learn from preferences.

The better one passed its run's gates. By a score it is the best of those that did, and the worse one the worst of all
others; without a score it is the one that was chosen, and the worse one the first that gates rejected. Ties make no
pair, and neither does a result that has no score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import RecipeError
from pipeline.evaluation.measures import MEASURES
from pipeline.pairs.results import Place

Better = Literal["higher", "lower"]
BY_GATES = "gates"
"""Name of the score where gates alone decide."""
DIRECTIONS: dict[str, bool | None] = {name: one.higher_is_better for name, one in MEASURES.items()} | {
    "background_psnr": True,
    "background_ssim": True,
    "inversion_psnr": True,
    "denoise_gain": True,
    "reconstruction_psnr": True,
    "rest_change": False,
    "align_corner_px": False,
    "nsfw_score": False,
}
"""Whether more of a figure is better; None or not there: that depends on what is wanted."""


@dataclass(frozen=True, slots=True)
class Score:
    """What decides which result is better."""

    name: str
    higher: bool  # is better


@dataclass(frozen=True, slots=True)
class Candidate:
    """A result that may be one of a pair."""

    place: Place
    size: int  # bytes of its pictures
    source: bytes  # digest of the input
    accepted: bool
    score: float | None


@dataclass(frozen=True, slots=True)
class Preferred:
    """A better and a worse result."""

    better: Candidate
    worse: Candidate


def score_of(name: str | None, better: Better | None, figures: Collection[str]) -> Score | None:
    """The score that is asked for; None: gates decide.

    Args:
        name: of a figure of the runs.
        better: which end of it; None: as is known of the figure.
        figures: that the runs have.

    Raises:
        RecipeError: no run has it, or it is not known which end is the better one.
    """
    if name is None:
        if better is not None:
            raise RecipeError(
                "preference pairs", [("score", "is missing: --better says which end of --score is meant")]
            )
        return None
    if name not in figures:
        raise RecipeError(
            "preference pairs",
            [("score", f"{name!r} is no figure of these runs. They have: {', '.join(sorted(figures))}")],
        )
    higher = DIRECTIONS.get(name) if better is None else better == "higher"
    if higher is None:
        raise RecipeError(
            "preference pairs", [("better", f"say which end of {name} is wanted: --better higher or lower")]
        )
    return Score(name, higher)


def pairs_among(
    candidates: Sequence[Candidate], score: Score | None, min_margin: float, why_not: Counter[str]
) -> Preferred | None:
    """The pair that the results of one source and instruction make.

    Args:
        candidates: those results, in the order of runs, units and rows.
        score: that decides; None: gates do.
        min_margin: by which the better one must be better, in the score's unit.
        why_not: counts why there is none.
    """
    if len(candidates) < 2:
        why_not["one result alone"] += 1
        return None
    passed = [one for one in candidates if one.accepted]
    if not passed:
        why_not["no result passed the gates"] += 1
        return None
    if score is None:
        others = [one for one in candidates if not one.accepted]
        if not others:
            why_not["no result was rejected"] += 1
            return None
        return Preferred(passed[0], others[0])
    sign = 1.0 if score.higher else -1.0
    scored = [(sign * one.score, one) for one in candidates if one.score is not None]
    best = max((value for value, one in scored if one.accepted), default=None)
    worst = min((value for value, _ in scored), default=None)
    if best is None or worst is None or len(scored) < 2:
        why_not[f"without {score.name}"] += 1
        return None
    if best == worst or best - worst < min_margin:
        why_not["none scores below the best" if best == worst else f"less than {min_margin:g} apart"] += 1
        return None
    better = next(one for value, one in scored if one.accepted and value == best)
    return Preferred(better, next(one for value, one in scored if value == worst))
