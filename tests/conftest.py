"""Fixtures for every folder of tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Nothing of the package is imported here: pytest reads this file before jaxtyping's hook is in place.
from tests import moto, photographs, servers

if TYPE_CHECKING:
    from tests.places import Place


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """An S3 server of this test session; see `tests/servers.py`. Buckets: `s3_server.bucket(name)` is a folder."""
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[moto.MotoServer]:
    """An S3 server that honours conditional puts; see `tests/moto.py`."""
    with moto.moto_server() as server:
        yield server


@pytest.fixture(scope="module", params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Files of this machine, then objects of the S3 server: a test that asks for it runs on both; see `only_on_s3`."""
    from tests.places import local_place, s3_place

    if request.param == "local":
        yield local_place(tmp_path_factory.mktemp("place"))
        return
    with s3_place(request.getfixturevalue("s3_server")) as made:
        yield made


@pytest.fixture(scope="session", name="photographs")
def every_photograph() -> dict[str, Path]:
    """File name -> path of the pictures in the scikit-image package; see `tests/photographs.py`."""
    return dict(photographs.photographs())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny Stable Diffusion, for a test to spoil."""
    return Path(shutil.copytree(Path(__file__).parent / "golden" / "tiny-sd", tmp_path / "model"))


@pytest.fixture(scope="session")
def tiny_klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FLUX.2 klein base; not to be spoilt. See `tests/models/families/klein.py`."""
    from tests.models.families.klein import make_klein

    return make_klein(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="session")
def tiny_qwen_edit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen-Image-Edit; not to be spoilt. See `tests/models/families/tiny_qwen.py`."""
    from tests.models.families.tiny_qwen import save_tiny_qwen

    return save_tiny_qwen(tmp_path_factory.mktemp("qwen_edit") / "model", edits=True)
