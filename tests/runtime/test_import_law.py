"""The import law: packages meet at directories, and a server that only runs bundles installs no torch."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What of EASE a package may import, by prefix of the module's name; its own modules always.
LAW = {
    "ease_common": (),
    "ease_runtime": ("ease_common",),
    "ease_train": ("ease_common",),
    "ease_export": ("ease_common", "ease_train", "ease_runtime"),
    "ease_eval": ("ease_common", "ease_runtime", "ease_train.data.corpora"),
}
HEAVY = ("torch", "onnx", "onnxscript", "transformers", "datasets", "safetensors", "pandas", "pyarrow")


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def modules(package: str) -> dict[str, Path]:
    """Every module of a package: its name and file."""
    root = folder(package)
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The full name of everything that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
            "import_module",
        ):
            yield _text(node.args[0])


def _text(argument: ast.expr) -> str:
    """A module's name that is given as a text, the filled-in parts of it as `{}`."""
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    if isinstance(argument, ast.JoinedStr):
        return "".join(_text(part) for part in argument.values)
    return "{}"


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def breaches(package: str, module: str, path: Path, source: str) -> list[str]:
    """The imports of a module that the law forbids."""
    names = imports(source, module, path.name == "__init__.py")
    ease = [name for name in names if name.split(".")[0].startswith(("ease_", "{}"))]
    return [name for name in ease if not within(name, (package, *LAW[package]))]


@pytest.mark.parametrize("package", LAW)
def test_packages_import_only_what_they_may(package: str) -> None:
    found = modules(package)
    assert len(found) > 4
    assert {
        name: wrong
        for name, path in found.items()
        if (wrong := breaches(package, name, path, path.read_text(encoding="utf-8")))
    } == {}


@pytest.mark.parametrize(
    ("package", "source", "wrong"),
    [
        ("ease_runtime", "import ease_train", ["ease_train"]),
        (
            "ease_runtime",
            "def f():\n    from ease_export.build import export_bundle",
            ["ease_export.build.export_bundle"],
        ),
        ("ease_runtime", "from .engine import Engine\nimport numpy", []),
        (
            "ease_runtime",
            "import importlib\nimportlib.import_module('ease_eval.measure.table')",
            ["ease_eval.measure.table"],
        ),
        ("ease_runtime", "__import__(name)", ["{}"]),
        ("ease_train", "from importlib import import_module\nimport_module(f'ease_train.{name}')", []),
        (
            "ease_train",
            "from importlib import import_module\nimport_module(f'ease_export.{name}')",
            ["ease_export.{}"],
        ),
        ("ease_train", "import ease_runtime.bundle.manifest as m", ["ease_runtime.bundle.manifest"]),
        (
            "ease_eval",
            "from ease_train.data.corpora import load_documents\nfrom ease_common import errors",
            [],
        ),
        ("ease_eval", "from ease_train import model", ["ease_train.model"]),
        ("ease_eval", "from ease_train.corpora_more import x", ["ease_train.corpora_more.x"]),
        (
            "ease_export",
            "import ease_train.model.decoder, ease_eval.measure.table",
            ["ease_eval.measure.table"],
        ),
    ],
)
def test_the_check_sees_breaches(package: str, source: str, wrong: list[str]) -> None:
    assert breaches(package, f"{package}.some", Path("some.py"), source) == wrong


def test_the_runtime_names_nothing_heavy() -> None:
    """Not even inside a function."""
    for name, path in modules("ease_runtime").items():
        heavy = [
            found
            for found in imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
            if within(found, HEAVY)
        ]
        assert heavy == [], name


def needed(module: str) -> set[str]:
    """Every module of the runtime that a module imports, itself or through others."""
    known = modules("ease_runtime")
    found = set[str]()
    left = [module]
    while left:
        name = left.pop()
        source = known[name].read_text(encoding="utf-8")
        for imported in imports(source, name, known[name].name == "__init__.py"):
            owner = next(
                (prefix for prefix in (imported, imported.rpartition(".")[0]) if prefix in known), None
            )
            if owner and owner not in found:
                found.add(owner)
                left.append(owner)
    return found


@pytest.mark.parametrize(
    "name", ["engine.schedule", "engine.commit", "engine.slots", "engine.sequence", "policies"]
)
def test_what_decides_imports_no_stack(name: str) -> None:
    """Neither itself nor through others: only the runner calls the layers."""
    layers = ("ort.stack", "ort.sessions", "engine.runner", "engine.engine", "engine.probe")
    assert not {f"ease_runtime.{part}" for part in layers} & needed(f"ease_runtime.{name}")


def test_only_the_runner_and_the_probe_call_the_stack() -> None:
    seen = needed("ease_runtime.engine.engine")
    assert {"ease_runtime.ort.stack", "ease_runtime.policies.protocol"} <= seen, (
        "the walk sees what is imported"
    )
    calls = (
        "run_segment",
        "run_kv",
        "run_route",
        "run_routed",
        "reserve_rows",
        "read_states",
        "ask",
        "head",
        "block",
    )
    for name in ("engine.engine", "engine.commit", "engine.slots", "engine.schedule", "llm"):
        tree = ast.parse(modules("ease_runtime")[f"ease_runtime.{name}"].read_text(encoding="utf-8"))
        called = {
            node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & set(calls), name


def run_python(code: str, *arguments: str) -> list[str]:
    """Lines that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


LOADED = f"""
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
if sys.argv[1]:
    from ease_runtime.llm import LLM, Options
    for catch_up in ("propagate", "recompute"):
        options = Options(max_tokens=3, threshold=(0.4,), catch_up=catch_up, temperature=0.7)
        events = list(LLM(sys.argv[1]).generate("And the king", options))
        print(len(events))
for name in {HEAVY!r} + ("ease_train", "ease_export", "ease_eval"):
    if name in sys.modules:
        print(name)
"""


def test_running_a_bundle_loads_nothing_heavy(tiny_bundle: Path) -> None:
    """Every module of the runtime imported, the bundle loaded, three tokens generated each way."""
    names = list(modules("ease_runtime"))
    assert "ease_runtime.cli.main" in names
    assert "ease_runtime.engine.mock" in names
    assert run_python(LOADED, str(tiny_bundle), *names) == ["3", "3"]


def test_evaluation_loads_no_torch() -> None:
    """Nothing of what training and exporting need is there once every module of ease_eval is imported."""
    needs = {
        "matplotlib": {"ease_eval.measure.figures", "ease_eval.measure.report"},
        "lm_eval": {"ease_eval.tasks.harness"},
    }
    missing = set().union(
        *(names for package, names in needs.items() if importlib.util.find_spec(package) is None)
    )
    loaded = run_python(LOADED, "", *(name for name in modules("ease_eval") if name not in missing))
    assert not set(loaded) & {"torch", "onnx", "onnxscript", "transformers", "safetensors", "ease_export"}
    assert "ease_eval" in loaded


def test_the_check_of_loaded_modules_can_fail() -> None:
    """A module on the list that is there in every environment: the list is really looked at."""
    code = LOADED.replace(f"{HEAVY!r}", "('json', 'torch')")
    assert run_python(code, "", "json") == ["json"]
