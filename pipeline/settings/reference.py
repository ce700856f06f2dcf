"""Every key of a recipe as Markdown tables, from the JSON schema: `shardedit schema --markdown`, docs/recipe.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.compat import SETTINGS
from pipeline.directions import Direction
from pipeline.editing import EDITORS
from pipeline.editing.base import EditingMethod
from pipeline.interventions import Intervention
from pipeline.inversion import INVERSIONS
from pipeline.inversion.base import Inversion
from pipeline.recipe import Method, ModelConfig, Recipe, RunConfig, SinkConfig, SourceConfig
from pipeline.recordings import Recording
from pipeline.records import Concept, EditRequest, TextExpert, WordPair
from pipeline.rewards import REWARDS
from pipeline.settings.best_of import BestOfConfig, Variation
from pipeline.settings.gates import Bounds, GatesConfig
from pipeline.settings.instructions import InstructionsConfig
from pipeline.settings.judge import JudgeConfig
from pipeline.settings.sections import WorkerRange
from pipeline.subjects import Subject

TITLES = {  # of a section's own table
    "SourceConfig": "source",
    "EditRequest": "edits",
    "Concept": "concepts",
    "WordPair": "blend_words and subtract_words",
    "Direction": "direction",
    "Intervention": "interventions",
    "Recording": "record",
    "Subject": "subject",
    "TextExpert": "experts",
    "ModelConfig": "model",
    "Method": "methods",
    "GatesConfig": "gates",
    "Bounds": "bounds",
    "JudgeConfig": "judge",
    "InstructionsConfig": "instructions",
    "BestOfConfig": "best_of",
    "Variation": "vary",
    "SinkConfig": "sink",
    "RunConfig": "run",
    "WorkerRange": "workers",
}


def markdown() -> str:
    """All tables: a recipe's sections in their order, what a section holds, and the settings of every method."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield from _part("##", "A recipe", Recipe)
    yield from _part("##", "source", SourceConfig)
    yield from _part("##", "edits", EditRequest)
    yield from _part("###", "concepts", Concept)
    yield from _part("###", TITLES["WordPair"], WordPair)
    yield from _part("###", TITLES["Direction"], Direction)
    yield from _part("###", TITLES["Intervention"], Intervention)
    yield from _part("###", TITLES["Subject"], Subject)
    yield from _part("###", TITLES["TextExpert"], TextExpert)
    yield from _rewards()
    yield from _part("##", "instructions", InstructionsConfig)
    yield from _part("##", "model", ModelConfig)
    for section, registry in (("inversion", INVERSIONS), ("editing", EDITORS)):
        methods: Mapping[str, type[Any]] = registry
        yield from (f"## {section}", "")
        names = ", ".join(f"[`{name}`](#{section}-{name})" for name in methods)
        yield from (f"`{section}.method` is one of {names}. Its other keys depend on it.", "")
        for name, method in methods.items():
            yield from _part("###", f"{section}: {name}", method)
            yield from (f"{method.paper}. See [its page](methods/{name}.md).", "")
    yield from _part("###", TITLES["Recording"], Recording)
    yield from _part("##", "methods", Method)
    yield from _part("##", "gates", GatesConfig)
    yield from _part("###", TITLES["Bounds"], Bounds)
    yield from _part("###", TITLES["JudgeConfig"], JudgeConfig)
    yield from _part("##", "best_of", BestOfConfig)
    yield from _part("###", TITLES["Variation"], Variation)
    yield from _part("##", "sink", SinkConfig)
    yield from _part("##", "run", RunConfig)
    yield from _part("###", TITLES["WorkerRange"], WorkerRange)
    yield from _compat()


def _rewards() -> Iterator[str]:
    """The keys that all rewards have, then each one's own."""
    yield from ("### rewards", "")
    names = ", ".join(f"[`{name}`](#reward-{name})" for name in REWARDS)
    yield from (f"`method` is one of {names}. Its other keys depend on it.", "")
    for name, reward in REWARDS.items():
        yield from _part("####", f"reward: {name}", reward)


def _part(level: str, title: str, section: type[BaseModel]) -> Iterator[str]:
    """A heading, what the section is for, and a table of its keys."""
    schema = section.model_json_schema()
    required = schema.get("required", [])
    yield from (f"{level} {title}", "", schema["description"].partition("\n")[0], "")
    left_out = ("method", *compat_settings(section))
    keys = {key: node for key, node in schema["properties"].items() if key not in left_out}
    if not keys:
        yield from ("It has no other keys.", "")
        return
    yield from ("| key | value | default | |", "|---|---|---|---|")
    for key, node in keys.items():
        default = "required" if key in required else _default(section.model_fields[key], node)
        yield _row(key, node, default)
    yield ""


def _row(key: str, node: Mapping[str, Any], default: str) -> str:
    return f"| `{key}` | {_value(node)} | {default} | {_cell(node['description'])} |"


def _compat() -> Iterator[str]:
    yield from ("## Parity with reference implementations", "")
    yield from ("Settings that repeat what published code does. No edit needs them.", "")
    yield from ("| method | key | value | default | |", "|---|---|---|---|---|")
    methods: dict[str, type[Any]] = {**INVERSIONS, **EDITORS}
    for name, keys in SETTINGS.items():
        properties = methods[name].model_json_schema()["properties"]
        for key in keys:
            row = _row(key, properties[key], _default(methods[name].model_fields[key], properties[key]))
            yield f"| `{name}` {row}"
    yield ""


def compat_settings(section: type[BaseModel]) -> tuple[str, ...]:
    """Names of a method's settings that exist for parity with a reference implementation alone."""
    field = section.model_fields.get("method")
    return () if field is None else SETTINGS.get(field.default, ())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _default(field: FieldInfo, node: Mapping[str, Any]) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, (Inversion, EditingMethod)):
        return f"`method: {default.method}`"
    if isinstance(default, BaseModel):
        return "as below"
    if default is None or default == {} or default == ():
        return "none"
    return f"`{default if isinstance(default, str) and default else json.dumps(node['default'])}`"


def _value(node: Mapping[str, Any]) -> str:
    """What may stand under a key, in words."""
    if "$ref" in node:
        title = TITLES[node["$ref"].rpartition("/")[2]]
        return f"[{title}](#{title.replace(' ', '-')})"
    if "discriminator" in node:
        known: dict[str, Mapping[str, Any]] = {"inversion": INVERSIONS, "editing": EDITORS, "rewards": REWARDS}
        names = set(node["discriminator"]["mapping"])
        section = next(section for section, registry in known.items() if names == set(registry))
        return f"[{section}](#{section})"
    if "enum" in node or "const" in node:
        return ", ".join(f"`{value}`" for value in node.get("enum", [node.get("const")]))
    if "anyOf" in node:
        plain_first = sorted(node["anyOf"], key=lambda one: one.get("type") in ("integer", "number", "array", "object"))
        return " or ".join(dict.fromkeys(_value(one) for one in plain_first))
    match node["type"]:
        case "array" if "prefixItems" in node:
            return f"list of {len(node['prefixItems'])}, each {_value(node['prefixItems'][0])}"
        case "array":
            return f"list of {_value(node['items'])}"
        case "object":
            inside = node.get("additionalProperties")
            inside = next(iter(node.get("patternProperties", {"": inside}).values()))
            return f"mapping of names to {_value(inside)}" if isinstance(inside, dict) else "mapping"
        case "null":
            return "none"
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "text" + (f", at most {node['maxLength']} characters" if "maxLength" in node else "")
        case kind:
            return kind + _range(node)


def _range(node: Mapping[str, Any]) -> str:
    bounds = {
        "minimum": "at least {}",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
    }
    if "minimum" in node and "maximum" in node:
        return f", {node['minimum']:g} to {node['maximum']:g}"
    found = [text.format(f"{node[bound]:,}".replace(",", " ")) for bound, text in bounds.items() if bound in node]
    return ", " + ", ".join(found) if found else ""
