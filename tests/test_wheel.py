"""The wheel and the source distribution: what they hold, and what the wheel leaves out."""

import subprocess
import sys
import tarfile
import tomllib
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
        if file.suffix in (".py", ".toml", ".html", ".j2") or ("shipped" in file.parts and file.is_file())
    }
    assert sources <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)


def test_a_source_distribution_holds_what_its_tests_need(tmp_path: Path) -> None:
    made = "import setuptools.build_meta as backend; backend.build_sdist(__import__('sys').argv[1])"
    subprocess.run([sys.executable, "-c", made, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    folders = (
        "bench",
        "docs",
        "examples",
        "exits",
        "experiments",
        "scripts",
        "tests",
        *PACKAGES[:-1],
        "eval",
    )
    needed = {
        str(file.relative_to(ROOT))
        for folder in folders
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".pyc", ".so")
    }
    single = {".ci/run", "Makefile", "pyproject.toml", "mkdocs.yml", "README.md", "LICENSE", "CITATION.cff"}
    assert needed | single <= names
    assert not {name for name in names if name.startswith(("runs/", "site/", ".venv"))}


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for file in (
        ROOT / "CITATION.cff",
        *(ROOT / "ease_common").glob("*.py"),
        *(ROOT / "ease_runtime").rglob("*.py"),
    ):
        assert f'"{project["version"]}"' not in file.read_text(encoding="utf-8"), file
