"""Ctrl-C in every command, while it imports, as it begins and in the middle of its work: one line, 130, and
nothing half written.
"""

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import ease_export.cli
import ease_runtime.cli.main
from hit import Moment, interrupted

ease_train_cli = pytest.importorskip("ease_train.cli", reason="no torch: no checkpoint to run commands on")
ease_eval_cli = pytest.importorskip("ease_eval.cli.main")
GROUPS: dict[str, click.Group] = {
    "ease_train": ease_train_cli.main,
    "ease_export": ease_export.cli.main,
    "ease_run": ease_runtime.cli.main.main,
    "ease_eval": ease_eval_cli.main,
}
AGAIN = "run the command again"
# these take seconds to begin
SLOW = (
    *(f"ease_train {name}" for name in ("fit", "tune", "gates", "import", "export-hf", "export-exits")),
    *(f"ease_export {name}" for name in ("build", "verify", "upgrade", "quantize")),
    *(f"ease_eval {name}" for name in ("lm-eval", "compare", "advise", "latency")),
)


@dataclass(frozen=True)
class Case:
    """A command; a module that it imports; the moments at which it begins and is at work; what is left then,
    and how it is said to go on.

    Words in capitals stand for files: IN/... were there before, OUT/... is written.
    """

    command: str
    imports: str
    begins: Moment
    works: Moment
    stays: tuple[str, ...] = ()
    go_on: str = AGAIN
    said: str = ""
    code: int = 130  # in the middle of its work


TRAIN = "--data IN/text.txt --threads 1"
SHORT = "--steps 40 --batch-size 2 --sequence-length 16 --warmup-steps 3 --eval-tokens 64"
SMALL = (
    "--data IN/text.txt --scored-tokens 60 --texts 1 --prompt-tokens 8 --new-tokens 8 --rounds 1 --threads 1"
)
CHECKPOINT: Moment = ("open", "checkpoint/config.json", 1)
BUNDLE: Moment = ("open", "manifest.json", 1)
STEP: Moment = ("call", "Engine.step", 3)
GOES_ON = "step 2 is saved; go on: ease-train fit --out OUT/it --resume"
CASES = [
    Case(
        "ease_train recipes", "rich.table", ("open", "alpha-curriculum", 1), ("open", "token-routed.toml", 1)
    ),
    Case(
        f"ease_train fit demo --out OUT/it {TRAIN} {SHORT} --num-layers 3 --exits 1,3 --dim 16 --num-heads 2"
        " --num-kv-heads 2 --ffn-dim 16 --kind char --max-positions 32 --layer-weights 1 0.5"
        " --layer-weights 3 1",
        "torch",
        ("open", "text.txt", 1),
        ("call", "Trainer.train_step", 2),
        ("it",),
        GOES_ON,
    ),
    Case(
        f"ease_train tune IN/checkpoint --out OUT/it {TRAIN} {SHORT} --exits 3,6 --layer-weights 3 1",
        "torch.nn",
        CHECKPOINT,
        ("call", "Trainer.train_step", 2),
        ("it",),
        GOES_ON,
    ),
    Case(
        f"ease_train gates IN/checkpoint --out OUT/it {TRAIN} --steps 3 --eval-tokens 64",
        "torch._C",
        CHECKPOINT,
        ("open", "metrics.jsonl", 2),
    ),
    Case(
        "ease_train import IN/hf --out OUT/it",
        "safetensors",
        ("open", "hf/config.json", 1),
        ("open", "metrics.jsonl", 1),
    ),
    Case(
        "ease_train export-hf IN/checkpoint OUT/it",
        "torch.utils",
        CHECKPOINT,
        ("open", "tokenizer_config.json", 1),
    ),
    Case("ease_train export-exits IN/checkpoint OUT/it", "numpy", CHECKPOINT, ("open", "it.partial", 1)),
    Case("ease_export build IN/checkpoint OUT/it", "onnx", CHECKPOINT, ("open", "segment_01.onnx", 1)),
    Case("ease_export inspect IN/bundle", "rich.console", BUNDLE, ("open", "segment_02.onnx", 1)),
    Case(
        "ease_export verify IN/bundle --checkpoint IN/checkpoint --tokens 9",
        "torch",
        BUNDLE,
        ("call", "difference", 3),
    ),
    Case(
        "ease_export upgrade OUT/old --checkpoint IN/checkpoint",
        "onnx",
        BUNDLE,
        ("open", "segment_01.onnx", 1),
    ),
    Case(
        "ease_export quantize IN/checkpoint --out OUT/it --data IN/text.txt --tokens 300",
        "torch",
        CHECKPOINT,
        ("call", "rounded_columns", 3),
    ),
    Case(
        "ease_export push IN/bundle someone/tiny", "huggingface_hub", BUNDLE, ("call", "HfApi.create_repo", 1)
    ),
    Case("ease_run generate IN/bundle --prompt king", "onnxruntime", BUNDLE, STEP),
    Case(
        "ease_run batch IN/bundle IN/lines.jsonl OUT/it.jsonl --batch-size 1",
        "filelock",
        ("open", "lines.jsonl", 1),
        ("call", "Engine.step", 9),
        ("it.jsonl",),
        "OUT/it.jsonl keeps the answers so far; run the command again to go on",
    ),
    Case(
        "ease_run chat IN/bundle",
        "numpy",
        BUNDLE,
        ("builtins.input", "> ", 2),
        (),
        "nothing of the conversation is kept",
        "And\n",
    ),
    Case(
        "ease_run serve IN/bundle --port 0",
        "uvicorn",
        BUNDLE,
        ("call", "Server.main_loop", 2),
        go_on="",
        code=0,
    ),
    Case(
        f"ease_eval table IN/bundle {SMALL} --json OUT/it.json",
        "click",
        BUNDLE,
        ("open", ".it.json.journal", 4),
        (".it.json.journal",),
    ),
    Case(f"ease_eval ppl IN/bundle {SMALL} --json OUT/it.json", "rich", BUNDLE, ("call", "make_quality", 1)),
    Case(
        f"ease_eval depth IN/bundle {SMALL} --json OUT/it.json",
        "numpy",
        BUNDLE,
        ("open", ".it.json.partial", 1),
    ),
    Case(f"ease_eval latency IN/bundle {SMALL} --json OUT/it.json", "onnxruntime", BUNDLE, STEP),
    Case(
        f"ease_eval report IN/bundle {SMALL} --out OUT/it.html",
        "matplotlib",
        BUNDLE,
        ("open", ".svg", 2),
        ("it",),
    ),
    Case(
        "ease_eval calibrate OUT/bundle --data IN/text.txt --split train --documents 20 --tokens 16"
        " --threads 1",
        "jinja2",
        BUNDLE,
        ("call", "write_certificate", 1),
    ),
    Case(
        "ease_eval agreement IN/bundle --prompts IN/prompts.txt --threshold 0.3 --max-tokens 5"
        " --json OUT/it.json",
        "tokenizers",
        BUNDLE,
        STEP,
    ),
    Case(
        "ease_eval tasks IN/bundle IN/tasks.jsonl --json OUT/it.json",
        "rich.table",
        ("open", "tasks.jsonl", 1),
        ("open", ".it.json.journal", 4),
        (".it.json.journal",),
    ),
    Case(
        "ease_eval lm-eval run --model ease --model_args bundle=IN/bundle --include_path IN"
        " --tasks ease_local --output_path OUT/it",
        "lm_eval",
        BUNDLE,
        ("call", "EaseLM.loglikelihood", 1),
    ),
    Case(
        "ease_eval compare IN/bundle --checkpoint IN/hf --runtimes genai --data IN/text.txt --new-tokens 4"
        " --rounds 1 --prompt-tokens 8 --texts 1 --work OUT/work --json OUT/it.json",
        "numpy",
        BUNDLE,
        ("call", "PeerProcess.ask", 1),
        ("work",),
    ),
    Case(
        f"ease_eval advise IN/bundle {SMALL} --json OUT/it.json",
        "onnxruntime",
        BUNDLE,
        ("call", "own_seconds", 1),
    ),
]
TASK = """
task: ease_local
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def files(
    tiny_checkpoint: Path, tiny_bundle: Path, corpus_text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the commands read."""
    from ease_train.convert.huggingface import export_model
    from ease_train.training.checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("in")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    shutil.copytree(tiny_bundle, folder / "bundle")
    export_model(load_checkpoint(tiny_checkpoint), folder / "hf")
    item = json.dumps({"question": "And the king", "choices": [" spoke", " was"], "answer": 1})
    texts = {
        "text.txt": corpus_text * 3,
        "prompts.txt": "And the king\n" * 3,
        "lines.jsonl": json.dumps({"prompt": "And the king", "max_tokens": 3}) + "\n" + "{}\n" * 3,
        "tasks.jsonl": f"{item}\n" * 4,
        "task.yaml": TASK.format(file=folder / "tasks.jsonl"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def out(files: Path, tmp_path: Path) -> Path:
    """Where the commands write: two of them into a bundle that is there."""
    folder = tmp_path / "out"
    shutil.copytree(files / "bundle", folder / "bundle")
    shutil.copytree(files / "bundle", folder / "old")
    manifest = folder / "old" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 4}))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hit(case: Case, moment: Moment, files: Path, out: Path) -> tuple[int, list[str]]:
    """Ctrl-C at a moment: the exit code, and the lines on stderr."""
    script, *arguments = case.command.replace("IN", str(files)).replace("OUT", str(out)).split()
    return interrupted(moment, signal.SIGINT, script, *arguments, said=case.said)


def named(case: Case) -> str:
    return " ".join(case.command.split()[:2])


SOME_SLOW = [
    pytest.param(case, marks=[pytest.mark.slow] if named(case) in SLOW else [], id=named(case))
    for case in CASES
]


def test_every_command_is_here() -> None:
    there = {f"{group} {command}" for group, commands in GROUPS.items() for command in commands.commands}
    assert sorted(map(named, CASES)) == sorted(there)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_while_it_imports(case: Case, files: Path, out: Path) -> None:
    before = content(out)
    assert hit(case, ("import", case.imports, 1), files, out) == (130, [f"interrupted; {AGAIN}"])
    assert content(out) == before


@pytest.mark.parametrize("case", SOME_SLOW)
def test_as_it_begins(case: Case, files: Path, out: Path) -> None:
    before = content(out)
    code, lines = hit(case, case.begins, files, out)
    assert code == 130, lines
    assert lines[-1].startswith("interrupted; ")
    assert content(out) == before


@pytest.mark.parametrize("case", SOME_SLOW)
def test_in_the_middle_of_its_work(case: Case, files: Path, out: Path) -> None:
    before = content(out)
    code, lines = hit(case, case.works, files, out)
    assert code == case.code, lines
    assert not any("Traceback" in line for line in lines)
    if code:
        assert lines[-1] == f"interrupted; {case.go_on.replace('OUT', str(out))}"
    assert {path.name for path in out.iterdir()} == {"bundle", "old", *case.stays}
    kept = content(out)
    assert {name: kept[name] for name in before} == before
    assert not any(".partial" in name or name.endswith(".lock") for name in kept)
    for name in (name for name in kept if kept[name] and name.endswith(("jsonl", "journal"))):
        assert kept[name].endswith(b"\n"), name
        assert all(json.loads(line) for line in kept[name].splitlines()), name
