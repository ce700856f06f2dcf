"""Recipes that are no YAML, no recipe, or ask for what cannot be: refused by the path of a key, or by a line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.corpus.commands import READING, STARTING, Situation, World

Text = str | bytes


def aliases(name: str, first: str, step: str, levels: int = 8) -> str:
    """Anchors of which each writes the one before it nine times: nine to the power of `levels` when written out."""
    lines = [f"{name}0: &{name}0 {first}"]
    for level in range(levels):
        lines.append(f"{name}{level + 1}: &{name}{level + 1} {step.format(','.join([f'*{name}{level}'] * 9))}")
    return "\n".join(lines) + "\n"


def texts() -> Iterator[tuple[str, Text, str]]:
    """(name, the whole file, what is said of it); `@` stands for the text of a recipe that works."""
    yield "empty", "", "source: is required"
    yield "a list", "[1, 2]", "should be a mapping of sections"
    yield "a number", "5", "should be a mapping of sections"
    yield "a word", "hello", "should be a mapping of sections"
    yield "not UTF-8", b"\xff\xfe\x00a", "is not UTF-8"
    yield "latin 1", "# caf\u00e9\n@".encode("latin-1"), "is not UTF-8 (line 1)"
    yield "UTF-16", "source: {}".encode("utf-16"), "is not UTF-8"
    yield "a NUL", "@\0", "is not YAML"
    yield "a bell", "@\x07", "is not YAML"
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(200), "is not UTF-8"
    yield "a tab", "\tsource: x", "is not YAML (line 1, column 1)"
    yield "an open bracket", "source: [", "is not YAML (line 1"
    yield "two documents", "@\n---\n@", "is not YAML"
    yield "a secret in a broken line", "source: {storage_options: {secret: 'hunter2", "is not YAML"
    yield "a tag of Python's", "@\nx: !!python/object/apply:os.system ['id']\n", "is not YAML"
    yield "an unknown tag", "@\nx: !foo bar\n", "is not YAML"
    yield "lists 100,000 deep", "edits: " + "[" * 100_000, "nested deeper"
    yield "lists 1,500 deep, closed", "edits: " + "[" * 1_500 + "]" * 1_500, "nested deeper"
    yield "mappings 1,000 deep", "".join(" " * level + "a:\n" for level in range(1000)), "nested deeper"
    yield "mappings 150 deep", "edits: " + "{a: " * 150 + "1" + "}" * 150, "nested deeper"
    yield "aliases of lists", aliases("x", "[q, q]", "[{0}]") + "@", "more than 200,000 values"
    yield "aliases of mappings", aliases("x", "{a: 1}", "{{<<: [{0}]}}") + "@", "more than 200,000 values"
    yield "aliases of text", aliases("x", "'" + "z" * 1000 + "'", "[{0}]") + "@", "more than 200,000 values"
    yield "an alias into itself", "a: &a [*a]\n@", "leads back into itself"
    yield "a mapping in itself", "source: &s {storage_options: *s}\n", "leads back into itself"
    yield "a merge into itself", "run: &r {<<: *r}\n", "leads back into itself"
    yield "an alias of nothing", "source: *nothing\n", "is not YAML"
    yield "too long", "@\n# " + "x" * (2 << 20), "more than 1 MiB"
    yield "a key of 500 kB", "k" * 500_000 + ": 1\n@", "is not YAML"
    yield "a section twice", "@\nrun: {engine: local}\n", "has a key twice in one mapping"
    yield "a key twice", "source: {shards: a, shards: b}\nsink: {folder: x}\n", "has a key twice in one mapping"
    yield "a key that is a list", "? [a]\n: 1\n", "is not YAML"
    yield "a key that is a number", "1: 2\n@", "1: "
    yield "a key that is nothing", "? \n: 2\n@", "None: "
    yield "a date of month 99", "source: 2001-99-99\n", "malformed"
    yield "a time of hour 99", "source: 2001-01-01t99:99:99Z\n", "malformed"
    yield "an empty number", "run: {seed: !!int ''}\n", "malformed"
    yield "a half number", "run: {seed: 0x_}\n", "malformed"
    yield "no boolean", "run: {seed: !!bool maybe}\n", "malformed"
    yield "a number of 5,000 digits", "run: {seed: " + "9" * 5000 + "}\n", "malformed"
    yield "broken base64", "source: !!binary a\n", "is not YAML"
    yield "half a surrogate pair", 'source: {shards: "\\ud800"}\nsink: {folder: x}\n', "source.shards"


def values() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, changes of a recipe, what is said)."""
    yield "no source", {"source": None}, "source"
    yield "a source of a word", {"source": "in"}, "source: should be a mapping"
    yield "an empty source", {"source__shards": ""}, "source.shards"
    yield "a blank source", {"source__shards": [" "]}, "source.shards"
    yield "a list of no sources", {"source__shards": []}, "source.shards: is empty"
    yield "a source with a NUL", {"source__shards": "a\0b"}, "source.shards"
    yield "a sink with a NUL", {"sink__folder": "a\0b"}, "sink.folder"
    yield "a model with a NUL", {"model__name": "/a\0b"}, "model.name"
    yield "a blank sink", {"sink__folder": " "}, "sink.folder"
    yield "a seed below 0", {"run__seed": -1}, "run.seed"
    yield "a seed of 2^63", {"run__seed": 2**63}, "run.seed"
    yield "a seed of text", {"run__seed": "many"}, "run.seed"
    yield "a seed that is not finite", {"run__seed": float("inf")}, "run.seed"
    yield "a unit of 10^30 rows", {"run__unit_size": 10**30}, "run.unit_size"
    yield "an unknown engine", {"run__engine": "slurm"}, "run.engine"
    yield "an odd size", {"model__size": 33}, "model.size"
    yield "a size of 10^9", {"model__size": 10**9}, "model.size"
    yield "a file size of infinity", {"sink__shard_size": "9" * 400 + "GB"}, "sink.shard_size"
    yield "a file size of words", {"sink__shard_size": "large"}, "sink.shard_size"
    yield (
        "a scale that is no number",
        {"edits": {"concepts": [{"prompt": "x", "guidance_scale": float("nan")}]}},
        "edits",
    )
    yield "a concept without a prompt", {"edits": {"concepts": [{}]}}, "edits.concepts.0.prompt"
    yield "an edit's name of a path", {"edits": {"../x": {"concepts": [{"prompt": "x"}]}}}, "edits"
    yield "options that are a list", {"source__storage_options": [1]}, "source.storage_options"
    yield "options with a key of a number", {"source__storage_options": {1: 2}}, "source.storage_options"
    yield "steps below 1", {"inversion__num_steps": 0}, "inversion.num_steps"
    yield "steps of 10^30", {"inversion__num_steps": 10**30}, "inversion.num_steps"
    yield "an unknown method", {"inversion": {"method": "magic"}}, "inversion"


OVERRIDES: dict[str, str] = {
    "nothing": "",
    "no value": "run.seed",
    "no key": "=5",
    "half a key": "run.=5",
    "only a dot": ".=5",
    "an open bracket": "run.seed=[",
    "lists 5,000 deep": "run.seed=" + "[" * 5000,
    "5,000 keys deep": "a." * 5000 + "b=1",
    "a number of 5,000 digits": "run.seed=" + "9" * 5000,
    "a date of month 99": "run.seed=2001-99-99",
    "a tag of Python's": "run.seed=!!python/object/apply:os.system ['id']",
    "an alias into itself": "edits=&a {x: *a}",
    "a place below 0": "edits.concepts.-1.prompt=x",
    "a place in other digits": "edits.concepts.\u00b2.prompt=x",
    "a place too far": "source.shards.99999=x",
    "a section of nothing": "sink=null",
    "a section of a number": "run=5",
    "a NUL": "source.shards=a\0b",
    "half a surrogate pair": "sink.folder=\ud800",
}


def situations() -> Iterator[Situation]:
    """All of them."""
    for name, text, says in texts():
        yield Situation("recipe text", name, partial(_write, text=text), READING, says=says)
    for name, changes, says in values():
        yield Situation("recipe value", name, partial(_change, changes=changes), STARTING[1:], says=says)
    for name, override in OVERRIDES.items():
        commands = tuple((*command, override) for command in READING)
        yield Situation("recipe override", name, _nothing, commands)


def _write(world: World, text: Text) -> None:
    works = world.recipe.read_bytes()
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    world.recipe.write_bytes(data.replace(b"@", works) if b"@" in data else data)


def _change(world: World, changes: dict[str, Any]) -> None:
    world.write(**changes)


def _nothing(world: World) -> None:
    pass
