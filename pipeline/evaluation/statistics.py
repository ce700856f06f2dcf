"""What a table of scores may claim: means with intervals, and differences between methods with corrected p values.

Resampled are the source images, with all of their edits: rows of one image are no independent witnesses. Intervals are
BCa bootstraps (Efron 1987); two methods are compared on the rows that both have, by Wilcoxon's signed-rank test with
Pratt's treatment of zeros, and p values over all pairs of a table are corrected by Holm's method or Bonferroni's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

Correction = Literal["holm", "bonferroni"]
FEWEST = 10  # images below which no interval is given
TIED = 1e-9  # differences up to this are none


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One number of a method."""

    image: str  # which source image: what is resampled
    item: str  # image and edit: what methods have in common
    edit_type: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeMean:
    """Of one type of edit."""

    mean: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """The scores of a method in one measure."""

    n: int
    mean_of_items: float | None
    median: float | None
    interval: tuple[float, float] | None  # of `mean_of_items`; None: too few images
    mean_of_types: float | None
    types_interval: tuple[float, float] | None
    types: dict[str, TypeMean]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Two methods in one measure, on the rows that both have; `mean_difference` is the first's minus the second's."""

    first: str
    second: str
    n: int
    wins: int  # of the larger value
    ties: int
    losses: int
    mean_difference: float | None
    interval: tuple[float, float] | None
    p: float | None
    p_adjusted: float | None
    tests: int  # that are corrected for


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How intervals are drawn and tests corrected."""

    resamples: int = 9999
    seed: int = 0
    correction: Correction = "holm"


def describe(scores: Sequence[Score], settings: Settings) -> Described:
    """Means, median and intervals of the rows with a number."""
    if not scores:
        return Described(
            n=0, mean_of_items=None, median=None, interval=None, mean_of_types=None, types_interval=None, types={}
        )
    values = [score.value for score in scores]
    by_type: dict[str, list[Score]] = {}
    for score in scores:
        by_type.setdefault(score.edit_type, []).append(score)
    types = {
        name: TypeMean(mean=_mean([score.value for score in some]), n=len(some))
        for name, some in sorted(by_type.items())
    }
    return Described(
        n=len(values),
        mean_of_items=_mean(values),
        median=float(np.median(values)),
        interval=interval_of_mean([(score.image, score.value) for score in scores], settings),
        mean_of_types=_mean([one.mean for one in types.values()]),
        types_interval=interval_of_type_means([by_type[name] for name in types], settings),
        types=types,
    )


def interval_of_mean(scores: Sequence[tuple[str, float]], settings: Settings) -> tuple[float, float] | None:
    """95 % of the mean of (image, value) over resampled images; None for fewer than `FEWEST`."""
    from scipy.stats import bootstrap

    totals, counts = _by_image(scores)
    if len(totals) < FEWEST:
        return None
    values = [value for _, value in scores]
    if max(values) == min(values):  # where BCa gives NaN
        return values[0], values[0]

    def mean(total: np.ndarray, count: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(total.sum(axis=axis) / count.sum(axis=axis))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of degenerate data, which gives NaN: told below
        found = bootstrap(
            (totals, counts),
            mean,
            paired=True,
            vectorized=True,
            n_resamples=settings.resamples,
            method="BCa",
            batch=max(1, 2**22 // len(totals)),
            rng=np.random.default_rng(settings.seed),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _by_image(scores: Sequence[tuple[str, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of every image."""
    values: dict[str, list[float]] = {}
    for image, value in scores:
        values.setdefault(image, []).append(value)
    return (
        np.array([math.fsum(some) for some in values.values()]),
        np.array([float(len(some)) for some in values.values()]),
    )


def interval_of_type_means(types: Sequence[Sequence[Score]], settings: Settings) -> tuple[float, float] | None:
    """95 % of the mean of the types' means, resampled within types, by percentiles; None where the images are too few
    or a type has one row alone."""
    if sum(len({score.image for score in some}) for some in types) < FEWEST or any(len(some) < 2 for some in types):
        return None
    rng = np.random.default_rng(settings.seed)
    means = np.zeros(settings.resamples)
    for some in types:
        totals, counts = _by_image([(score.image, score.value) for score in some])
        drawn = rng.integers(0, len(totals), (settings.resamples, len(totals)))
        means += totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1) / len(types)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare_all(methods: Mapping[str, Sequence[Score]], settings: Settings) -> list[Compared]:
    """Every two methods, in the order given, with p values corrected over all of them."""
    pairs = {
        (first, second): _differences(methods[first], methods[second]) for first, second in combinations(methods, 2)
    }
    return compare_differences(pairs, settings)


def compare_differences(
    pairs: Mapping[tuple[str, str], Sequence[tuple[str, float]]], settings: Settings
) -> list[Compared]:
    """Pairs of methods by what is known of each pair alone, with p values corrected over all of them.

    Args:
        pairs: (image, first minus second), by the two methods.
        settings: of intervals and tests.
    """
    found = [_compare(*pair, differences, settings) for pair, differences in pairs.items()]
    tested = [at for at, one in enumerate(found) if one.p is not None]
    adjusted = adjust([found[at].p or 0.0 for at in tested], settings.correction)
    by_place = dict(zip(tested, adjusted, strict=True))
    return [
        Compared(
            **{name: getattr(one, name) for name in Compared.__slots__ if name not in ("p_adjusted", "tests")},
            p_adjusted=by_place.get(at),
            tests=len(tested),
        )
        for at, one in enumerate(found)
    ]


def _differences(ones: Sequence[Score], others: Sequence[Score]) -> list[tuple[str, float]]:
    """Of the items that both have."""
    theirs = {score.item: score.value for score in others}
    return [(score.image, _snapped(score.value - theirs[score.item])) for score in ones if score.item in theirs]


def _compare(first: str, second: str, pairs: Sequence[tuple[str, float]], settings: Settings) -> Compared:
    differences = [difference for _, difference in pairs]
    wins = sum(difference > 0 for difference in differences)
    losses = sum(difference < 0 for difference in differences)
    return Compared(
        first=first,
        second=second,
        n=len(differences),
        wins=wins,
        ties=len(differences) - wins - losses,
        losses=losses,
        mean_difference=_mean(differences) if differences else None,
        interval=interval_of_mean(pairs, settings),
        p=signed_rank(differences),
        p_adjusted=None,
        tests=0,
    )


def signed_rank(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's test by its normal approximation; 1 for no difference at all, None for no rows."""
    from scipy.stats import wilcoxon

    if not differences:
        return None
    if not any(differences):
        return 1.0
    return float(wilcoxon(differences, zero_method="pratt", method="approx").pvalue)


def adjust(values: Sequence[float], correction: Correction) -> list[float]:
    """p values for as many tests as there are (Holm 1979, or Bonferroni), at most 1, in the order given."""
    count = len(values)
    if correction == "bonferroni":
        return [min(1.0, value * count) for value in values]
    adjusted, highest = [0.0] * count, 0.0
    for rank, at in enumerate(sorted(range(count), key=lambda at: values[at])):
        highest = max(highest, min(1.0, values[at] * (count - rank)))
        adjusted[at] = highest
    return adjusted


def _snapped(difference: float) -> float:
    """Rounding is no difference, and would have a rank of its own."""
    return 0.0 if abs(difference) <= TIED else difference


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
