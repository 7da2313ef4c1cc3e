"""Fixtures that every package's tests share: a seeded tiny checkpoint, the bundle cut from it, and a small
corpus.
"""

import contextlib
import functools
import os
import platform
import signal
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before its import, as the packages do
os.environ["HF_HUB_OFFLINE"] = "1"  # no hub is asked; its client reads this when it is imported

import onnxruntime

import tiny_model


def pytest_report_header() -> str:
    versions = (
        f"onnxruntime {onnxruntime.__version__} ({', '.join(onnxruntime.get_available_providers())}), numpy "
        f"{np.__version__}"
    )
    return f"{versions}, python {platform.python_version()}, {os.cpu_count()} CPUs"


@pytest.fixture(scope="session", autouse=True)
def _minds_ctrl_c() -> None:
    """A shell has its background jobs ignore SIGINT, and so would the processes that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_registry() -> None:
    """torch.onnx makes its table of operators anew for every graph; a second or more, where one will do."""
    with contextlib.suppress(ImportError):
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made = functools.cache(ONNXRegistry.from_torchlib)
        ONNXRegistry.from_torchlib = staticmethod(made)  # type: ignore[assignment, method-assign]


@pytest.fixture(scope="session", autouse=True)
def _no_cache_outside(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` keeps its caches with the tests' own files."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))


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


def export_kind(folder: Path, exits: tuple[int, ...], **fields: object) -> tuple[Path, Path]:
    """A checkpoint of `tiny_model` with some fields, and its bundle."""
    from ease_export.build import export_bundle

    tiny_model.write_checkpoint(folder / "checkpoint", exits, **fields)
    export_bundle(folder / "checkpoint", folder / "bundle")
    return folder / "checkpoint", folder / "bundle"


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Exits with an MLP adapter, a head of their own and a gate."""
    own: dict[str, object] = {"exit_adapter": "mlp", "exit_head": "own"}
    return export_kind(tmp_path_factory.mktemp("gated"), (2, 4, 6), gates=(2, 4), gate_width=8, **own)


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Exits with a layer of their own, a reduced head that they share, and gates."""
    own: dict[str, object] = {"exit_adapter": "block", "exit_head": "reduced", "exit_vocab_size": 90}
    return export_kind(tmp_path_factory.mktemp("blocks"), (2, 4, 6), gates=(2, 4), **own)


@pytest.fixture(scope="session")
def routed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Layers 2, 4 and 6 are Mixture-of-Depths layers; one exit, at the end."""
    return export_kind(tmp_path_factory.mktemp("routed"), (6,), routed_layers=(2, 4, 6), capacity=0.5)


@pytest.fixture(scope="session")
def routed_with_exits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One routed layer below an early exit and one above."""
    return export_kind(tmp_path_factory.mktemp("both"), (3, 6), routed_layers=(2, 5), capacity=0.5)


@pytest.fixture(scope="session")
def precisions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A checkpoint and its bundle in each precision.

    Tied, with biases and normed queries, so that every kind of product is there; grouped heads wider than dim
    / heads.
    """
    pytest.importorskip("torch", reason="no torch to export a bundle with")
    from ease_export.build import export_bundle
    from ease_runtime.bundle.manifest import PRECISIONS

    path = tmp_path_factory.mktemp("tied")
    fields = {"tie_embeddings": True, "attention_bias": True, "qk_norm": True, "head_dim": 24}
    tiny_model.write_checkpoint(path / "checkpoint", (3, 6), **fields)
    bundles = {precision: path / precision for precision in PRECISIONS}
    for precision, bundle in bundles.items():
        export_bundle(path / "checkpoint", bundle, precision)
    return path / "checkpoint", bundles


@pytest.fixture(scope="session")
def halves(precisions: tuple[Path, dict[str, Path]]) -> dict[str, Path]:
    """The same checkpoint in whole numbers for CUDA, with fp16 around."""
    from ease_export.build import export_bundle
    from ease_export.quantize import BITS

    checkpoint = precisions[0]
    bundles = {precision: checkpoint.parent / f"{precision}-cuda" for precision in BITS}
    for precision, bundle in bundles.items():
        export_bundle(checkpoint, bundle, precision, target="cuda")
    return bundles


@pytest.fixture(scope="session")
def brain(
    blocks: tuple[Path, Path], routed_with_exits: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Checkpoints and their bundles in bf16: exits with layers of their own, gates and a reduced head; routed
    layers; what Gemma 3 has (windows, norms of 1 + w before and after, GELU, scaled embeddings).
    """
    from ease_export.build import export_bundle

    folder = tmp_path_factory.mktemp("brain")
    fields: dict[str, object] = {
        "windowed_layers": (1, 2, 4, 5),
        "sliding_window": 10,
        "local_rope_theta": 1e4,
        "post_norms": True,
        "qk_norm": True,
        "activation": "gelu-tanh",
        "embed_scale": 33.94,
    }
    tiny_model.write_checkpoint(folder / "checkpoint", (3, 6), **fields)
    _offset_norms(folder / "checkpoint" / "model.safetensors")
    checkpoints = {"blocks": blocks[0], "routed": routed_with_exits[0], "windowed": folder / "checkpoint"}
    for name, checkpoint in checkpoints.items():
        export_bundle(checkpoint, folder / name, "bf16")
    return {name: (checkpoint, folder / name) for name, checkpoint in checkpoints.items()}


def _offset_norms(path: Path) -> None:
    """Let a checkpoint's norms be 1 + w."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    made = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "norm" in name:
            weights[name] = 1.0 + 0.2 * torch.randn(weight.shape, generator=made)
    save_file(weights, path)
