"""The runtime's tests need no torch where a bundle is given: EASE_TEST_BUNDLE=DIR, written by `python
tests/tiny_model.py`.
"""

import os
from pathlib import Path

import pytest

from ease_runtime.ort.stack import OrtStack


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """The bundle that EASE_TEST_BUNDLE names, else one exported here (as for every other package's tests)."""
    if given := os.environ.get("EASE_TEST_BUNDLE"):
        return Path(given)
    pytest.importorskip("torch", reason="no torch to export a bundle with, and EASE_TEST_BUNDLE names none")
    return request.getfixturevalue("tiny_bundle")


@pytest.fixture(scope="session")
def tiny_stack(tiny_bundle: Path) -> OrtStack:
    """The bundle's graphs, loaded once. Who changes it puts it back."""
    return OrtStack(tiny_bundle)
