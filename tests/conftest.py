"""Fixtures that every package's tests share: a seeded tiny checkpoint, the bundle cut from it, and a small corpus."""

import os
import platform
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before its import, as the packages do

import onnxruntime

import tiny_model


def pytest_report_header() -> str:
    versions = f"onnxruntime {onnxruntime.__version__} ({', '.join(onnxruntime.get_available_providers())}), numpy {np.__version__}"
    return f"{versions}, python {platform.python_version()}, {os.cpu_count()} CPUs"


@pytest.fixture(scope="session", autouse=True)
def _no_cache_outside(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` keeps its caches with the tests' own files, and asks no hub."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """About 40,000 characters with some structure."""
    return tiny_model.corpus()


@pytest.fixture(scope="session")
def corpus_file(corpus_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(corpus_text * 4, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded model of 6 layers with exits at 2, 4 and 6, untrained."""
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny_model.write_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint`: three segments."""
    from ease_export.build import export_bundle

    path = tmp_path_factory.mktemp("tiny_bundle") / "bundle"
    export_bundle(tiny_checkpoint, path)
    return path
