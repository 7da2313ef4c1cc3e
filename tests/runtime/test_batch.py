"""Batches: an answer a line, in order, whatever happens in between."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import toy_text
from ease_common.errors import RequestError
from ease_runtime.cli.batch import (
    answer_lines,
    count_answers,
    count_failed,
    count_lines,
    numbered_lines,
    write_answers,
)
from ease_runtime.cli.main import main
from ease_runtime.engine.mock import MockStack
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options
from other_run import another_run

LETTERS = "abcdefghijklmnopqrstuv"
OPTIONS = Options(max_tokens=6)
LINES: list[Any] = [
    {"prompt": "abc"},
    {"prompt": "hello", "max_tokens": 30, "id": "second"},
    {"prompt": 7},
    {"prompt": "a", "temperature": 1.0, "seed": 3, "n": 2, "id": 3},
    {"prompt": "tuv", "stop": ["a", "b", "c"], "max_tokens": 1},
    {"prompt": "abc", "max_token": 3},
]


def text_engine(num_slots: int) -> TextEngine:
    return TextEngine(
        MockStack(vocab_size=23), toy_text.letter_tokenizer(LETTERS), start_id=0, num_slots=num_slots
    )


def numbered(lines: list[Any]) -> list[tuple[int, bytes]]:
    return [
        (n, line if isinstance(line, bytes) else json.dumps(line).encode()) for n, line in enumerate(lines, 1)
    ]


def answers(lines: list[Any], batch_size: int = 3) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in answer_lines(text_engine(batch_size), numbered(lines), OPTIONS, batch_size)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_come_in_order_and_are_those_of_each_alone(batch_size: int) -> None:
    together = answers(LINES * 4, batch_size)
    assert [answer["line"] for answer in together] == list(range(1, 25))
    for number, answer in enumerate(together):
        (alone,) = answers([LINES[number % 6]], 1)
        assert {**answer, "line": 1} == alone
    assert [answer.get("id") for answer in together[:6]] == [None, "second", None, 3, None, None]
    assert len(together[3]["choices"]) == 2
    assert together[1]["usage"]["completion_tokens"] == 30
    assert "did you mean 'max_tokens'" in together[5]["error"]["message"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "no JSON object"),
        (b"{", "no JSON object"),
        (b"[1]", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
        (b'{"prompt": "a\\ud800"}', "no valid Unicode"),
        (b'{"prompt": ""}', "at least one character"),
        (b"{}", 'either a "prompt" or "messages"'),
        (b'{"prompt": "a", "messages": []}', 'either a "prompt" or "messages"'),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature nan"),
        (b'{"prompt": "a", "id": [1]}', "id is of the type list"),
        (json.dumps({"prompt": "a" * 5000}).encode(), "context of 64"),
    ],
)
def test_a_bad_line_gets_an_error_in_its_place(line: bytes, message: str) -> None:
    good, bad, after = answers([{"prompt": "abc"}, line, {"prompt": "abc"}])
    assert message in bad["error"]["message"]
    assert "choices" not in bad
    assert bad["line"] == 2
    assert good["choices"] == after["choices"]


def test_what_is_written_stays_and_what_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    """Killed at any byte, a run goes on to the same file."""
    source = tmp_path / "in.jsonl"
    whole = tmp_path / "whole.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    list(write_answers(whole, answer_lines(text_engine(2), numbered_lines(source, 1), OPTIONS, 2)))
    expected = whole.read_bytes()
    for cut in [
        0,
        1,
        expected.index(b"\n"),
        expected.index(b"\n") + 1,
        len(expected) // 2,
        len(expected) - 1,
        len(expected),
    ]:
        out = tmp_path / f"{cut}.jsonl"
        out.write_bytes(expected[:cut])
        done = count_answers(out)
        assert done == expected[:cut].count(b"\n")
        assert out.read_bytes() == b"".join(expected.splitlines(keepends=True)[:done])
        list(write_answers(out, answer_lines(text_engine(2), numbered_lines(source, done + 1), OPTIONS, 2)))
        assert out.read_bytes() == expected


def test_another_file_is_not_touched(tmp_path: Path) -> None:
    for text in (
        '{"my": "notes, with no line end"}',
        "a poem\n",
        '{"line": 2}\n',
        '{"line": 1}\n{"line": 3}\n',
        "[1]\n",
    ):
        other = tmp_path / "other.jsonl"
        other.write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match="give another file"):
            count_answers(other)
        assert other.read_text(encoding="utf-8") == text


def test_a_pipe_is_refused_since_it_can_be_read_once_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (count_lines, count_answers):
        with pytest.raises(RequestError, match="pipe is no"):
            read(tmp_path / "pipe")


def test_a_late_line_does_not_hold_up_the_others_and_is_not_run_away_from() -> None:
    """Requests that finish early wait for an earlier one, but not without end."""
    read: list[int] = []

    def lines() -> Any:
        for number in range(1, 200):
            read.append(number)
            yield number, json.dumps({"prompt": "abc", "max_tokens": 50 if number == 1 else 1}).encode()

    source = answer_lines(text_engine(2), lines(), OPTIONS, 2)
    first = json.loads(next(source))
    assert first["line"] == 1
    assert 2 < len(read) <= 17


def test_a_second_run_on_one_file_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    out = tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt": "And", "max_tokens": 1}) + "\n")
    command = ["batch", str(tiny_bundle), str(prompts), str(out)]
    with another_run(out):
        refused = CliRunner().invoke(main, command)
    assert (refused.exit_code, refused.stderr.count("\n"), out.exists()) == (1, 1, False)
    assert f"another run is writing {out}; wait for it, or choose another name" in refused.stderr
    assert CliRunner().invoke(main, command).exit_code == 0
    assert len(out.read_text().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


OPENAI: list[dict[str, Any]] = [
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "x", "prompt": "abc"}},
    {
        "custom_id": "b",
        "url": "/v1/completions",
        "body": {"prompt": ["ab", "c"], "n": 2, "max_tokens": 3, "ease": {}},
    },
    {"custom_id": "c", "url": "/v1/embeddings", "body": {"input": "a"}},
    {"custom_id": "d", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 900}},
    {"custom_id": "e", "url": "/v1/completions", "body": {"prompt": "a", "stream": True}},
    {"custom_id": "f", "url": "/v1/completions", "body": "a"},
    {
        "custom_id": "g",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "a"}]},
    },
    {"custom_id": "h", "url": "/v1/completions", "body": {"prompt": "tuv", "logprobs": 2, "echo": True}},
]


def test_openais_lines_are_answered_as_the_server_answers() -> None:
    told = answers([*OPENAI, {"prompt": "abc"}])
    assert [answer["custom_id"] for answer in told[:8]] == list("abcdefgh")
    assert [answer["id"] for answer in told[:8]] == [f"batch_req_{number}" for number in range(1, 9)]
    statuses = [answer["response"]["status_code"] for answer in told[:8]]
    assert statuses == [200, 200, 400, 400, 400, 400, 400, 200]
    bodies = [answer["response"]["body"] for answer in told[:8]]
    assert bodies[0]["choices"][0]["text"] == told[8]["choices"][0]["text"]
    assert (bodies[0]["object"], bodies[0]["model"]) == ("text_completion", "x")
    assert [choice["index"] for choice in bodies[1]["choices"]] == [0, 1, 2, 3]
    assert len(bodies[1]["choices"][0]["ease"]["tokens"]) == 3
    assert bodies[1]["usage"]["completion_tokens"] == 12
    for place, message in {
        2: "'/v1/embeddings' is none of POST /v1/completions",
        3: "maximum context length",
        4: "stream: true has no place",
        5: "body 'a' is not an object",
        6: "no chat template",
    }.items():
        assert message in bodies[place]["error"]["message"]
    assert bodies[3]["error"]["code"] == "context_length_exceeded"
    assert len(bodies[7]["choices"][0]["logprobs"]["token_logprobs"]) == 4 + OPTIONS.max_tokens


def test_a_run_over_openais_lines_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in OPENAI), encoding="utf-8")
    whole = tmp_path / "whole.jsonl"
    list(write_answers(whole, answer_lines(text_engine(2), numbered_lines(source, 1), OPTIONS, 2)))
    expected = whole.read_bytes().splitlines(keepends=True)
    whole.write_bytes(b"".join(expected[:3]) + expected[3][:9])
    assert count_answers(whole) == 3
    assert whole.read_bytes() == b"".join(expected[:3])
    list(write_answers(whole, answer_lines(text_engine(2), numbered_lines(source, 4), OPTIONS, 2)))
    assert count_answers(whole) == 8
    assert count_failed(whole) == 5


def test_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}\n\n')
    assert count_lines(source) == 2
    assert list(numbered_lines(source, 1)) == [(1, b'{"prompt": "a"}\r\n'), (2, b'{"prompt": "b"}\n')]
    assert list(numbered_lines(source, 2)) == [(2, b'{"prompt": "b"}\n')]


def test_lines_that_fail_are_counted_and_the_command_ends_with_1(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "And", "max_tokens": 1}, {"prompt": 7}, {"prompt": "x", "max_token": 1}]
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    for _ in range(2):  # the second one has nothing to do, and says so again
        result = CliRunner().invoke(main, ["batch", str(tiny_bundle), str(prompts), str(out)])
        assert result.exit_code == 1
        assert '2 of 3 could not be answered; their lines\' "error" says why' in result.stderr
    said = CliRunner().invoke(main, ["batch", str(tiny_bundle), "-", "-"], input=json.dumps(lines[0]) + "\n")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout) == json.loads(out.read_text().splitlines()[0])
