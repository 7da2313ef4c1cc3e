"""What is not there: memory, room on a disk, a stream that is open, CPUs. Each is one line."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ease_common.commands import exhausted
from ease_common.errors import DeviceError
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.layout import Span
from ease_runtime.engine.mock import MockStack
from ease_runtime.ort.buffers import CacheShape, RowCache
from ease_runtime.ort.sessions import start_thread_pool
from ease_runtime.policies import make_policy

START = "from ease_start import ease_run; ease_run()"


def run(shell: str, *arguments: str) -> tuple[int, list[str]]:
    """A command under a shell's redirections: its exit code, and the lines on stderr."""
    told = ["sh", "-c", f'"$@" {shell}', "sh", sys.executable, "-c", START, *arguments]
    done = subprocess.run(told, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"], ["--show-exits"]])
def test_an_output_that_takes_nothing(tiny_bundle: Path, more: list[str]) -> None:
    command = ["generate", str(tiny_bundle), "--prompt", "And the king", "--max-tokens", "3", *more]
    full = "error: could not write the output: No space left on device; free some space, or write elsewhere"
    assert run("> /dev/full", *command) == (1, [full])
    closed = "error: standard output is closed; send it to /dev/null if nobody reads it"
    assert run(">&-", *command) == (1, [closed])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "BUNDLE", "--prompt", "-"], "standard input is closed; pipe the prompt into it"),
        (["chat", "BUNDLE"], "standard input is closed, and a chat reads its lines there"),
    ],
)
def test_an_input_that_is_closed(tiny_bundle: Path, command: list[str], message: str) -> None:
    code, lines = run("<&-", *[part.replace("BUNDLE", str(tiny_bundle)) for part in command])
    assert code == 1
    assert lines[-1].startswith(f"error: {message}")
    assert not any("Traceback" in line for line in lines)


LINE = "And the k\u00edng \u00e9"


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        (LINE.encode("latin-1"), {"PYTHONIOENCODING": "latin-1"}),
        (LINE.encode("utf-16-le"), {"PYTHONIOENCODING": "utf-16-le"}),
        (LINE.encode(), {"PYTHONIOENCODING": "latin-1"}),  # bytes of UTF-8 in another locale
        (LINE.encode(), {"PYTHONIOENCODING": "ascii"}),
        (LINE.encode(), {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
        (LINE.encode("utf-8-sig"), {}),  # as some shells' pipes begin
    ],
)
def test_a_chat_in_other_encodings(tiny_bundle: Path, said: bytes, settings: dict[str, str]) -> None:
    """A line is what it is in UTF-8; an answer's characters that the encoding lacks are escaped."""
    expected = chat(tiny_bundle, LINE.encode(), {"PYTHONIOENCODING": "utf-8"}).decode()
    encoding = settings.get("PYTHONIOENCODING", "utf-8").replace("ascii", "utf-8")  # what click writes then
    shown = expected.encode(encoding, "backslashreplace")
    assert chat(tiny_bundle, said, settings) == shown


def test_a_line_that_is_no_text_ends_no_chat(tiny_bundle: Path) -> None:
    """In UTF-8, as a terminal says it."""
    told = [sys.executable, "-c", START, "chat", str(tiny_bundle), "--max-tokens", "3"]
    done = subprocess.run(told, input=b"k\xedng\nking\n", capture_output=True, env={**os.environ, **UTF_8})
    assert done.returncode == 0
    line = b"error: the line is not utf-8; convert it (iconv), or set LANG"
    assert line in done.stderr.splitlines()
    assert chat(tiny_bundle, b"king\n", UTF_8) == done.stdout.removeprefix(b"> ")


UTF_8 = {"PYTHONIOENCODING": "utf-8"}


def chat(bundle: Path, said: bytes, settings: dict[str, str]) -> bytes:
    """What a chat writes."""
    told = [sys.executable, "-c", START, "chat", str(bundle), "--max-tokens", "3"]
    done = subprocess.run(told, input=said, capture_output=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_that_find_no_room(tiny_bundle: Path, tmp_path: Path) -> None:
    """A limit on the size of files is a disk that is full."""
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text((json.dumps({"prompt": "And the king", "max_tokens": 20}) + "\n") * 40)
    told = ["sh", "-c", 'ulimit -f 2; "$@"', "sh", sys.executable, "-c", START, "batch", str(tiny_bundle)]
    done = subprocess.run([*told, str(prompts), str(out)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: could not write the output: File too large")
    assert "Traceback" not in done.stderr


def test_a_cache_without_memory_is_refused_and_the_one_that_is_there_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = CacheShape(2, 4, by_head=True)
    with pytest.raises(DeviceError, match=r"not enough memory for keys and values of 1 texts of \d+ tokens"):
        RowCache([2], 1, shape).runs(0, [Span(0, 0, 1 << 50)])
    cache = RowCache([1, 1], 2, shape)
    for part in range(2):
        cache.runs(part, [Span(0, 0, 3)])
    cache.tables[128].layer(1)[0][0, :, :3] = 7.0
    pages = mmap.mmap
    made: list[int] = []

    def short(file: int, size: int, access: int) -> mmap.mmap:
        made.append(size)
        if len(made) == 3:
            raise OSError(12, "Cannot allocate memory")
        return pages(file, size, access=access)

    monkeypatch.setattr(mmap, "mmap", short)
    before = list(cache.needed), list(cache.lengths), dict(cache.tables)
    with pytest.raises(DeviceError, match=r"run fewer at once \(--batch-size\), shorter ones"):
        cache.runs(0, [Span(0, 3, 300)])
    assert (cache.needed, cache.lengths, cache.tables) == before
    (run,) = cache.runs(0, [Span(0, 3, 300)])
    assert run.length >= 300
    assert (cache.read(1, 0, 3)[0] == 7.0).all()


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_threads_that_no_machine_has(number: int) -> None:
    with pytest.raises(DeviceError, match=rf"^{number} threads: expected 0 \(all\) to \d+, 4 a CPU$"):
        start_thread_pool(number)


def test_what_is_told_of_an_error() -> None:
    torch_says = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")
    assert "not enough memory ([enforce fail]" in str(exhausted(torch_says))
    assert "not enough memory;" in str(exhausted(MemoryError()))
    named = exhausted(OSError(28, "No space left on device", "a.json"))
    assert str(named).startswith("could not write a.json: No space left on device")
    assert exhausted(RuntimeError("a defect")) is None
    assert exhausted(FileNotFoundError(2, "No such file")) is None


PROMPTS = [[3, 1, 4], [*range(1, 19), 7], [2, 7], [5]]  # the second is past ROOM, or comes to be
ROOM = 22  # positions of a text


def answers(stack: MockStack, catch_up: str, prompts: list[list[int]]) -> list[Any]:
    """Prompts that run together: what is said of each, and its error."""
    engine = Engine(stack, num_slots=3, cap=4)
    policy = make_policy("max-prob", 0.3, stack.exit_layers)
    sequences = [
        engine.start(prompt, max_new_tokens=12, policy=policy, catch_up=catch_up) for prompt in prompts
    ]
    while engine.busy:
        engine.step()
    return [([token.id for token in sequence.produced], sequence.error) for sequence in sequences]


def short_of(name: str, error: Exception) -> MockStack:
    """Layers of three segments whose pass over a text past ROOM finds no memory."""
    stack = MockStack(vocab_size=23, exit_layers=(2, 4, 6), max_positions=64)
    run = getattr(stack, name)

    def short(number: int, cache: Any, spans: Any, *rest: Any) -> None:
        if number == 1 and any(span.stop > ROOM for span in spans):
            raise error
        run(number, cache, spans, *rest)

    setattr(stack, name, short)
    return stack


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        DeviceError("a graph of this bundle fails on cpu: Failed to allocate memory for 8 bytes"),
        DeviceError("not enough memory for keys and values of 3 texts of 256 tokens"),
    ],
)
@pytest.mark.parametrize(
    ("catch_up", "name"),
    [
        ("recompute", "run_segment"),
        ("verify", "run_segment"),
        ("propagate", "run_segment"),
        ("propagate", "run_kv"),
    ],
)
def test_a_pass_without_memory_ends_the_longest_request_alone(
    catch_up: str, name: str, error: Exception
) -> None:
    alone = [
        answers(MockStack(vocab_size=23, max_positions=64, exit_layers=(2, 4, 6)), catch_up, [prompt])[0]
        for prompt in PROMPTS
    ]
    together = answers(short_of(name, error), catch_up, PROMPTS)
    said, why = together[1]
    assert "not enough memory" in why
    assert said == alone[1][0][: len(said)] != alone[1][0]
    assert [together[0], *together[2:]] == [alone[0], *alone[2:]]


def test_an_exit_without_memory_ends_those_of_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers have run: nobody could go on where it was."""
    stack = MockStack(vocab_size=23, exit_layers=(2, 4, 6), max_positions=64)
    run_exit = stack.run_exit
    calls = [0]

    def short(number: int, rows: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise MemoryError
        return run_exit(number, rows)

    monkeypatch.setattr(stack, "run_exit", short)
    together = answers(stack, "recompute", PROMPTS)
    failed = [why for _, why in together if why]
    assert set(failed) == {"not enough memory for this request (MemoryError)"}
    assert (
        together[3]
        == answers(
            MockStack(vocab_size=23, max_positions=64, exit_layers=(2, 4, 6)), "recompute", PROMPTS[3:]
        )[0]
    )


def test_a_defect_is_no_want_of_memory() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        answers(short_of("run_segment", RuntimeError("a defect")), "recompute", PROMPTS)
