"""What results say about the releases they were made with."""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import ssminterp.versions
from ssminterp.versions import versions


def test_every_release_is_named() -> None:
    assert versions() == {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "ssminterp": version("ssminterp"),
    }


def test_a_source_tree_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_others(name: str) -> str:
        if name == "ssminterp":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(ssminterp.versions, "version", only_others)
    monkeypatch.setattr(ssminterp.versions, "_own_version", ssminterp.versions._own_version.__wrapped__)
    assert "not installed" in versions()["ssminterp"]
    assert versions()["transformers"] == version("transformers")
