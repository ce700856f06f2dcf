"""A recipe's file as plain data: read whole, within limits, and no key in it is lost.

YAML's own loader takes a device that never ends, a thousand nested lists, aliases that stand for more text than a
machine holds, and two keys of one name, of which the first is then forgotten. Here each is an error with its place.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.showing import about_path

MOST_BYTES = 1 << 20  # of a file: a recipe that lists 10,000 shards one by one, read in a few seconds
MOST_NODES = 200_000  # with every alias written out
MOST_LEVELS = 100
PIPES_OF_SHELLS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # as in `shardedit plan <(envsubst < recipe.yaml)`


class UnusableFileError(ValueError):
    """The file cannot be read as YAML; the text says why, and never what stands in it: that may be a secret."""


def read_yaml_file(path: str | Path) -> Any:
    """The data of a YAML file.

    Raises:
        UnusableFileError: it cannot be read, is too large, is no UTF-8, or is no YAML that is taken.
    """
    try:
        data = _read(str(path))
    except UnusableFileError:
        raise
    except OSError as error:
        raise UnusableFileError(f"cannot be read: {about_path(error) or error.strerror}. Check the path") from error
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise UnusableFileError(f"cannot be read: its path is none ({type(error).__name__})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UnusableFileError(f"is not YAML: it is not UTF-8 (line {line}). Save it as UTF-8") from None
    return parse_yaml(text)


def _read(path: str) -> bytes:
    # Not blocked by a named pipe that nobody writes to; a shell's is open at its other end.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISFIFO(mode) and path.startswith(PIPES_OF_SHELLS):
            os.set_blocking(file.fileno(), True)
        elif not stat.S_ISREG(mode):
            raise UnusableFileError("cannot be read: it is neither a file nor a shell's pipe. Check the path")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UnusableFileError(
            f"has more than {MOST_BYTES >> 20} MiB, too much for a recipe. Name shards by folders or patterns"
        )
    return data


def parse_yaml(text: str) -> Any:
    """The data of a YAML text.

    Raises:
        UnusableFileError: it is no YAML, or none that is taken; says where.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise UnusableFileError(f"is not YAML{_problem(error)}") from None
    except RecursionError:
        raise UnusableFileError(f"is not YAML that is taken: it is nested deeper than {MOST_LEVELS} levels") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # of the constructors: a date of month 99
        if isinstance(error, UnusableFileError):
            raise
        raise UnusableFileError(
            f"is not YAML: a number, date or tag in it is malformed ({type(error).__name__}). Quote what is text"
        ) from None


def _problem(error: yaml.YAMLError) -> str:
    """Where a text stops being YAML, and why. The line itself is not repeated: it may hold a secret."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
    at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    without_quotes = re.sub(r"'[^']{2,}'", "...", problem)
    return f"{at}: {without_quotes}"


def _check(root: yaml.Node) -> None:
    """See that a document is of bounded size with its aliases written out, and has no key twice.

    Raises:
        UnusableFileError: it is not so.
    """
    sizes: dict[int, int] = {}  # of nodes that are done; 0: begun, so that meeting it again is a circle

    def size_of(node: yaml.Node, level: int) -> int:
        at = f" (line {node.start_mark.line + 1})"
        if level > MOST_LEVELS:
            raise UnusableFileError(f"is not YAML that is taken{at}: it is nested deeper than {MOST_LEVELS} levels")
        if (known := sizes.get(id(node))) is not None:
            if not known:
                raise UnusableFileError(f"is not YAML that is taken{at}: an alias leads back into itself")
            return known
        sizes[id(node)] = 0
        if isinstance(node, yaml.MappingNode):
            _refuse_double_keys(node)
            inner = [part for pair in node.value for part in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        total = 1 + sum(size_of(part, level + 1) for part in inner)
        if total > MOST_NODES:
            raise UnusableFileError(
                f"is not YAML that is taken{at}: it has more than {MOST_NODES:,} values, aliases written out"
            )
        sizes[id(node)] = total
        return total

    size_of(root, 0)


def _refuse_double_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (key.tag, key.value) in seen:
            raise UnusableFileError(
                f"has a key twice in one mapping (line {key.start_mark.line + 1}, column {key.start_mark.column + 1}): "
                "the first would not count. Remove one, or join them"
            )
        seen.add((key.tag, key.value))
