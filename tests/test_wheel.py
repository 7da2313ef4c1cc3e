"""The wheel: what it holds, and that nothing of the tests or the bench goes with it."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("ease_common", "ease_start", "ease_train", "ease_export", "ease_runtime", "ease_eval")


def test_a_wheel_holds_the_packages_and_their_data(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {f"{package}/py.typed" for package in PACKAGES}
    assert names >= {"ease_runtime/server/page.html", "ease_train/recipes/small.toml"}
    sources = {
        f"{package}/{file.relative_to(folder)}"
        for package in PACKAGES
        for folder in [ROOT / "eval" / package if package == "ease_eval" else ROOT / package]
        for file in folder.rglob("*")
        if file.suffix in (".py", ".toml", ".html", ".j2")
    }
    assert sources <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
