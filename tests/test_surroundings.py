"""A home that cannot be written, no room for temporary files, no encoding but ASCII, no input, no terminal:
commands do what they do elsewhere, or say in a line what they want.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="some of the commands train and build")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that nobody writes into")

PLACES = {
    "home": "export HOME=/proc",
    "temporary files": "export TMPDIR=/proc",
    "a full disk for them": "mount -t tmpfs -o size=4k none FULL; head -c 9999 /dev/zero > FULL/it;"
    " export TMPDIR=FULL",
    "ascii": "export PYTHONIOENCODING=ascii TERM=dumb",
    "C": "export LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0",
    "no input": "exec <&-",
}
ALL = "; ".join([PLACES["home"], PLACES["a full disk for them"], PLACES["ascii"], PLACES["no input"]])
SIZE = (
    "--steps 2 --batch-size 2 --sequence-length 16 --warmup-steps 1 --eval-tokens 64 --num-layers 2"
    " --exits 1,2 --dim 16 --num-heads 2 --num-kv-heads 2 --ffn-dim 16 --kind char --max-positions 32"
    " --layer-weights 1 1 --layer-weights 2 1 --threads 1"
)
MEASURED = (
    "IN/bundle --data IN/text.txt --scored-tokens 60 --texts 1 --prompt-tokens 8 --new-tokens 8 --rounds 1"
    " --threads 1"
)
COMMANDS = {
    "generate": "ease_run generate IN/bundle --prompt king --max-tokens 9 --json",
    "batch": "ease_run batch IN/bundle IN/lines.jsonl OUT/it.jsonl",
    "table": f"ease_eval table {MEASURED} --json OUT/it.json",
    "fit": f"ease_train fit demo --out OUT/it --data IN/text.txt {SIZE}",
    "build": "ease_export build IN/checkpoint OUT/it",
}


@pytest.fixture(scope="module")
def files(
    tiny_checkpoint: Path, tiny_bundle: Path, corpus_text: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the commands read."""
    folder = tmp_path_factory.mktemp("in")
    (folder / "checkpoint").symlink_to(tiny_checkpoint)
    (folder / "bundle").symlink_to(tiny_bundle)
    (folder / "text.txt").write_text(corpus_text * 3, encoding="utf-8")
    line = json.dumps({"id": "\u00e9", "prompt": "And the k\u00edng", "max_tokens": 9}, ensure_ascii=False)
    (folder / "lines.jsonl").write_text(f"{line}\n" * 2, encoding="utf-8")
    return folder


def run(command: str, place: str, files: Path, out: Path) -> "subprocess.CompletedProcess[bytes]":
    """A command in a place, which is a shell's lines; mounts end with it."""
    out.mkdir()
    script, *arguments = command.replace("IN", str(files)).replace("OUT", str(out)).split()
    (out.parent / "full").mkdir(exist_ok=True)
    shell = f'{place.replace("FULL", str(out.parent / "full"))}\nexec "$@"'
    python = [sys.executable, "-c", f"import ease_start; ease_start.{script}()", *arguments]
    apart = ["unshare", "-rm"] if "mount" in place else []
    return subprocess.run([*apart, "sh", "-c", shell, "sh", *python], capture_output=True)


def told(command: str, out: Path, stdout: bytes) -> object:
    """What a command has found, without its times."""
    if command == "generate":
        return json.loads(stdout)["text"]
    if command == "batch":
        return (out / "it.jsonl").read_bytes()
    if command == "table":
        return [row["ppl"] for row in json.loads((out / "it.json").read_text(encoding="utf-8"))["rows"]]
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def can_mount() -> bool:
    """Whether a full disk can be had here."""
    asked = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(asked, capture_output=True).returncode == 0


def compared(command: str, place: str, files: Path, folder: Path) -> None:
    """Raise where a command does not do in a place what it does elsewhere."""
    if "mount" in place and not can_mount():
        pytest.skip("no disk can be mounted here")
    found = run(COMMANDS[command], place, files, folder / "there")
    assert found.returncode == 0, found.stderr
    assert b"Traceback" not in found.stderr
    plain = run(COMMANDS[command], ":", files, folder / "here")
    assert told(command, folder / "there", found.stdout) == told(command, folder / "here", plain.stdout)


@pytest.mark.parametrize("command", ["generate", "batch", "table", "fit"])
def test_all_of_it_at_once(command: str, files: Path, tmp_path: Path) -> None:
    compared(command, ALL, files, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_after_the_other(command: str, place: str, files: Path, tmp_path: Path) -> None:
    compared(command, PLACES[place], files, tmp_path)


def test_a_text_that_is_kept_nowhere(files: Path, tmp_path: Path) -> None:
    """Without HF_HOME the home is where copies of texts stand."""
    found = run(COMMANDS["table"], f"unset HF_HOME; {PLACES['home']}", files, tmp_path / "out")
    (line,) = found.stderr.decode().splitlines()
    assert found.returncode == 1
    assert line.startswith(f"error: cannot keep a copy of {files / 'text.txt'} in /proc/.cache/huggingface")
    assert line.endswith("set HF_HOME to a folder that can be written and has room for the text")


@pytest.mark.parametrize(
    ("command", "place", "said"),
    [
        (f"ease_eval table {MEASURED} --json /dev/full", ":", "/dev/full: No space left on device"),
        (f"ease_eval table {MEASURED}", "exec >/dev/full", "the output: No space left on device"),
        (f"ease_eval table {MEASURED} --json OUT/it.json", "ulimit -f 1", "File too large"),
        (f"ease_eval report {MEASURED} --out OUT/it.html", "ulimit -f 1", ".svg: File too large"),
        (f"ease_eval report {MEASURED} --out OUT/it.html", "exec >/dev/full", "the output: No space left"),
    ],
)
def test_figures_that_find_no_room(command: str, place: str, said: str, files: Path, tmp_path: Path) -> None:
    found = run(command, place, files, tmp_path / "out")
    (line,) = found.stderr.decode().splitlines()
    assert found.returncode == 1
    assert line.startswith("error: could not write ")
    assert said in line
    assert not any("partial" in path.name for path in (tmp_path / "out").rglob("*"))
