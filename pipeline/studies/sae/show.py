"""What trainings, labellings and layouts say on the terminal."""

from __future__ import annotations

from pipeline.common.showing import public_url
from pipeline.studies.sae.labelling import Labelled
from pipeline.studies.sae.layout import Layout
from pipeline.studies.sae.scoring import Score
from pipeline.studies.sae.training import Trained


def trained_text(trained: Trained) -> str:
    """Figures of every autoencoder, and where they stand."""
    lines = []
    for name, one in trained.figures.items():
        dead = ", ".join(f"{share:.1%} for {vectors}" for vectors, share in one.dead.items())
        lines.append(f"{name}: explained variance {one.explained_variance:.3f}, L0 {one.l0:.1f}, silent {dead} vectors")
    lines.append(f"{trained.batches:,} batches, {trained.batches_now:,} of them now: {public_url(trained.folder)}")
    return "\n".join(lines)


def labelled_text(labelled: Labelled) -> str:
    """How many concepts were found, and where they stand."""
    return (
        f"{labelled.images:,} images, {labelled.named_features:,} features with a name. Of {labelled.tags} tags one "
        f"feature tells {labelled.found_by_one} at an IoU of at least 0.5, a set {labelled.found_by_set}. "
        f"Dictionary, concepts and gallery: {labelled.folder}"
    )


def score_text(score: Score) -> str:
    """How much each autoencoder keeps."""
    lines = []
    for name, one in score.losses.items():
        kept = "worth nothing to the prediction" if one.recovered is None else f"loss recovered {one.recovered:.3f}"
        lines.append(f"{name}: {kept}")
    return "\n".join([*lines, f"Over {score.images:,} images: {score.folder}"])


def layout_text(layout: Layout) -> str:
    """A table by time, and where the rest stands."""
    lines = ["| time | concepts | words | constant mask |", "|---:|---:|---:|---:|"]
    for one in layout.by_time:
        cells = [f"{one[name]:.3f}" if name in one else "" for name in ("concepts_iou", "words_iou", "constant_iou")]
        lines.append(f"| {one['time']:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"IoU over {layout.images:,} images. Table and plot: {layout.folder}"])
