"""Where figures come from: the bundle, its manifest's sum, the machine's device, the versions.

Every JSON begins with it.
"""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime

from ease_runtime.bundle.manifest import MANIFEST_FILE, sha256_of
from ease_runtime.llm import LLM


def provenance(bundle: Path, llm: LLM, num_threads: int) -> dict[str, Any]:
    """As JSON has it; 0 threads are all."""
    return {
        "bundle": str(bundle),
        "manifest_sha256": sha256_of(bundle / MANIFEST_FILE),
        "precision": llm.manifest.precision,
        "device": llm.stack.device.name,  # type: ignore[attr-defined]
        "num_threads": num_threads,
        "exact": llm.engine.runner.exact,
        "source": llm.manifest.source,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on."""
    names = ("numpy", "tokenizers", "ease-lm")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "onnxruntime": onnxruntime.__version__,
    }
