"""What pydantic finds wrong with a recipe, in plain words: what is allowed, what was found, where a lost key belongs.

Values are shown where they help, but nothing that stands below `storage_options`, and no value of an unknown key: they
may be secrets.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

SHOWN_TEXT = 40  # characters of a value that are shown
SHOWN_METHODS = 4  # of those that have a lost key
SECRET = "storage_options"
NAME = "is no name. Use letters, digits, '_', '+' and '-', 64 at most; a letter or digit comes first"
# Pydantic's errors about a value's type or bounds. The text comes from the field instead, which says it better.
_KIND = {"is_instance_of", "none_required", "literal_error"}
_PLAIN = {"int_type", "literal_error"}
_KIND_ENDS = ("_type", "_parsing", "_from_float", "greater_than", "greater_than_equal", "less_than", "less_than_equal")


def problems_in_words(error: ValidationError, root: type[BaseModel]) -> list[tuple[str, str]]:
    """Pydantic's findings as (key path, what is wrong and the way out), one for each key.

    Args:
        error: what validation raised.
        root: the class that was validated.
    """
    found: dict[str, str] = {}
    for item in error.errors():
        faulty = _walk(root, item["loc"])
        if isinstance(item["input"], Mapping) and item["type"] in _PLAIN and _model_branch(faulty.kind):
            continue  # a mapping where plain values fit, too: the branch for mappings says what is wrong
        # Of a union pydantic reports every branch: the field's own words name them all at once.
        found.setdefault(faulty.path or "recipe", _text(item, faulty, root))
    return list(found.items())


@dataclass(frozen=True, slots=True)
class _FaultyKey:
    """The key that a finding is about."""

    path: str  # as the user wrote it: pydantic also names the branches of unions
    kind: Any  # annotation of what is expected there; None where nothing is
    metadata: tuple[Any, ...]  # its bounds
    owner: type[BaseModel]  # the innermost model
    label: str  # the owner, in the words of `_homes`


def _walk(root: type[BaseModel], location: tuple[int | str, ...]) -> _FaultyKey:
    parts: list[str] = []
    kind: Any = root
    metadata: tuple[Any, ...] = ()
    owner, label = root, ""
    for part in location:
        kind, metadata = _bare(kind, metadata)
        if get_origin(kind) in (Union, UnionType):
            branches = [branch for branch in get_args(kind) if branch is not NoneType]
            tagged = next((branch for branch in branches if _tag(branch) == part), None)
            if tagged is not None:  # pydantic's word for the branch; users wrote no such key
                kind, owner, label = tagged, tagged, f"{label}.method '{part}'"
                continue
            if len(branches) > 1:
                named = _model_branch(kind)
                if named is not None and named.__name__ in str(part):  # pydantic names its validators as well
                    kind = owner = named
                continue  # a branch, which is no key
            (kind,) = branches
            kind, metadata = _bare(kind, metadata)
        if part == "[key]":
            continue
        parts.append(str(part))
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            owner, label = kind, label or ".".join(parts[:-1])
            kind, metadata = (field.annotation, tuple(field.metadata)) if field else (None, ())
            label = ".".join(parts) if _models_in(kind) else label
        elif get_origin(kind) is dict:
            kind, metadata = get_args(kind)[1], ()
        elif get_origin(kind) is tuple:
            inner = get_args(kind)
            kind, metadata = inner[part if isinstance(part, int) and inner[-1] is not ... else 0], ()
        else:
            kind, metadata = None, ()
    kind, metadata = _bare(kind, metadata)
    return _FaultyKey(".".join(parts), kind, metadata, owner, label)


def _bare(kind: Any, metadata: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A type without `Annotated`, whose bounds join the others."""
    while get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        for one in more:
            metadata += tuple(one.metadata) if isinstance(one, FieldInfo) else (one,)
    return kind, metadata


def _text(item: Any, faulty: _FaultyKey, root: type[BaseModel]) -> str:
    context, value, secret = item.get("ctx", {}), item["input"], SECRET in item["loc"]
    kind = item["type"]
    if kind == "extra_forbidden":
        return _unknown_key(faulty, root)
    if kind == "missing":
        return "is required"
    if kind == "union_tag_invalid":
        known = str(context["expected_tags"]).replace("'", "").split(", ")
        tag = str(context["tag"])
        return f"method is '{tag}', known are: {', '.join(known)}{_closest(tag, known)}"
    if kind == "union_tag_not_found":
        return f"method is missing, known are: {', '.join(filter(None, map(_tag, get_args(faulty.kind))))}"
    if kind == "string_pattern_mismatch":
        return NAME
    if item["loc"][-1:] == ("[key]",):
        return f"is {_shown(value, secret)} and should be a name: put it in quotes"
    if kind == "finite_number":
        return f"should be a finite number, is {_shown(value, secret)}"
    if kind in ("string_too_short", "too_short"):
        least = context["min_length"]
        return "is empty. Give at least one" if least == 1 else f"needs at least {least} entries"
    if kind == "string_too_long":
        return f"has {len(value)} characters; at most {context['max_length']} are allowed"
    if kind == "too_long":
        return f"has {len(value)} entries; at most {context['max_length']} are allowed"
    if kind in _KIND or kind.endswith(_KIND_ENDS):
        wanted = _wanted(faulty.kind, faulty.metadata)
        near = _closest(value, _choices(faulty.kind)) if isinstance(value, str) and not secret else ""
        return f"should be {wanted}, is {_shown(value, secret)}{near}"
    return str(item["msg"]).removeprefix("Value error, ")


def _shown(value: Any, secret: bool) -> str:
    """A value as a user would name it."""
    if isinstance(value, str):
        quotable = not secret and len(value) <= SHOWN_TEXT and "://" not in value
        return f"the text {value!r}" if quotable else "text"
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return "a number" if secret else repr(value)
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, (list, tuple, set)) else f"a {type(value).__name__}"


_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


def _wanted(kind: Any, metadata: tuple[Any, ...]) -> str:
    """What a field takes, in words."""
    if any(isinstance(one, WithJsonSchema) for one in metadata):
        return "text or a list of texts"  # the one field whose schema is not that of its type
    words = []
    for branch in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        branch, bounds = _bare(branch, metadata)
        origin = get_origin(branch) or branch
        if origin is NoneType:
            continue
        if origin is Literal:
            words += [repr(choice) for choice in get_args(branch)]
        elif origin is tuple:
            words.append("a list")
        elif isinstance(origin, type) and issubclass(origin, BaseModel):
            words.append(f"a mapping with the keys {', '.join(origin.model_fields)}")
        elif origin in (int, float):
            words.append(_NOUNS[origin] + _bounds(bounds))
        else:
            words.append(_NOUNS.get(origin, "something else"))
    if any(_tag(branch) for branch in get_args(kind)):
        words = ["a mapping with the key method and that method's own"]
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _bounds(metadata: tuple[Any, ...]) -> str:
    """ " from 0 to 1", of annotated bounds."""
    found = {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}
    if {"ge", "le"} <= found.keys():
        return f" from {found['ge']:g} to {found['le']:g}"
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{word} {found[name]:g}" for name, word in words.items() if name in found and found[name] < 2**53]
    return f" {' and '.join(parts)}" if parts else ""


RARE = ("gates.judge",)
"""Places whose keys (`seed`, `kind`, `image`) are as good as always meant for another that has them, too."""


def _choices(kind: Any) -> list[str]:
    """The words that a field takes."""
    branches = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [str(choice) for one in branches if get_origin(one) is Literal for choice in get_args(one)]


def _closest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f". Did you mean '{near[0]}'?" if near else ""


def _unknown_key(faulty: _FaultyKey, root: type[BaseModel]) -> str:
    """Where a key that is unknown here belongs, or how it may be spelt."""
    key = faulty.path.rpartition(".")[2]
    ours = [name for name in faulty.owner.model_fields if name != "method"]
    homes = _homes(root)
    near = difflib.get_close_matches(key, ours, n=1)
    exact = [home for home, names in homes.items() if key in names]
    if exact := [home for home in exact if home not in RARE] or exact:
        here = f" of {faulty.label}" if faulty.label else ""
        section = faulty.label.partition(".method '")[0].rpartition(".")[2]  # also of one of several methods
        exact.sort(key=lambda home: not home.startswith(f"{section}.method"))  # the section's other methods come first
        ways = ["choose such a method"] if exact[0].startswith(f"{section}.method") else []
        ways += ["move it there"] if not exact[-1].startswith(f"{section}.method") else []
        belongs = f"it is a key of {_listed(exact, homes)}. {', '.join([*ways, 'or remove it']).capitalize()}"
        return f"unknown key{here}: {belongs}" + (f". Or did you mean '{near[0]}'?" if near else "")
    if near:
        return f"unknown key. Did you mean '{near[0]}'?"
    everywhere = frozenset[str]().union(*homes.values())
    if near := difflib.get_close_matches(key, sorted(everywhere), n=1, cutoff=0.8):
        having = [home for home, names in homes.items() if near[0] in names]
        return f"unknown key. Did you mean '{near[0]}', a key of {_listed(having, homes)}?"
    return f"unknown key. Remove it or correct its spelling; known are: {', '.join(ours) or 'none'}"


def _listed(found: list[str], homes: Mapping[str, frozenset[str]]) -> str:
    """Places in a few words: a section stands for its methods where all of them have the key."""
    words = []
    for section in dict.fromkeys(home.partition(".method '")[0] for home in found):
        tags, ours = (
            [home.removeprefix(f"{section}.method ") for home in some if home.startswith(f"{section}.method '")]
            for some in (homes, found)
        )
        more = f" and {len(ours) - SHOWN_METHODS} more" if len(ours) > SHOWN_METHODS else ""
        of_methods = f"{section}.method {', '.join(ours[:SHOWN_METHODS])}{more}"
        words.append(of_methods if ours and ours != tags else section or "the recipe itself")
    return "; ".join(words)


@cache
def _homes(root: type[BaseModel]) -> dict[str, frozenset[str]]:
    """Every place of the tree that has keys of its own, with these keys. A class counts where it comes first."""
    seen: dict[type[BaseModel], str] = {}

    def visit(model: type[BaseModel], at: str) -> Iterator[tuple[str, frozenset[str]]]:
        seen[model] = at
        yield at, frozenset(model.model_fields) - {"method"}
        for name, field in model.model_fields.items():
            inside = f"{at}.{name}".lstrip(".") + (".NAME" if get_origin(field.annotation) is dict else "")
            for inner in _models_in(field.annotation):
                if inner not in seen:
                    tag = _tag(inner)
                    yield from visit(inner, f"{inside}.method '{tag}'" if tag else inside)

    return dict(visit(root, ""))


def _models_in(kind: Any) -> list[type[BaseModel]]:
    """The models that an annotation holds."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [model for inner in get_args(kind) for model in _models_in(inner)]


def _model_branch(kind: Any) -> type[BaseModel] | None:
    """The model without a tag among the branches of a union, as in: a number or a mapping with these keys."""
    branches = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    models = (one for one in branches if isinstance(one, type) and issubclass(one, BaseModel) and not _tag(one))
    return next(models, None)


def _tag(kind: Any) -> str | None:
    """The method that a branch of a tagged union stands for."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return None
    field = kind.model_fields.get("method")
    return str(field.default) if field is not None and get_origin(field.annotation) is Literal else None
