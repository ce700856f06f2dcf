"""A checkpoint from the Hugging Face hub: only the files that are loaded, once per node.

The hub's client keeps files in its cache and locks each while it is fetched: of several workers on a node one fetches,
the others wait. Without a network, what an earlier run has fetched is used.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.models.checkpoint import INDEX, files_by_role, read_configurations, read_index, refuse_other_formats
from pipeline.models.families import family_of
from pipeline.models.families.base import components_of

PATIENCE = 30.0  # seconds for the hub to say what a repository holds
LINE_EVERY = 10.0  # seconds between two lines of progress


def fetch(name: str, revision: str | None, variant: str | None, *, t5: bool = True) -> tuple[Path, str]:
    """The folder of a repository's files in the hub's cache, and the commit that they are of.

    `t5`: optional text encoders are fetched, too.

    Raises:
        ModelError: no such repository or revision, no access, or no network and nothing in the cache; says what was
            tried and what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"model '{name}' (revision {revision or 'main'})"
    try:
        listing = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=PATIENCE)
    except GatedRepoError as error:
        raise ModelError(_gated(what)) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{what} has no such revision. Set model.revision to a branch, tag or commit") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{what} is no local folder, and the hub does not know it. Check model.name, or set HF_TOKEN where it is "
            "private"
        ) from error
    except Exception as error:  # offline mode, no network, a hub that is down: each with errors of its own
        return _cached(name, revision, what, error)
    sizes = {file.rfilename: file.size or 0 for file in listing.siblings or ()}
    refuse_other_formats(sizes, what)
    _download(name, revision, listing.sha, [INDEX], what, silent())
    folder, commit = _snapshot(name, listing.sha, revision, what)
    index = read_index(folder, what)
    family = family_of(index, what)
    components = components_of(family, index, t5=t5)
    files = sorted(set(files_by_role(components, sizes, variant, what).values()))
    # Gigabytes are not fetched to be refused.
    small = [file for file in files if not file.endswith(".safetensors")]
    _download(name, revision, listing.sha, small, what, silent())
    family.check(read_configurations(folder, components, small, what), what)
    missing = [file for file in files if _in_cache(name, file, listing.sha) is None]
    if missing:
        total = sum(sizes[file] for file in missing)
        _say(f"{what}: fetching {len(missing)} files, {total / 1e9:.3g} of {sum(sizes.values()) / 1e9:.3g} GB")
        _download(name, revision, listing.sha, files, what, _bars(what, total))
    return folder, commit


def _download(
    name: str, revision: str | None, commit: str | None, files: list[str], what: str, bars: type[Any] | None
) -> None:
    """Fetch what the cache lacks of some files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    if all(_in_cache(name, file, commit) for file in files):
        return
    try:
        snapshot_download(name, revision=revision, allow_patterns=files, tqdm_class=bars)
    except GatedRepoError as error:  # its listing is public, its files are not
        raise ModelError(_gated(what)) from error
    except Exception as error:
        raise ModelError(
            f"{what} could not be fetched from the hub: {type(error).__name__}. What has arrived is kept: try again, "
            "or check the network and the disk's free space"
        ) from error


def _gated(what: str) -> str:
    return f"{what} is gated. Accept its terms on the hub, and set HF_TOKEN to a token that may read it"


def _in_cache(name: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _snapshot(name: str, commit: str | None, revision: str | None, what: str) -> tuple[Path, str]:
    for one in (commit, revision):  # the branch may have moved on while its files were fetched
        if path := _in_cache(name, INDEX, one):
            return path.parent, path.parent.name
    raise ModelError(f"{what} was fetched from the hub, but is not in its cache. Try again")


def _cached(name: str, revision: str | None, what: str, error: Exception) -> tuple[Path, str]:
    """What an earlier run has fetched; whether that is complete is seen when it is loaded."""
    from huggingface_hub import constants

    if path := _in_cache(name, INDEX, revision):
        return path.parent, path.parent.name  # a snapshot's folder is named after its commit
    asked = "was not asked (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else f"gave no answer ({type(error).__name__})"
    raise ModelError(
        f"{what} is no local folder here; the hub {asked}, and its cache ({constants.HF_HUB_CACHE}) does not hold the "
        "model. Load it once where there is a network and share that cache (HF_HOME), or set model.name to a folder"
    ) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def silent() -> type[Any]:
    """Shows no progress: a bar for some small files is noise."""
    from functools import partialmethod

    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """Draws nothing."""

        __init__ = partialmethod(tqdm.__init__, disable=True)

    return Silent


def _bars(what: str, total: int) -> type[Any] | None:
    """How progress is shown: the client's own bars on a terminal, else a line every few seconds."""
    if sys.stderr.isatty():
        return None
    from huggingface_hub.utils import tqdm

    class Lines(tqdm):
        """Draws nothing; the one that counts received bytes prints lines."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts = str(options.get("desc", "")).startswith("Reconstructing")
            self.arrived, self.told = 0.0, time.monotonic()
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.arrived += n or 0
            if self.counts and time.monotonic() - self.told >= LINE_EVERY:
                self.told = time.monotonic()
                _say(f"{what}: {self.arrived / 1e9:.3g} of {total / 1e9:.3g} GB")
            return super().update(n)

    return Lines
