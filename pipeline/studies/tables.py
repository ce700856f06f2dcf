"""What a comparison of bases writes: tables as Parquet, means as JSON and Markdown, the paper's figures as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

import pyarrow as pa

from pipeline.reading.directions import COLUMNS
from pipeline.studies.plots import Line, plot
from pipeline.writing.parquet import render_parquet
from pipeline.writing.rows import feature_of, with_features

RECORD_FILE = "comparison.json"
BINS = 10  # of prompt similarity, over the range that there is


def _schema(columns: Mapping[str, pa.DataType]) -> pa.Schema:
    return with_features(list(columns.items()), {name: feature_of(kind) for name, kind in columns.items()})


DISTANCES = _schema(
    dict.fromkeys(("differ_in", "id", "other_id", "prompt", "other_prompt"), pa.string())
    | dict.fromkeys(("timestep", "other_timestep", "distance", "kept", "kept_back", "prompt_similarity"), pa.float64())
)
SPECTRA = _schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "timestep": pa.float64(),
        "spectrum": pa.list_(pa.float64()),  # share of the power by whole radius of the frequency, from 0
        "singular_values": pa.list_(pa.float64()),
    }
)
DIRECTIONS = _schema({**COLUMNS, "prompt": pa.string()})
TRANSPORT = _schema(
    {
        "name": pa.string(),
        "id": pa.string(),
        "prompt": pa.string(),
        "timestep": pa.float64(),
        "kept": pa.float64(),
        "latent_shape": pa.list_(pa.int64()),
        "direction": pa.list_(pa.float16()),  # flat, of unit length
    }
)


def as_parquet(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> bytes:
    """A table as a file; the same rows give the same bytes."""
    return render_parquet(rows, schema)


def summary_of(
    distances: Sequence[Mapping[str, Any]],
    spectra: Sequence[Mapping[str, Any]],
    carried: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Means by timestep and by prompt similarity, for JSON."""
    return {
        "samples": _by(distances, "samples", "timestep"),
        "prompts": _by(distances, "prompts", "timestep"),
        "timesteps": _by_gap(distances),
        "prompt_similarity": _by_similarity(distances),
        "spectrum": _mean_spectra(spectra),
        "transport": [
            {"name": name, "mean_kept": fmean(kept), "least_kept": min(kept), "samples": len(kept)}
            for name, kept in _grouped(carried, "name", "kept").items()
        ],
    }


def _grouped(rows: Sequence[Mapping[str, Any]], key: str, value: str) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row[value])
    return dict(sorted(groups.items()))


def _by(distances: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[dict[str, Any]]:
    some = [row for row in distances if row["differ_in"] == kind]
    kept = _grouped(some, key, "kept")
    return [
        {key: value, "distance": fmean(found), "spread": pstdev(found), "kept": fmean(kept[value]), "pairs": len(found)}
        for value, found in _grouped(some, key, "distance").items()
    ]


def _by_gap(distances: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Distances of one sample's bases by how far apart their timesteps are."""
    some = [
        {"gap": abs(row["timestep"] - row["other_timestep"]), "distance": row["distance"]}
        for row in distances
        if row["differ_in"] == "timesteps"
    ]
    return [
        {"gap": gap, "distance": fmean(found), "pairs": len(found)}
        for gap, found in _grouped(some, "gap", "distance").items()
    ]


def _by_similarity(distances: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Distances between prompts in equal steps of their similarity."""
    some = [row for row in distances if row["differ_in"] == "prompts"]
    if not some:
        return []
    low, high = (end(row["prompt_similarity"] for row in some) for end in (min, max))
    width = (high - low) / BINS or 1.0
    bins: dict[int, list[Mapping[str, Any]]] = {}
    for row in some:
        bins.setdefault(min(int((row["prompt_similarity"] - low) / width), BINS - 1), []).append(row)
    return [
        {
            "similarity": fmean(row["prompt_similarity"] for row in found),
            "distance": fmean(row["distance"] for row in found),
            "pairs": len(found),
        }
        for _, found in sorted(bins.items())
    ]


def _mean_spectra(spectra: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for timestep in sorted({row["timestep"] for row in spectra}):
        some = [row["spectrum"] for row in spectra if row["timestep"] == timestep]
        longest = max(map(len, some))
        means = [fmean(one[at] if at < len(one) else 0.0 for one in some) for at in range(longest)]
        centre = sum(at * share for at, share in enumerate(means))
        found.append({"timestep": timestep, "mean_radius": centre, "spectrum": means})
    return found


def pictures(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """The paper's figures as PNG by file name, as far as there is something to draw."""
    drawn = {}
    lines = [
        Line(f"between {kind}", [(row["timestep"], row["distance"]) for row in summary[kind]])
        for kind in ("samples", "prompts")
        if summary[kind]
    ]
    if lines:
        drawn["distance_by_timestep.png"] = plot(lines, "timestep", "geodesic distance")
    if summary["timesteps"]:
        line = Line("of one sample", [(row["gap"], row["distance"]) for row in summary["timesteps"]])
        drawn["distance_by_gap.png"] = plot([line], "difference of timesteps", "geodesic distance")
    if summary["prompt_similarity"]:
        line = Line("of one sample", [(row["similarity"], row["distance"]) for row in summary["prompt_similarity"]])
        drawn["distance_by_prompt.png"] = plot([line], "similarity of the prompts (cosine)", "geodesic distance")
    if summary["spectrum"]:
        lines = [
            Line(f"t = {row['timestep']:g}", list(enumerate(row["spectrum"]))) for row in reversed(summary["spectrum"])
        ]
        drawn["spectrum_by_timestep.png"] = plot(lines, "spatial frequency (cycles per side)", "share of the power")
    return drawn


def rows_in(summary: Mapping[str, Any]) -> str:
    """The means as tables in Markdown."""
    out = io.StringIO()
    for title, name, columns in (
        ("Between samples", "samples", ("timestep", "distance", "spread", "kept", "pairs")),
        ("Between prompts", "prompts", ("timestep", "distance", "spread", "kept", "pairs")),
        ("Between timesteps of one sample", "timesteps", ("gap", "distance", "pairs")),
        ("Between prompts, by their similarity", "prompt_similarity", ("similarity", "distance", "pairs")),
        ("Spectrum", "spectrum", ("timestep", "mean_radius")),
        ("Transport", "transport", ("name", "mean_kept", "least_kept", "samples")),
    ):
        if not summary[name]:
            continue
        out.write(f"## {title}\n\n| {' | '.join(columns)} |\n|{'---:|' * len(columns)}\n")
        for row in summary[name]:
            out.write(f"| {' | '.join(_cell(row[column]) for column in columns)} |\n")
        out.write("\n")
    return out.getvalue()


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
