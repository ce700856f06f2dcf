"""An export on a Hugging Face hub: all of its files in one commit, so that nobody meets half of a set.

A push that fails leaves the repository as it was, or empty where it is new; the same command pushes again. A repository
that holds anything else is refused, before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.showing import describe
from pipeline.errors import RecipeError, SinkError

HUBS_OWN = (".gitattributes", "README.md")  # what a repository may have from its beginning
KIND = "dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Where to."""

    repository: str  # OWNER/NAME
    private: bool = False


class Repository:
    """A repository that may be pushed to.

    Args:
        push: which one.
        record: name of the file that says what an export is of.

    Raises:
        RecipeError: no token is set.
        SinkError: the hub cannot be asked, or refuses.
    """

    def __init__(self, push: Push, record: str) -> None:
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise RecipeError(
                "export", [("push_to", "no token is set. Set HF_TOKEN to one that may write, or run `hf auth login`")]
            )
        self._push, self._record = push, record
        self._api = HfApi(library_name="shardedit")
        self._head, self._files = self._asked()

    def refuse_another(self, about: bytes) -> None:
        """See that the repository is new or empty, or holds this export.

        Args:
            about: what the record's file of this export holds.

        Raises:
            SinkError: it holds something else.
        """
        others = sorted(set(self._files) - set(HUBS_OWN))
        if not others:
            return
        if self._record in others and self._there() == about:
            return
        raise SinkError(
            f"{self._push.repository} holds something else: {', '.join(others[:5])}. Give a repository that is new or "
            "empty"
        )

    def push(self, folder: Path, names: Sequence[str]) -> str:
        """Upload files in one commit; returns its address.

        Args:
            folder: the export's.
            names: of its files, relative to the folder.

        Raises:
            SinkError: the hub refuses or does not answer, or somebody else changed the repository in the meantime.
        """
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in names]
        try:
            self._api.create_repo(self._push.repository, repo_type=KIND, private=self._push.private, exist_ok=True)
            done = self._api.create_commit(
                self._push.repository,
                operations,
                commit_message="Edit pairs, exported by shardedit",
                repo_type=KIND,
                parent_commit=self._head,
            )
        except Exception as error:  # of the hub's client, of its HTTP library, or ValueError
            raise self._failed(error) from error
        return str(done.commit_url)

    def _asked(self) -> tuple[str | None, list[str]]:
        """The commit that the repository is at, and its files; None and none where it is new."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info: Any = self._api.repo_info(self._push.repository, repo_type=KIND)
        except RepositoryNotFoundError:
            return None, []
        except Exception as error:
            raise self._failed(error) from error
        return info.sha, [one.rfilename for one in info.siblings or ()]

    def _there(self) -> bytes:
        from huggingface_hub import hf_hub_download

        try:
            return Path(
                hf_hub_download(self._push.repository, self._record, repo_type=KIND, revision=self._head)
            ).read_bytes()
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> SinkError:
        why = describe(error).rstrip(".")
        return SinkError(
            f"{self._push.repository} cannot be pushed to: {why}. Nothing of this export is there; the same command "
            "tries again. Check the name, the token's rights and the network"
        )
