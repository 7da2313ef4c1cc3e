"""The bundles that come with the package."""

from pathlib import Path

import pytest

from ease_runtime.bundle.manifest import load_manifest
from ease_runtime.bundle.names import SCHEME, SHIPPED, find_bundle
from ease_runtime.llm import LLM
from ease_runtime.options import Options

BUNDLES = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir())
LARGEST = 16e6  # bytes, all files together


def test_there_is_one_of_code() -> None:
    assert "code" in BUNDLES


@pytest.mark.parametrize("name", BUNDLES)
def test_a_shipped_bundle_is_whole_and_small(name: str) -> None:
    folder = find_bundle(f"{SCHEME}{name}")
    manifest = load_manifest(folder)  # checks every file's sum
    files = {path.name for path in folder.iterdir()}
    assert files == {*manifest.files, "manifest.json"}
    assert folder.with_suffix(".md").is_file(), "a card"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LARGEST
    assert manifest.calibration["tested"], "it has a certificate"


@pytest.mark.parametrize("name", BUNDLES)
def test_its_tokens_leave_early_as_it_is_calibrated(name: str) -> None:
    llm = LLM(Path(find_bundle(f"{SCHEME}{name}")))
    prompt = "def read_json(path):"
    said = llm.complete(prompt, Options(max_tokens=96))
    off, lossless = (
        llm.complete(prompt, Options(max_tokens=96, **more))
        for more in ({"threshold": "off"}, {"threshold": 0.6, "catch_up": "verify"})
    )
    assert min(said.depths) < max(said.depths) == llm.stack.manifest.num_layers
    assert set(off.depths) == {llm.stack.manifest.num_layers}
    assert lossless.text == off.text
    assert min(lossless.depths) < llm.stack.manifest.num_layers
