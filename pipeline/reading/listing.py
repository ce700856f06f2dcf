"""List a source's shards: globs, `{0000..0099}` ranges, folders, prefixes and single files of any fsspec storage.

Nothing is passed over in silence: what a source holds beside its shards is counted in `Listed.left_out`, and a link to
nothing is an error. Symbolic links are followed, so that a hub's cache (links to blobs) is a source like any other.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from pipeline.common.showing import public_url
from pipeline.errors import SourceError
from pipeline.reading import parquet
from pipeline.reading.folder import group_files
from pipeline.reading.local import find_local, glob_local, oddity
from pipeline.reading.rows import IMAGE_EXTENSIONS, extension, listed, readable
from pipeline.reading.shards import UNIT_BYTES, DamagedFileError, Format, NoImageColumnError, Shard
from pipeline.reading.storage import open_fs, retrying, storage_errors
from pipeline.reading.versions import tag_of, versions
from pipeline.recipe import SourceConfig

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "sets": (".jsonl",),
}
AUTO: tuple[Format, ...] = ("webdataset", "parquet", "folder")  # sets must be asked for: JSON lines may say anything
MOST_NAMES = 1_000_000  # that one URL's braces may stand for
FOOTER_READERS = 16  # Parquet footers that are read at a time


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the source."""

    relative: str  # path below its listing's base
    url: str  # openable
    size: int
    etag: str
    leads_nowhere: str = ""  # of a broken link: where it leads


@dataclass(frozen=True, slots=True)
class _Listing:
    """What one of the source's URLs stands for."""

    url: str
    base: str  # URL of the folder that relative paths start from
    files: tuple[_File, ...]
    whole: bool  # whether everything below `base` is meant, not only what a wildcard or a name picks
    left_out: Mapping[str, int]  # number of files by reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What a source holds."""

    shards: list[Shard]  # sorted by path
    left_out: Mapping[str, int]  # files and folders that are no part of any shard: what they are, how many

    def note(self) -> str:
        """One line about what was left out; "" where that is nothing."""
        what = listed(f"{count:,} {kind}" for kind, count in sorted(self.left_out.items()))
        return f"not read: {what}" if self.left_out else ""


def list_shards(source: SourceConfig) -> list[Shard]:
    """All shards of a source, as `list_source` finds them."""
    return list_source(source).shards


def list_source(source: SourceConfig) -> Listed:
    """All shards of a source, and what it holds beside them.

    A path is relative to the folder that its URL names (of a glob: the folder before the first wildcard). Where two
    URLs have equal relative paths, the folders' own names are put in front. With `format: auto` tars are taken; where
    there is none, Parquet files; else images.

    Raises:
        SourceError: a bucket or folder does not exist, access is refused, a link leads nowhere, or no shard is found;
            says what was found.
    """
    listings = [_list_url(url, source) for url in source.shards]
    kind = _format_of(listings, source)
    left_out = sum((Counter(listing.left_out) for listing in listings), Counter[str]())
    if kind == "folder":
        shards, unused = _folder_shards(listings, source)
        left_out.update(unused)
    else:
        left_out.update(_others(listings, SUFFIXES[kind], "no shard"))
        named = _that_are_there(_named(listings, SUFFIXES[kind]))
        found = versions([(file.url, file.etag) for _, file in named], source)
        shards = [
            Shard(path=readable(path), url=file.url, format=kind, size=file.size, etag=found[file.url])
            for path, file in named
        ]
    if kind == "parquet":
        shards = _with_footers(shards, source)
    unit_bytes = max(UNIT_BYTES, source.max_member_bytes // 4)
    shards = [replace(shard, unit_bytes=unit_bytes) for shard in sorted(shards, key=lambda shard: shard.path)]
    return Listed(shards=shards, left_out=dict(+left_out))


def _that_are_there(named: list[tuple[str, _File]]) -> list[tuple[str, _File]]:
    """The same files, none a broken link: a missing image fails its own row alone, a missing shard all of its rows.

    Raises:
        SourceError: a shard is a link that leads nowhere.
    """
    broken = [f"{path} is a link to {file.leads_nowhere}" for path, file in named if file.leads_nowhere]
    if broken:
        raise SourceError(
            f"of {len(named)} shard(s) {len(broken)} cannot be opened: {listed(broken)}, which does not exist. Restore "
            "what a link leads to, or remove the link"
        )
    return named


def _others(listings: list[_Listing], suffixes: tuple[str, ...], what: str) -> Counter[str]:
    """Files of other kinds, once each: "no shard (.json)"."""
    urls = {file.url: file for listing in listings for file in listing.files if not _matches(file, suffixes)}
    return Counter(f"{what} ({_suffix(file)})" for file in urls.values())


def _suffix(file: _File) -> str:
    return posixpath.splitext(file.relative)[1].lower() or "no extension"


def _list_url(url: str, source: SourceConfig) -> _Listing:
    fs, path = open_fs(url, source.storage_options)
    literal = isinstance(fs, LocalFileSystem) and os.path.lexists(path)  # "{", "[", "*" may stand in a file's name
    urls = [url] if literal else expanded(url)
    paths = [open_fs(one, source.storage_options)[1] for one in urls]
    bases: list[str] = []
    infos: dict[str, Any] = {}
    whole = True
    fs.invalidate_cache()  # s3fs caches listings, and this one must be fresh
    for path in paths:
        with storage_errors(fs.unstrip_protocol(path)):
            base, found, is_whole = _list_path(fs, path, literal)
        bases.append(base)
        infos.update(found)
        whole = whole and is_whole and len(paths) == 1
    base = bases[0] if len(bases) == 1 else posixpath.commonpath(bases)
    left_out = Counter[str]()
    files = []
    for path in sorted(infos):
        kind = infos[path].get("type", "file")
        if kind == "directory":  # a wildcard picks it; where it picks what is inside as well, nothing is left out
            left_out["folder that a wildcard picks"] += not any(other.startswith(f"{path}/") for other in infos)
            continue
        if kind != "file":
            left_out[kind] += 1
            continue
        file = _file(fs, base, path, infos[path])
        if _is_hidden(file):
            left_out["hidden file"] += 1
        else:
            files.append(file)
    return _Listing(url, fs.unstrip_protocol(base), tuple(files), whole, left_out)


def expanded(url: str) -> list[str]:
    """The URLs that one with braces stands for.

    Raises:
        SourceError: the braces do not match, or stand for too many.
    """
    if "{" not in url:
        return [url]
    count = 1  # first, since expanding alone may take for ever
    for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}", url):
        count *= abs(int(last[:20]) - int(first[:20])) + 1
    for names in re.findall(r"\{([^{}]*,[^{}]*)\}", url):
        count *= names.count(",") + 1
    if count > MOST_NAMES:
        raise SourceError(
            f"{public_url(url)} has braces that stand for more than {MOST_NAMES:,} names. Name a folder, or use a *"
        )
    try:
        return list(braceexpand(url))
    except ValueError as error:
        raise SourceError(f"{public_url(url)} has braces that do not match. Write ranges as {{0000..0099}}") from error


def _list_path(fs: Any, path: str, literal: bool) -> tuple[str, dict[str, Any], bool]:
    """Base folder of a path, everything that it stands for, and whether that is all there is below the base."""
    is_local = isinstance(fs, LocalFileSystem)
    for attempt in retrying():
        with attempt:
            wildcard = None if literal else re.search(r"[*?\[]", path)
            if wildcard and not (_is_web(fs) and wildcard.group() == "?"):  # there it begins a query
                base = path[: wildcard.start()].rpartition("/")[0]
                found = glob_local(path) if is_local else fs.glob(path, detail=True)
                if not found:
                    fs.info(base)  # raises where the folder does not exist or may not be read
                return base, found, False
            info = fs.info(path)
            if is_local and (odd := oddity(path)):
                raise SourceError(f"{path} is {odd}: it cannot be read as a source. Name a file or a folder of files")
            if info["type"] == "file":
                return path.rpartition("/")[0], {path: info}, False
            return path, find_local(path) if is_local else fs.find(path, detail=True), True
    raise AssertionError("retrying ends with a result or an error")


def _file(fs: Any, base: str, path: str, info: Mapping[str, Any]) -> _File:
    etag = tag_of(info)
    if not etag and "mtime" in info and not isinstance(fs, LocalFileSystem):  # all that SFTP, for example, tells
        etag = f"mtime {float(info['mtime']):.6f}"
    # A signature in a web address is a credential, and no part of a shard's name.
    relative = (path.partition("?")[0] if _is_web(fs) else path).removeprefix(base).lstrip("/")
    return _File(
        relative, fs.unstrip_protocol(path), int(info.get("size") or 0), etag, str(info.get("leads_nowhere", ""))
    )


def _is_web(fs: Any) -> bool:
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return protocol in ("http", "https")


def _is_hidden(file: _File) -> bool:
    """Whether it or a folder on its way below the source is hidden."""
    return any(part.startswith(".") for part in file.relative.split("/"))


def _matches(file: _File, suffixes: tuple[str, ...]) -> bool:
    return file.relative.lower().endswith(suffixes)


def _format_of(listings: list[_Listing], source: SourceConfig) -> Format:
    """The kind of the source's shards.

    Raises:
        SourceError: there is none; says what was found instead.
    """
    images = IMAGE_EXTENSIONS if source.image is None else (extension(source.image),)
    suffixes: dict[Format, tuple[str, ...]] = {**SUFFIXES, "folder": tuple(f".{name}" for name in (*images, "jpeg"))}
    files = [file for listing in listings for file in listing.files]
    kinds: Sequence[Format] = AUTO if source.format == "auto" else [source.format]
    for kind in kinds:
        if any(_matches(file, suffixes[kind]) for file in files):
            return kind
    where = ", ".join(public_url(url) for url in source.shards)
    if not files:
        raise SourceError(f"{where}: no file is there. Check source.shards, or put shards there")
    looked_for = "; ".join(f"{kind}: {', '.join(suffixes[kind])}" for kind in kinds)
    found = Counter(_suffix(file) for file in files)
    counts = listed(f"{count} x {name}" for name, count in found.most_common())
    raise SourceError(
        f"{where}: none of {len(files)} file(s) is a shard (looked for {looked_for}); found: {counts}. "
        "Check source.shards and source.format"
    )


def _named(listings: list[_Listing], suffixes: tuple[str, ...]) -> list[tuple[str, _File]]:
    """Every shard once, with a path that is unique in the source."""
    prefixes = _prefixes([listing.base for listing in listings])
    distinct: dict[str, tuple[str, _File]] = {}
    for listing, prefix in zip(listings, prefixes, strict=True):
        for file in listing.files:
            if _matches(file, suffixes):
                distinct.setdefault(file.url, (prefix, file))
    relatives = Counter(file.relative for _, file in distinct.values())
    if max(relatives.values()) == 1:
        return [(file.relative, file) for _, file in distinct.values()]
    named = [(posixpath.join(prefix, file.relative), file) for prefix, file in distinct.values()]
    path, count = Counter(path for path, _ in named).most_common(1)[0]
    if count > 1:  # web addresses that differ in their queries alone
        raise SourceError(f"{count} addresses in source.shards have the name {path}. Name each file once")
    return named


def _prefixes(bases: list[str]) -> list[str]:
    """What tells base folders apart: their URLs without the leading parts that all have in common."""
    parts = [[part for part in re.split(r"[:/]+", base) if part] for base in bases]
    common = 0
    while all(len(one) > common for one in parts) and len({one[common] for one in parts}) == 1:
        common += 1
    return ["/".join(one[common:]) for one in parts]


def _folder_shards(listings: list[_Listing], source: SourceConfig) -> tuple[list[Shard], Counter[str]]:
    """One shard per base folder; and what belongs to no image."""
    picked: dict[str, dict[str, _File]] = {}
    around: dict[str, dict[str, _File]] = {}
    for listing in listings:
        files = {file.relative: file for file in listing.files}
        picked.setdefault(listing.base, {}).update(files)
        around.setdefault(listing.base, {}).update(files)
        if not listing.whole:  # a wildcard for images names no sidecars, which are wanted all the same
            beside = _list_url(listing.base, source)
            around[listing.base].update({file.relative: file for file in beside.files})
    shards = []
    left_out = Counter[str]()
    for base, prefix in zip(picked, _prefixes(list(picked)), strict=True):
        known = around[base]
        rows = [row for row in group_files(known, source) if row.image in picked[base]]
        names = [[name for name in (row.image, row.caption, row.edit, row.mask) if name] for row in rows]
        most = source.max_member_bytes  # of a larger file nothing is kept
        rows = [
            replace(row, size=sum(size for name in some if (size := known[name].size) <= most))
            for row, some in zip(rows, names, strict=True)
        ]
        used = [known[name] for some in names for name in some]
        tags = versions([(file.url, file.etag) for file in used], source)
        unused = picked[base].keys() - {file.relative for file in used}
        left_out.update(f"beside no image ({_suffix(picked[base][name])})" for name in unused)
        parts = [repr(rows), *(f"{file.relative}\t{file.size}\t{tags[file.url]}" for file in used)]
        if rows:
            shards.append(
                Shard(
                    path=readable(prefix) or ".",
                    url=base,
                    format="folder",
                    size=sum(file.size for file in used),
                    etag=hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32],
                    rows=len(rows),
                    files=tuple(rows),
                )
            )
    if not shards:
        where = ", ".join(public_url(url) for url in source.shards)
        raise SourceError(f"{where}: no image is there but masks. Check source.shards, source.image and source.mask")
    return shards, left_out


def _with_footers(shards: list[Shard], source: SourceConfig) -> list[Shard]:
    """Add what only the files' footers tell. A damaged file keeps `rows=None`: reading it reports the damage.

    Raises:
        SourceError: no shard has a column with images.
    """
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        read = list(pool.map(lambda shard: _with_footer(shard, source), shards))
    problems = [(shard, problem) for shard, problem in read if isinstance(problem, NoImageColumnError)]
    if problems and all(shard.rows is None for shard, _ in read):
        shard, problem = problems[0]
        raise SourceError(f"{public_url(shard.url)} cannot be used: {problem}")
    return [shard for shard, _ in read]


def _with_footer(shard: Shard, source: SourceConfig) -> tuple[Shard, Exception | None]:
    fs, path = open_fs(shard.url, source.storage_options)
    with storage_errors(shard.url):
        for attempt in retrying():
            with attempt, fs.open(path, "rb", block_size=1 << 20) as file:
                try:
                    footer = parquet.read_footer(file, source)
                except DamagedFileError as error:
                    return shard, error
    return replace(shard, rows=sum(footer.row_groups), row_groups=footer.row_groups, row_bytes=footer.row_bytes), None
