"""ease-run on a bundle: exit codes and what is printed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ease_runtime.cli.main import main

PROMPT = "And the king"


def ease_run(*arguments: str | Path, text: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=text)


def generated(bundle: Path, *arguments: str) -> dict[str, object]:
    result = ease_run("generate", bundle, "--prompt", PROMPT, "--json", *arguments)
    assert result.exit_code == 0, result.output
    values: dict[str, object] = json.loads(result.stdout)
    return values


def test_generate_prints_the_text_that_json_holds(tiny_bundle: Path) -> None:
    plain = ease_run("generate", tiny_bundle, "--prompt", "-", "--max-tokens", "9", text=PROMPT)
    values = generated(tiny_bundle, "--max-tokens", "9")
    assert plain.exit_code == 0
    assert plain.stdout == f"{values['text']}\n"
    assert values["finish_reason"] == "length"
    assert isinstance(values["usage"], dict)
    assert (values["usage"]["completion_tokens"], values["usage"]["mean_depth"]) == (9, 6.0)


def test_generate_with_every_flag(tiny_bundle: Path) -> None:
    flags = (
        "--temperature 0.9 --top-k 50 --top-p 0.95 --min-p 0.01 --seed 5 --repetition-penalty 1.1 "
        "--presence-penalty 0.1"
    )
    flags += (
        " --frequency-penalty 0.1 --logit-bias 4=-100 --logit-bias 5=1 --stop never --n 2 --logprobs 2 "
        "--max-tokens 7"
    )
    flags += (
        " --policy entropy --threshold 0.1,off --catch-up propagate --decay 2 --min-exit 2 --depth-budget 4"
    )
    values = generated(tiny_bundle, *flags.split())
    choices = values["choices"]
    assert isinstance(choices, list)
    assert [len(choice["tokens"]) for choice in choices] == [7, 7]
    assert choices[0] == {key: values[key] for key in ("text", "tokens", "finish_reason")}
    assert choices[0]["text"] != choices[1]["text"]
    for token in choices[0]["tokens"]:
        assert set(token) == {"id", "text", "depth", "confidence", "logprob", "drafted", "top_logprobs"}
        assert len(token["top_logprobs"]) == 2


def test_a_fixed_exit_and_patience(tiny_bundle: Path) -> None:
    tokens = generated(tiny_bundle, "--policy", "fixed", "--exit", "4", "--max-tokens", "5")["tokens"]
    assert isinstance(tokens, list)
    assert [token["depth"] for token in tokens] == [4] * 5
    assert generated(
        tiny_bundle, "--policy", "patience", "--patience", "1", "--threshold", "1", "--max-tokens", "5"
    )["tokens"]


def test_generate_stops_at_a_string(tiny_bundle: Path) -> None:
    text = generated(tiny_bundle, "--max-tokens", "20")["text"]
    assert isinstance(text, str)
    stopped = generated(tiny_bundle, "--max-tokens", "20", "--stop", text[3:6])
    assert stopped["text"] == text[: text.index(text[3:6])]
    assert stopped["finish_reason"] == "stop"


def test_several_completions_and_exits_are_shown(tiny_bundle: Path) -> None:
    result = ease_run(
        "generate",
        tiny_bundle,
        "--prompt",
        PROMPT,
        "--n",
        "2",
        "--max-tokens",
        "4",
        "--show-exits",
        "--threshold",
        "0.2",
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("depth:  2   4   6")
    assert "8 tokens, mean depth" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature -1", "error: temperature -1.0"),
        ("--threshold high", "error: threshold 'high' is not a number in [0, 1], off, or"),
        ("--min-p 2", "error: min_p 2.0"),
        ("--n 0", "error: n 0"),
        ("--repetition-penalty 0", "error: repetition_penalty 0.0"),
        ("--logit-bias 99999=1", "error: logit_bias has the token id 99999"),
        ("--policy sure", "error: unknown policy 'sure'"),
        ("--policy fixed", "go together: --policy fixed --exit LAYER"),
        ("--depth-budget 99", "error: depth budget 99.0"),
        ("--catch-up later", "error: unknown catch-up 'later'"),
        ("--device gpu", "error: unknown device 'gpu'"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_1(tiny_bundle: Path, flags: str, message: str) -> None:
    result = ease_run("generate", tiny_bundle, "--prompt", PROMPT, *flags.split())
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", ["--logit-bias 4", "--logit-bias x=1", "--top-k many"])
def test_wrong_usage_is_exit_code_2(tiny_bundle: Path, flags: str) -> None:
    assert ease_run("generate", tiny_bundle, "--prompt", PROMPT, *flags.split()).exit_code == 2


def test_chat_goes_on_resets_and_ends(tiny_bundle: Path) -> None:
    """Without a template it says so and continues the plain text; an error ends a turn only."""
    lines = ["And the king", "was", "/reset", "And the king", "x" * 2000, "", "was", "/quit", "not read"]
    result = ease_run("chat", tiny_bundle, "--max-tokens", "6", text="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert "no chat template" in result.stderr
    assert result.stderr.count("error: the prompt has") == 1
    said = [line.removeprefix("> ") for line in result.stdout.split("> ") if line]
    assert len(said) == 4
    assert said[:2] == said[2:]
    assert said[0] != said[1]
    assert ease_run("chat", tiny_bundle, "--n", "2", text="").exit_code == 2


def test_batch_answers_and_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    out = tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "And the king"}\nnonsense\n{"prompt": "A voice", "max_tokens": 2}\n', encoding="utf-8"
    )
    arguments = ("batch", tiny_bundle, source, out, "--max-tokens", "5", "--batch-size", "2")
    assert ease_run(*arguments).exit_code == 1  # one line is none
    written = out.read_bytes()
    first, bad, last = (json.loads(line) for line in written.splitlines())
    assert first["choices"][0]["text"] == generated(tiny_bundle, "--max-tokens", "5")["text"]
    assert "no JSON object" in bad["error"]["message"]
    assert last["usage"]["completion_tokens"] == 2
    out.write_bytes(written[:-10])
    assert ease_run(*arguments).exit_code == 1  # one line is none
    assert out.read_bytes() == written
    out.write_bytes(written * 2)
    assert "give another file" in ease_run(*arguments).stderr


def test_batch_goes_on_after_a_kill(tiny_bundle: Path, tmp_path: Path) -> None:
    """A process killed in the middle, and another that ends what it began: the file is as from one run."""
    source = tmp_path / "in.jsonl"
    out = tmp_path / "out.jsonl"
    whole = tmp_path / "whole.jsonl"
    lines = [
        {"prompt": f"And the king {n}", "max_tokens": 5 + n % 60, "temperature": 1.0, "seed": n}
        for n in range(120)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    arguments = ["batch", str(tiny_bundle), str(source), str(out), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ease_runtime.cli.main", *arguments], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert out.read_bytes().count(b"\n") < len(lines)
    for path in (out, whole):
        assert ease_run(*arguments[:3], path, *arguments[4:]).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert out.read_bytes().count(b"\n") == len(lines)


def test_ray_that_is_missing_is_named(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "A"}\n', encoding="utf-8")
    monkeypatch.setitem(sys.modules, "ray", None)
    result = ease_run("batch", tiny_bundle, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--ray", "local")
    assert result.exit_code == 1
    assert "pip install 'ease-lm[ray]'" in result.stderr


@pytest.mark.slow
def test_batch_on_a_ray_cluster_of_two_workers(tiny_bundle: Path, tmp_path: Path) -> None:
    """The same answers in the same order, in a process of its own: Ray warns and leaves things behind."""
    pytest.importorskip("ray.data", reason="no Ray: pip install 'ease-lm[ray]'")
    source = tmp_path / "in.jsonl"
    here = tmp_path / "here.jsonl"
    there = tmp_path / "there.jsonl"
    lines = [{"prompt": f"And the king {n}", "max_tokens": n % 7 + 1} for n in range(40)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "nonsense", encoding="utf-8")
    common = ["--batch-size", "2"]
    assert ease_run("batch", tiny_bundle, source, here, *common).exit_code == 0
    there.write_bytes(b"".join(here.read_bytes().splitlines(keepends=True)[:3]))
    arguments = [
        "batch",
        str(tiny_bundle),
        str(source),
        str(there),
        *common,
        "--ray",
        "local",
        "--ray-workers",
        "2",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ease_runtime.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert there.read_bytes() == here.read_bytes()
