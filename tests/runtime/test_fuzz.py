"""Mutated bundles: each is refused in one line, or runs; none crashes, hangs, or reads what has no sum."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ease_common.errors import EaseError
from ease_runtime.bundle.manifest import MANIFEST_FILE, sha256_of
from ease_runtime.engine.engine import Engine
from ease_runtime.ort.stack import OrtStack

JUNK = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    2**63,
    0.5,
    "",
    "x",
    "../manifest.json",
    "/etc/passwd",
    "segment_02.onnx",
    [],
    {},
    [1],
    {"a": 1},
]
SECONDS = 300  # for a hundred mutations


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [found for key, inside in items for found in [(*path, key), *leaves(inside, (*path, key))]]


def mutate_manifest(bundle: Path, dice: random.Random) -> None:
    """Something in it becomes something else, or is gone."""
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    *path, last = dice.choice([path for path in leaves(values) if path[0] != "source"])
    inside = values
    for key in path:
        inside = inside[key]
    if dice.random() < 0.2:
        del inside[last]
    elif isinstance(inside[last], int) and dice.random() < 0.5:
        inside[last] += dice.choice([-2, -1, 1, 2, 64])
    else:
        inside[last] = dice.choice(JUNK)
    (bundle / MANIFEST_FILE).write_text(json.dumps(values))


def mutate_file(bundle: Path, dice: random.Random) -> None:
    """Bytes of a graph, of weights or of the tokenizer change, and their sum does not."""
    path = dice.choice([path for path in sorted(bundle.iterdir()) if path.name != MANIFEST_FILE])
    damage(path, dice)


def mutate_graph_and_sum(bundle: Path, dice: random.Random) -> None:
    """Bytes of a graph change, and the manifest is made to agree: what a forger would do."""
    path = dice.choice(sorted(bundle.glob("*.onnx")))
    damage(path, dice)
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    values["files"][path.name] = {"sha256": sha256_of(path), "num_bytes": path.stat().st_size}
    (bundle / MANIFEST_FILE).write_text(json.dumps(values))


def damage(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 4)):
        content[dice.randrange(len(content))] ^= dice.randrange(1, 256)
    path.write_bytes(content[: dice.randrange(len(content))] if dice.random() < 0.2 else content)


MUTATIONS = {"manifest": mutate_manifest, "file": mutate_file, "forged": mutate_graph_and_sum}


def run_one(bundle: Path) -> str:
    """Load a bundle and generate with it: "runs", or the one line that refuses it."""
    try:
        engine = Engine(OrtStack(bundle))
        list(engine.generate(engine.start([1, 2, 3], max_new_tokens=3)))
    except EaseError as error:
        return str(error)
    return "runs"


def main(kind: str, source: str, folder: str, seeds: range) -> None:
    """Print what became of each mutation; a crash ends the process, and the test that reads this."""
    for seed in seeds:
        bundle = Path(folder) / f"{kind}{seed}"
        shutil.copytree(source, bundle)
        MUTATIONS[kind](bundle, random.Random(seed))
        print(json.dumps([seed, run_one(bundle)]), flush=True)
        shutil.rmtree(bundle)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_hundred_mutations(kind: str, tiny_bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, __file__, kind, str(tiny_bundle), str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    results = dict(json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0, f"after {len(results)} mutations: {done.stderr[-2000:]}"
    assert len(results) == 100
    assert all("\n" not in result for result in results.values())
    refused = sum(result != "runs" for result in results.values())
    assert (
        refused >= {"manifest": 90, "file": 100, "forged": 20}[kind]
    )  # names and notes inside a graph may be anything


def test_a_file_without_a_sum_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (bundle / "other.data").write_bytes(b"weights that nobody has checked")
    with pytest.raises(EaseError, match="has no sha256 sum"):
        OrtStack(bundle)


if __name__ == "__main__":
    main(*sys.argv[1:4], range(100))
