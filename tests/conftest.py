"""Fixtures for every folder of tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _beside(name: str) -> ModuleType:
    """Import a module that lies beside this file: with importmode=importlib the folder is not on the path."""
    full = f"shardedit_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """An S3 server of this test session; see `tests/servers.py`. Buckets: `s3_server.bucket(name)` is a folder."""
    with _beside("servers").s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[object]:
    """An S3 server that honours conditional puts; see `tests/moto.py`."""
    with _beside("moto").moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def photographs() -> dict[str, Path]:
    """File name -> path of the pictures in the scikit-image package; see `tests/photographs.py`."""
    return dict(_beside("photographs").photographs())
