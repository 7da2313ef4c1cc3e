"""Options without effect: of leaving early they are refused, others are told; what has an effect is
neither.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ease_common.errors import RequestError
from ease_runtime.cli.main import main
from ease_runtime.effect import check_effect, effect_notes
from ease_runtime.options import Options
from ease_runtime.server.requests import read_chat, read_completion
from served import text_engine

LAYERS = (2, 4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"catch_up": "verify"}, "catch_up verify has no effect without a threshold: no token leaves early"),
        ({"catch_up": "propagate"}, "catch_up propagate has no effect without a threshold"),
        ({"policy": "gate"}, "policy gate has no effect without a threshold"),
        ({"policy": "entropy", "decay": 3.0}, "policy entropy, decay 3.0 have no effect without a threshold"),
        ({"patience": 2}, "patience 2 has no effect without a threshold"),
        ({"min_exit": 4}, "min_exit 4 has no effect without a threshold"),
        (
            {"patience": 2, "threshold": (0.5,)},
            "patience 2 has no effect with policy 'max-prob'; add --policy patience",
        ),
        (
            {"min_exit": 5, "threshold": (0.5,)},
            "min_exit 5 leaves no early exit: the last one is after layer 4",
        ),
        (
            {"policy": "fixed", "exit_layer": 2, "min_exit": 4},
            "min_exit 4 has no effect with policy 'fixed', whose exit is 2",
        ),
    ],
)
def test_what_cannot_make_a_token_leave_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_effect(Options(**options), LAYERS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": (0.5,), "catch_up": "verify", "min_exit": 4, "decay": 2.0},
        {"threshold": (1.0,), "policy": "patience", "patience": 2},
        {"policy": "fixed", "exit_layer": 4, "catch_up": "propagate"},
        {"depth_budget": 4.0, "policy": "entropy", "min_exit": 4},
        {"threshold": (None,), "catch_up": "verify", "policy": "entropy", "min_exit": 4},
        {"threshold": (None, None), "patience": 3},
    ],
)
def test_what_has_a_partner_or_is_off_on_purpose_is_not(options: dict[str, Any]) -> None:
    check_effect(Options(**options), LAYERS)


def test_sampling_that_greedy_ignores_is_told() -> None:
    assert effect_notes(Options(top_k=5, top_p=0.9, n=3, seed=4)) == [
        "top_k 5 has no effect at temperature 0, which is greedy",
        "top_p 0.9 has no effect at temperature 0, which is greedy",
        "the 3 completions are the same at temperature 0, which is greedy",
    ]
    assert effect_notes(Options(top_k=5, min_p=0.1, n=3, temperature=0.7)) == []


@pytest.mark.parametrize(
    "flags", ["--catch-up verify", "--policy gate", "--patience 2", "--decay 3", "--min-exit 4"]
)
@pytest.mark.parametrize("command", ["generate --prompt And --show-exits", "chat", "serve --port 0"])
def test_a_command_ends_in_one_line(tiny_bundle: Path, command: str, flags: str) -> None:
    name, *more = command.split()
    result = CliRunner().invoke(main, [name, str(tiny_bundle), *more, *flags.split()])
    assert (result.exit_code, result.stdout) == (1, "")
    assert ("needs a gate" if "gate" in flags else "has no effect without a threshold") in result.stderr
    assert result.stderr.count("\n") == 1


def test_flags_without_effect_are_told(tiny_bundle: Path, tmp_path: Path) -> None:
    def run(*flags: str) -> tuple[int, str]:
        result = CliRunner().invoke(
            main, ["generate", str(tiny_bundle), "--prompt", "And", "--max-tokens", "2", *flags]
        )
        return result.exit_code, result.stderr

    assert run() == (0, "")
    assert run("--threshold", "0.5", "--logprobs", "2", "--json") == (0, "")
    assert run("--logprobs", "2") == (0, "note: --logprobs has no effect without --json\n")
    assert run("--adapt") == (
        0,
        "note: --adapt has no effect at full depth; give a threshold (--threshold 0.7)\n",
    )
    assert run("--top-p", "0.5") == (0, "note: top_p 0.5 has no effect at temperature 0, which is greedy\n")
    assert run("--show-exits", "--json") == (
        0,
        "note: --show-exits has no effect with --json, which tells each token's depth\n",
    )
    assert run("--compare") == (
        1,
        "error: --compare has nothing to compare: no token leaves early or is drafted; give a threshold "
        "(--threshold 0.7) or a drafter (--draft ngram)\n",
    )
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    arguments = ["batch", str(tiny_bundle), str(tmp_path / "in"), str(tmp_path / "out"), "--ray-workers", "3"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --ray-workers 3 has no effect without --ray ADDRESS\n",
    )


def test_an_exit_has_the_flags_name_in_json_too() -> None:
    assert Options.from_json({"policy": "fixed", "exit": 4}).exit_layer == 4
    with pytest.raises(RequestError, match="exit and exit_layer are two names of one option"):
        Options.from_json({"exit": 4, "exit_layer": 2})


def test_null_is_off_in_a_request() -> None:
    base = Options(threshold=(0.5,), catch_up="verify", min_exit=4)
    check_effect(Options.from_json({"threshold": None}, base), LAYERS)


def test_what_a_body_says_without_effect_is_refused() -> None:
    llm = text_engine()
    for reader, body, message in (
        (
            read_completion,
            {"prompt": "a", "stream_options": {"include_usage": True}},
            "stream_options has no effect without stream",
        ),
        (
            read_chat,
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "max_completion_tokens": 4},
            "two names of one option",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            reader(body, llm, Options())
    asked = read_completion({"prompt": "a", "ease": {"policy": "fixed", "exit": 4}}, llm, Options())
    assert asked.options.exit_layer == 4
    asked = read_completion({"prompt": "a", "ease": {"catch_up": "verify"}}, llm, Options())
    with pytest.raises(RequestError, match="catch_up verify has no effect without a threshold"):
        llm.submit(asked.prompts[0], asked.options)


def test_a_line_of_a_batch_gets_its_log_probabilities_and_its_notes() -> None:
    from ease_runtime.cli.batch import answer_lines

    lines = [
        b'{"prompt": "abc", "max_tokens": 3, "logprobs": 2, "n": 2, "top_k": 4}',
        b'{"prompt": "abc"}',
        b'{"prompt": "a", "patience": 2}',
    ]
    found = [
        json.loads(line)
        for line in answer_lines(text_engine(), enumerate(lines, 1), Options(max_tokens=3), 2)
    ]
    for choice in found[0]["choices"]:
        assert [len(token["top_logprobs"]) for token in choice["tokens"]] == [2, 2, 2]
        assert "".join(token["text"] for token in choice["tokens"]) == choice["text"]
    assert [note.split(" ")[0] for note in found[0]["notes"]] == ["top_k", "the"]
    assert found[1].keys() == {"line", "choices", "usage"}
    assert found[1]["choices"][0].keys() == {"text", "finish_reason"}
    assert "patience 2 has no effect" in found[2]["error"]["message"]
