"""The configuration of `shardedit evaluate`: which set, which methods or which results, what is measured, where to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.errors import RecipeError
from pipeline.evaluation.metrics_config import MetricsConfig
from pipeline.recipe import Method, Name, Recipe, recipe_from
from pipeline.records import EditRequest
from pipeline.settings.configuration import config_from, read_config
from pipeline.settings.judge import HOW_IT_IS_ASKED, JudgeConfig
from pipeline.settings.sections import (
    Location,
    ModelConfig,
    RunConfig,
    Section,
    SinkConfig,
    SourceConfig,
    StorageOptions,
)

EXTRA = ("scipy", "json_repair", "httpx2")  # modules of the extra `evaluate`


class PieBench(Section):
    """PIE-Bench, in its own folder."""

    kind: Literal["pie_bench"] = "pie_bench"
    folder: Location
    """With mapping_file.json and annotation_images."""
    subset: Literal["all", "no_style"] = "all"
    """no_style: 620 of the 700, without the edits of style; not comparable with all."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""


class GEditBench(Section):
    """GEdit-Bench, as Arrow or Parquet."""

    kind: Literal["gedit_bench"] = "gedit_bench"
    folder: Location
    """With *.parquet or *.arrow, or a hub id such as stepfun-ai/GEdit-Bench."""
    languages: tuple[Literal["en", "cn", "zh"], ...] = Field(default=("en", "cn"), min_length=1)
    """Of the instructions; zh is cn."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""


class ImgEditBench(Section):
    """The basic suite of ImgEdit-Bench."""

    kind: Literal["imgedit_bench"] = "imgedit_bench"
    folder: Location
    """With basic_edit.json and the pictures' folder."""
    images: Location = "origin"
    """The pictures' folder in it, `origin_img_root` of the official scripts."""
    storage_options: StorageOptions = Field(default_factory=dict, repr=False)
    """Options for the fsspec file system. Secrets belong in the environment."""


class DrawnWorld(Section):
    """Drawn faces, whose every changed pixel is known; for the bundled model."""

    kind: Literal["drawn"] = "drawn"
    count: int = Field(default=60, ge=1)
    """Of items; ten kinds of edits take turns."""
    seed: int = Field(default=0, ge=0)
    """Of the scenes."""
    size: int = Field(default=128, ge=32, le=2048)
    """Side in pixels."""


class OwnSet(Section):
    """A data set of one's own: any source that `shardedit edit` reads."""

    kind: Literal["own"] = "own"
    source: SourceConfig
    """Where the images are, as in a recipe."""
    region: str = "region"
    """Member extension (such as region.png) or column with the mask of what shall change; for measures alone."""
    truth: str = "truth"
    """Member extension or column with the picture of the perfect outcome."""
    edit_type: str = "edit_type"
    """Key of the json member, or column, with the type of a row's edit; without it a row's type is its edit's name."""


AnySet = Annotated[PieBench | GEditBench | ImgEditBench | DrawnWorld | OwnSet, Field(discriminator="kind")]


class StatisticsConfig(Section):
    """Intervals and tests."""

    resamples: int = Field(default=9999, ge=99)
    """Of the bootstrap."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    correction: Literal["holm", "bonferroni"] = "holm"
    """Of the p values over all pairs of methods, per measure."""
    measures: tuple[str, ...] = ()
    """Columns of the tables, in this order; none: all that have numbers."""


class EvaluateConfig(Section):
    """An evaluation: edits of a set by methods, or results that are there, measured and compared."""

    set: AnySet
    """What is edited."""
    edits: dict[Name, EditRequest] = Field(default_factory=dict)
    """As in a recipe; for rows of a set of one's own that bring none."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """Which checkpoint edits."""
    methods: dict[Name, Method] = Field(default_factory=dict)
    """Which methods edit the set, by name, each an inversion and an editor. They share inversions."""
    results: dict[Name, Location] = Field(default_factory=dict)
    """Instead of methods: folders with the results of others, in the benchmark's own layout, by method."""
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    """What is measured."""
    official_layout: bool = True
    """Also write edits, and what was scored, in the layout that the benchmark's own scripts read."""
    judge: JudgeConfig | None = None
    """Who is asked how good the edits are; none: nobody."""
    statistics: StatisticsConfig = Field(default_factory=StatisticsConfig)
    """Intervals and tests."""
    sink: SinkConfig
    """Where edits, scores and tables go."""
    run: RunConfig = Field(default_factory=RunConfig)
    """How the work is done, as in a recipe."""

    @field_validator("sink", mode="before")
    @classmethod
    def _keeps_input(cls, value: Any) -> Any:
        """Whoever measures a result needs its input."""
        return {"include_input": True, **value} if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _is_possible(self) -> EvaluateConfig:
        problems = []
        if bool(self.methods) == bool(self.results):
            problems.append(("methods", "give either methods, which edit the set, or results, which are there already"))
        if self.results and self.set.kind in ("own", "drawn"):
            problems.append(("results", f"a set of kind {self.set.kind} has no layout of results. Give methods"))
        if self.edits and self.set.kind != "own":
            problems.append(("edits", f"the set {self.set.kind} brings its own edits. Leave edits out"))
        if not self.sink.include_input or self.sink.columns != "full" or self.sink.format != "parquet":
            problems.append(("sink", "an evaluation reads its edits back: leave include_input, columns and format out"))
        if self.judge and not self.judge.scores_rows and len(self.methods or self.results) < 2:
            problems.append(
                ("judge.protocol", "pairwise compares methods, and there is one. Add another, or score rows")
            )
        if self.judge and self.judge.protocol == "imgedit" and self.set.kind != "imgedit_bench":
            problems.append(
                ("judge.protocol", "imgedit asks by the types of ImgEdit-Bench. Use viescore for other sets")
            )
        if problems:
            raise RecipeError("evaluation", problems)
        if self.methods:
            self.recipe(SourceConfig(shards=("-",)))
        return self

    def recipe(self, source: SourceConfig) -> Recipe:
        """The job that edits the set, read from `source`.

        Raises:
            RecipeError: a method cannot work.
        """
        return recipe_from(
            {
                "source": source,
                "edits": dict(self.edits),
                "model": self.model,
                "methods": dict(self.methods),
                "sink": self.sink,
                "run": self.run,
            },
            "evaluation",
        )

    @property
    def set_hash(self) -> str:
        """SHA-256 of what names the set, first 16 hexadecimal digits."""
        data = self.set.model_dump(mode="json", exclude={"storage_options"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the rows of scores, first 16 hexadecimal digits; the tables' settings do not."""
        data = self.model_dump(mode="json", exclude={"sink": True, "statistics": True, "official_layout": True})
        for part in (data["set"], data["set"].get("source", {})):
            part.pop("storage_options", None)
        data["run"] = {name: data["run"][name] for name in ("seed", "unit_size")}
        if data["judge"]:
            for name in HOW_IT_IS_ASKED:
                del data["judge"][name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Read a YAML configuration and apply overrides such as `sink.folder=out`; values are YAML.

    Raises:
        RecipeError: lists every problem.
    """
    return evaluation_from(read_config(path, overrides, "evaluation"), str(path))


def evaluation_from(data: Any, where: str = "evaluation") -> EvaluateConfig:
    """Build a configuration from plain data.

    Raises:
        RecipeError: lists every problem.
    """
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        text = f"needs {', '.join(missing)}, which is not installed: pip install 'shardedit[evaluate]'"
        raise RecipeError(where, [("evaluation", text)])
    return config_from(EvaluateConfig, data, where, "evaluation")
