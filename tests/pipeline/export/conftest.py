"""A trained model, and its export, for all modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.exports import export, train


@pytest.fixture(scope="session")
def trained(dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Faster R-CNN that has learned its ten pages."""
    folder, ap = train(tmp_path_factory.mktemp("trained"), dataset_folder, 200)
    assert ap > 0.2, "the gate needs a model that finds something"
    return folder


@pytest.fixture(scope="session")
def exported(trained: Path, dataset_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export(trained, out, dataset_folder)
    return out
