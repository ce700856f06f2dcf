"""The recipe: one YAML file as a pydantic tree, in the order of the flow. It refuses what cannot work.

source      where the images are
edits       what to change, for rows that bring no edit of their own
instructions  how what is asked is put into words
model       which checkpoint, at which size and precision
inversion   how an image becomes a trajectory
editing     how a trajectory becomes an edit
methods     instead of inversion and editing: several named pairs, each of which edits every image
gates       which results are kept
best_of     what is tried again where none is
sink        where results go
run         seed, units, workers, error budgets
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.directions import one_per_result
from pipeline.editing import EDITORS, endpoint
from pipeline.editing.base import EditingMethod
from pipeline.editing.ledits_pp import LEditsPP
from pipeline.engine.backbone import Offers
from pipeline.errors import PrepareError, RecipeError
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import Inversion
from pipeline.inversion.ddpm import DDPMInversion
from pipeline.recordings import RecordingKey
from pipeline.records import EditRequest
from pipeline.settings.best_of import BestOfConfig
from pipeline.settings.explain import problems_in_words
from pipeline.settings.gain import gain_problems, measures_gain
from pipeline.settings.gated import attempt_problems, gate_problems
from pipeline.settings.gates import GatesConfig
from pipeline.settings.instructions import InstructionsConfig
from pipeline.settings.judge import HOW_IT_IS_ASKED
from pipeline.settings.overrides import apply_overrides
from pipeline.settings.remote import server_problems
from pipeline.settings.sections import ModelConfig, RunConfig, Section, SinkConfig, SourceConfig
from pipeline.settings.yaml_file import UnusableFileError, read_yaml_file

if TYPE_CHECKING:
    AnyInversion = Inversion
    AnyEditingMethod = EditingMethod
else:  # what pydantic reads: the registries as tagged unions
    AnyInversion = Annotated[reduce(or_, INVERSIONS.values()), Field(discriminator="method")]
    AnyEditingMethod = Annotated[reduce(or_, EDITORS.values()), Field(discriminator="method")]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]{0,63}$")]


class Method(Section):
    """One way to edit: an inversion and an editor that reads what it records."""

    inversion: AnyInversion = Field(default_factory=DDPMInversion)
    """How an image becomes a trajectory."""
    editing: AnyEditingMethod = Field(default_factory=LEditsPP)
    """How a trajectory becomes an edit."""

    def model_problems(self, offers: Offers) -> Iterator[str]:
        """Why a model that offers this cannot serve it, and the way out."""
        yield from self.inversion.model_problems(offers)
        yield from self.editing.model_problems(offers)


def _or_one_edit(schema: dict[str, Any]) -> None:
    """In the JSON schema: `edits` is one request, or several by name."""
    named = dict(schema)
    schema.clear()
    (request,) = named.get("patternProperties", {"": named.get("additionalProperties")}).values()
    schema |= {"description": named.pop("description"), "anyOf": [dict(request), named]}


# Settings of editors that came later, and what was so before: at that they leave no trace in a recipe's hash, so that
# runs which were begun earlier go on.
LATER_SETTINGS = {"anchor_weight": 1, "mask_margin": 1, "outline_factor": None}


def hash_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 of `Recipe.result_settings`, first 16 hexadecimal digits."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class Recipe(Section):
    """A whole run. Build it with `load_recipe`, or from keyword arguments."""

    source: SourceConfig
    """Where the images are."""
    edits: dict[Name, EditRequest] = Field(default_factory=dict, json_schema_extra=_or_one_edit)
    """What to change, for rows that bring no edit of their own: one request, or several by name."""
    instructions: InstructionsConfig | None = None
    """How edits that bring no instruction are put into words; none: "add sunglasses and remove the hat", 'change "a
    cat" to "a dog"'."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """Which checkpoint edits, at which size and precision."""
    inversion: AnyInversion = Field(default_factory=DDPMInversion)
    """How an image becomes a trajectory."""
    editing: AnyEditingMethod = Field(default_factory=LEditsPP)
    """How a trajectory becomes an edit."""
    methods: dict[Name, Method] = Field(default_factory=dict)
    """Instead of inversion and editing: several named pairs, each of which edits every image."""
    gates: GatesConfig | None = None
    """Which results are kept; none: all."""
    best_of: BestOfConfig | None = None
    """What is tried again, by which seeds and settings, and which attempt is kept; none: each result is made once."""
    sink: SinkConfig
    """Where results go."""
    run: RunConfig = Field(default_factory=RunConfig)
    """How the work is done: seed, units of work, workers, error budgets."""

    @field_validator("edits", mode="before")
    @classmethod
    def _one_unnamed_edit(cls, value: Any) -> Any:
        """`edits: {concepts: [...]}` is one edit, named "edit"."""
        return {"edit": value} if _is_one_request(value) else value

    @field_validator("edits")
    @classmethod
    def _one_edit_per_result(cls, value: dict[str, EditRequest]) -> dict[str, EditRequest]:
        return one_per_result(value)

    @model_validator(mode="before")
    @classmethod
    def _methods_or_one_pair(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("methods") and ("inversion" in data or "editing" in data):
            raise ValueError("methods stand instead of inversion and editing. Remove one or the other")
        return data

    @property
    def all_methods(self) -> dict[str, Method]:
        """Every method by name; a recipe without `methods` has one, named after its editor."""
        return self.methods or {self.editing.method: Method(inversion=self.inversion, editing=self.editing)}

    def methods_of(self, attempt: int) -> dict[str, Method]:
        """Every method by name, as it is in an attempt: see `best_of`.

        Args:
            attempt: its number, from 0, which is the recipe's own.
        """
        variation = None if self.best_of is None else self.best_of.variation(attempt)
        if variation is None:
            return self.all_methods
        return {
            name: Method.model_validate(
                {
                    "inversion": _with_settings(method.inversion, variation.inversion),
                    "editing": _with_settings(method.editing, variation.editing),
                }
            )
            for name, method in self.all_methods.items()
        }

    @property
    def writes_bases(self) -> bool:
        """Whether results are local bases, and not edited images."""
        return False

    @property
    def decodes_inputs(self) -> bool:
        """Whether an input's latents are decoded as they are, which figures compare with."""
        reading = any(method.editing.reads_model for method in self.all_methods.values())
        return self.sink.round_trip and not self.writes_bases and reading

    @property
    def asks_servers(self) -> bool:
        """Whether a method asks a server for its edits."""
        return any(method.editing.server is not None for method in self.all_methods.values())

    @property
    def recorded(self) -> tuple[RecordingKey, ...]:
        """What its methods record of the network's blocks, together."""
        return tuple(dict.fromkeys(key for method in self.all_methods.values() for key in method.editing.records))

    @property
    def records_attention(self) -> bool:
        """Whether a method records where words are attended to."""
        return any(method.editing.records_attention for method in self.all_methods.values())

    @property
    def measures_gain(self) -> bool:
        """Whether `denoise_gain` is measured, and so paid for."""
        return measures_gain(self.gates, self.best_of)

    def canonical_json(self) -> str:
        """Every setting, resolved, in one fixed spelling; without storage options, which may hold secrets."""
        data = self.model_dump(mode="json", exclude={"source": {"storage_options"}, "sink": {"storage_options"}})
        return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide what a run writes: a rerun with others is another run."""
        data = json.loads(self.canonical_json())
        for section, keys in {
            # Where the shards are: the run goes by the listing, which names, sizes and versions them (run.json's
            # `input`). So a folder and a pattern that picks all of it are one source, and so is one that was moved.
            "source": ("shards", "check"),
            "sink": ("folder",),
            "run": ("engine", "workers", "gpus_per_worker", "images_in_flight", "max_failed_fraction"),
        }.items():
            for key in keys:
                data[section].pop(key)
        data["run"].pop("max_consecutive_failed_units")
        data["model"].pop("offload")  # where networks wait changes no bit
        if not data["model"]["text_8bit"]:  # so that runs from before there was a choice go on
            data["model"].pop("text_8bit")
        for editing in (data["editing"], *(method["editing"] for method in data["methods"].values())):
            for key in endpoint.HOW_IT_IS_ASKED if editing["method"] == "endpoint" else ():
                editing.pop(key)
            for key, before in LATER_SETTINGS.items():
                if key in editing and editing[key] == before:
                    editing.pop(key)
        if data["gates"] is not None and data["gates"]["judge"] is not None:
            for key in HOW_IT_IS_ASKED:
                data["gates"]["judge"].pop(key)
        if data["sink"]["background"] == "result":
            data["sink"].pop("background")
        for section in ("instructions", "gates", "best_of"):
            if data[section] is None:  # so that runs from before there was one go on
                data.pop(section)
        return dict(data)

    @property
    def hash(self) -> str:
        """SHA-256 of `result_settings`, first 16 hexadecimal digits."""
        return hash_of(self.result_settings())

    def refuse_what_lacks(self, offers: Offers, model: str) -> None:
        """See that a model has what the methods need.

        Raises:
            RecipeError: names what is missing and the way out, of every method.
        """
        sized = offers.at_size(self.model.size)
        problems = [
            (f"methods.{name}" if self.methods else "editing", f"{text} (model '{model}')")
            for name, method in self.all_methods.items()
            for text in method.model_problems(sized)
        ]
        problems += [
            (f"best_of.vary.{number}", f"{text} (model '{model}')")
            for number in range(0 if self.best_of is None else self.best_of.variations)
            for method in self.methods_of(number + 1).values()
            for text in method.model_problems(sized)
        ]
        if self.measures_gain:
            problems += [("gates", f"{text} (model '{model}')") for text in gain_problems(sized)]
        if problems:
            raise RecipeError("recipe", problems)

    def problems(self) -> list[tuple[str, str]]:
        """What parses but cannot work: pairs that do not fit, edits that a method cannot serve."""
        found = []
        for name, method in self.all_methods.items():
            at = f"methods.{name}." if self.methods else ""
            inversion, editing = method.inversion, method.editing
            if not editing.fits(type(inversion)):
                inversions = [name for name, one in INVERSIONS.items() if editing.fits(one)]
                editors = [name for name, editor in EDITORS.items() if editor.fits(type(inversion))]
                found.append(
                    (
                        f"{at}editing",
                        f"editing.method '{editing.method}' cannot work with inversion.method '{inversion.method}'. It "
                        f"works with: {', '.join(inversions)}; that inversion with: {', '.join(editors)}",
                    )
                )
            else:
                found += [(f"{at}editing", problem) for problem in editing.pair_problems(inversion)]
            for edit, request in self.edits.items():
                follows = self.source.caption_is_source_prompt and not request.source_prompt
                found += [
                    (f"edits.{edit}", problem.text + (f" (method '{name}')" if self.methods else ""))
                    for problem in editing.problems(request, inversion, caption_follows=follows)
                ]
        found += [*gate_problems(self), *attempt_problems(self), *server_problems(self)]
        if self.recorded and self.sink.format != "parquet":
            found.append(("sink.format", "what editing.record asks for is written as Parquet. Leave format out"))
        return found

    @model_validator(mode="after")
    def _is_possible(self) -> Recipe:
        if problems := self.problems():
            raise RecipeError("recipe", problems)
        return self


class BasisRecipe(Recipe):
    """A run that writes local latent bases: `shardedit basis`. Its edits name the prompts, its methods the levels."""

    job: Literal["basis"]
    """What is written."""

    @field_validator("edits")
    @classmethod
    def _one_edit_per_result(cls, value: dict[str, EditRequest]) -> dict[str, EditRequest]:
        """A basis has all directions: one for each prompt, however many an edit would move along."""
        return {name: request.model_copy(update={"direction": None}) for name, request in value.items()}

    @property
    def writes_bases(self) -> bool:
        """Always."""
        return True

    def problems(self) -> list[tuple[str, str]]:
        """Also what only edits may ask for."""
        found = super().problems()
        finding = ", ".join(name for name, editor in EDITORS.items() if editor.finds_bases)
        for name, method in self.all_methods.items():
            if not method.editing.finds_bases:
                at = f"methods.{name}.editing" if self.methods else "editing"
                text = f"a basis is that of editing.method {finding}, and this is '{method.editing.method}'. Set that"
                found.append((at, text))
        if self.sink.format != "parquet":
            found.append(("sink.format", "bases are written as Parquet. Leave format out"))
        if self.sink.background != "result":
            found.append(("sink.background", "is of edited images, and this run writes bases. Leave background out"))
        if self.gates is not None:
            found.append(("gates", "judge edited images, and this run writes bases. Leave gates out"))
        return found


def _with_settings(method: Inversion | EditingMethod, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings with some in place of its own; of another method, those alone."""
    own = method.model_dump(mode="json")
    return dict(settings) if settings.get("method", own["method"]) != own["method"] else {**own, **settings}


def _is_one_request(value: Any) -> bool:
    """Whether this is meant as one edit request, and not as several by name. A misspelt field does not change that."""
    if not isinstance(value, Mapping) or not value:
        return False
    fields = set(EditRequest.model_fields)
    plain = {name for name, item in value.items() if not isinstance(item, (Mapping, EditRequest))}
    return set(value) <= fields or bool(plain & fields) or plain == set(value)


def parse_edits(value: Any, where: str, most: int = 256) -> dict[str, EditRequest]:
    """A row's own edit request(s): one request, or a mapping of names to requests; JSON text is parsed.

    Args:
        value: text or object.
        where: what holds it, for errors.
        most: concepts that all requests together may have, experts and rewards counted as such; none counts as one.

    Raises:
        PrepareError: what stands there is no edit request, or too many; says what is wrong with it.
    """
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise PrepareError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, Mapping) or not value:
        raise PrepareError(f"{where} holds no edit request but {type(value).__name__}. Give an object with concepts")
    named = {"edit": value} if _is_one_request(value) else value
    if (count := sum(map(_weight, named.values()))) > most:
        raise PrepareError(
            f"{where} asks for {count} concepts, more than source.max_row_concepts ({most}) allows. Split the row, or "
            "raise the limit"
        )
    requests = {_checked_name(name, where): _one_edit(request, name, where) for name, request in named.items()}
    try:
        return one_per_result(requests)
    except ValueError as error:
        raise PrepareError(f"{where}: {error}") from error


def _weight(request: Any) -> int:
    """Concepts and other parts of a request that was not checked yet, or the results of its direction."""
    if not isinstance(request, Mapping):
        return 1
    lists = [request.get(name) for name in ("concepts", "experts", "rewards", "interventions")]
    direction = request.get("direction")
    moves = [direction.get(name) for name in ("vectors", "strengths")] if isinstance(direction, Mapping) else []
    results = math.prod(max(1, len(one)) for one in moves if isinstance(one, Sequence))
    return max(results, sum(len(some) for some in lists if isinstance(some, Sequence)))


def _one_edit(value: Any, name: str, where: str) -> EditRequest:
    if not isinstance(value, Mapping):
        raise PrepareError(
            f"{where} has the key '{name}' with a {type(value).__name__}. Give a field of an edit request "
            f"({', '.join(EditRequest.model_fields)}), or a whole request under a name"
        )
    try:
        return EditRequest.model_validate(_without_none(value))
    except ValidationError as error:
        problems = "; ".join(f"{path}: {text}" for path, text in problems_in_words(error, EditRequest))
        raise PrepareError(f"{where} is no edit request: {problems}") from error


def _checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,63}", name):
        raise PrepareError(
            f"{where} has the key {name!r}, which is neither a field of an edit request "
            f"({', '.join(EditRequest.model_fields)}) nor a name for one (letters, digits, '_', '+', '-')"
        )
    return name


def _without_none(value: Any) -> Any:
    """Parquet structs fill absent fields with null: take these for absent."""
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_without_none(item) for item in value]
    return value


def recipe_from(data: Any, where: str = "recipe") -> Recipe:
    """Build a recipe from plain data.

    Raises:
        RecipeError: lists every problem with its key's path and the way out.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(where, [("recipe", f"should be a mapping of sections, is {type(data).__name__}")])
    kind: type[Recipe] = BasisRecipe if data.get("job") == "basis" else Recipe
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RecipeError(where, _as_written(problems_in_words(error, kind), data)) from error
    except RecipeError as error:
        raise RecipeError(where, _as_written(error.problems, data)) from error


def _as_written(problems: list[tuple[str, str]], data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Paths without the name that an unnamed edit was given."""
    if not _is_one_request(data.get("edits")):
        return problems
    return [
        ("edits" + path.removeprefix("edits.edit") if path.startswith("edits.edit") else path, text)
        for path, text in problems
    ]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides such as `inversion.num_steps=20`; values are YAML.

    Raises:
        RecipeError: the file cannot be read or does not describe a possible run; lists every problem.
    """
    where = str(path)
    try:
        data = read_yaml_file(path)
    except UnusableFileError as error:
        raise RecipeError(where, [("recipe", str(error))]) from None
    return recipe_with({} if data is None else data, overrides, where)


def recipe_with(data: Any, overrides: Sequence[str], where: str) -> Recipe:
    """Build a recipe from plain data, which overrides such as `inversion.num_steps=20` change first.

    Raises:
        RecipeError: lists every problem.
    """
    apply_overrides(data, overrides, where)
    return recipe_from(data, where)


__all__ = ["EditingMethod", "Inversion", "Method", "Recipe", "load_recipe", "parse_edits", "recipe_from"]
