"""docs/formats.md names every key that a manifest, a checkpoint and its log may have."""

import dataclasses
import json
from pathlib import Path

import pytest

from ease_runtime.bundle.manifest import ExitInfo, FileInfo, Manifest, SegmentInfo, WeightForm
from ease_train.convert.text_format import TextFormat
from ease_train.training.config import SECTIONS
from ease_train.training.trainer import EvalEvent, StepEvent

DOCS = Path(__file__).parent.parent / "docs"


def names(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def keys_of(config: dict[str, object]) -> set[str]:
    """Of a checkpoint's config.json, but for the recipes, which have a page of their own."""
    inner = [
        value for name, value in config.items() if isinstance(value, dict) and name not in ("recipe", "base")
    ]
    return set(config) | {key for value in inner for key in value}


@pytest.mark.parametrize(
    "kind", [Manifest, SegmentInfo, ExitInfo, FileInfo, WeightForm, StepEvent, EvalEvent, TextFormat]
)
def test_every_field_is_named(kind: type) -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert {name for name in names(kind) if f"`{name}`" not in page} == set()


def test_every_key_of_written_files_is_named(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    found = keys_of(json.loads((tiny_checkpoint / "config.json").read_text(encoding="utf-8")))
    manifest = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
    found |= set(manifest) | set(manifest["source"])
    assert {key for key in found if f"`{key}`" not in page} == set()


def test_every_file_of_a_checkpoint_is_named(tiny_checkpoint: Path) -> None:
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert {file.name for file in tiny_checkpoint.iterdir() if f"`{file.name}" not in page} == set()


def test_every_setting_of_a_recipe_is_named() -> None:
    page = (DOCS / "recipe.md").read_text(encoding="utf-8")
    paths = {".".join(path) for section in SECTIONS.values() for path, _, _ in section.settings()}
    assert {path for path in paths if f"`{path}`" not in page} == set()
