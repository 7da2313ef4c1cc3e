"""From a bundle's name to its directory: what is there, what comes with the package, what the hub has."""

from pathlib import Path

import pytest

from ease_common.errors import BundleError
from ease_runtime.bundle import names


def test_what_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "model").mkdir(parents=True)
    (tmp_path / "ease:code").mkdir()
    assert names.find_bundle("someone/model") == Path("someone/model")
    assert names.find_bundle("ease:code") == Path("ease:code")


def test_a_path_that_is_not_there_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of several parts, nor one whose directory is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "download_bundle", None)
    (tmp_path / "runs").mkdir()
    for name in ("runs/demo", "runs/demo/bundle", "bundle", "/runs/demo", "./runs"):
        assert names.find_bundle(name) == Path(name)


def test_shipped_bundles_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "SHIPPED", tmp_path)
    (tmp_path / "code").mkdir()
    assert names.find_bundle("ease:code") == tmp_path / "code"
    with pytest.raises(BundleError, match="no bundle ease:cod comes with this package; did you mean 'code'"):
        names.find_bundle("ease:cod")
    with pytest.raises(BundleError, match=r"no bundle ease:\.\. comes"):
        names.find_bundle("ease:..")
