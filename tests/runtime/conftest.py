from __future__ import annotations

from pathlib import Path

import pytest

from toprovar.runtime.session import Session

from . import tiny


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A fresh toy bundle, to be spoilt."""
    return tiny.write_bundle(tmp_path / "tiny.bundle")


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle that no test changes."""
    return tiny.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny.bundle")


@pytest.fixture(scope="session")
def dense_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same toy model, where nothing is pruned or dropped."""
    schedules = {name: tiny.TinySchedule((1, 4, 9), None) for name in tiny.SCHEDULES}
    return tiny.write_bundle(tmp_path_factory.mktemp("bundles") / "dense.bundle", schedules, "dense")


@pytest.fixture(scope="session")
def session(shared_bundle: Path) -> Session:
    return Session(shared_bundle, threads=1)
