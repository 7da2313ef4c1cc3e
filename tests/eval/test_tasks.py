"""Task files: what is read, that answers are the engine's, that a killed run ends in the same JSON, and bad
input.
"""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from ease_eval.cli.main import main
from ease_eval.journal import Journal
from ease_eval.tasks import tasks as tasks_module
from ease_eval.tasks.likelihood import NoTokensError, encode_pair
from ease_eval.tasks.task_files import examples, parse, read_tasks
from ease_eval.tasks.tasks import interval, run_task
from ease_runtime.engine.sampling import Given
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_train.training.checkpoint import load_checkpoint

CHOICES = [
    {"context": "And the king went up to", "choices": ["the mountain", "the sea", "a stone"], "answer": 0},
    {"question": "Who spoke?", "choices": ["the king", "my servant"], "answer": "B"},
    {
        "question": "And the river was with",
        "choices": ["the people", "the city", "the field"],
        "answer": "the field",
    },
    {"prompt": "And a voice came before the house ", "choices": ["of the lord", "of the king"], "answer": 1},
]
EXACT = [
    {"question": f"How much is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i}"} for i in range(1, 5)
]
WORDS = [
    {"text": "And the king went up to the mountain"},
    {"text": "And my servant looked upon the sea; and it was good"},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tasks", *map(str, arguments)])


@pytest.fixture(scope="module")
def llm(tiny_bundle: Path) -> LLM:
    return LLM(tiny_bundle)


def token_by_token(llm: LLM, context: str, continuation: str, options: Options) -> tuple[float, list[int]]:
    """The engine's own sum of log-probabilities, and the depths."""
    first, rest = encode_pair(llm, context, continuation)
    policy = llm.policy(options)
    sampler = Given([*first, *rest])
    sequence = llm.engine.start(
        first, max_new_tokens=len(rest), policy=policy, catch_up=options.catch_up, sampler=sampler
    )
    tokens = list(llm.engine.generate(sequence))
    return sum(t.logprob for t in tokens), [t.depth for t in tokens]


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
def test_choices_are_scored_where_their_tokens_leave(llm: LLM, tmp_path: Path, catch_up: str) -> None:
    task = read_tasks(write(tmp_path / "choices.jsonl", CHOICES), 10)
    options = Options(threshold=(0.5,), catch_up=catch_up)
    result = run_task(llm, task, options, Journal(None, {}))
    layers = tokens = 0
    for item, answer in zip(task.items, result.items, strict=True):
        sums, depths = zip(
            *(token_by_token(llm, item.context, f" {c}", options) for c in item.choices), strict=True
        )
        assert answer.said == item.choices[int(np.argmax(sums))]
        assert answer.logprob == pytest.approx(sums[item.answer], rel=1e-4)
        assert answer.normalised_correct == (
            np.argmax([s / len(c) for s, c in zip(sums, item.choices, strict=True)]) == item.answer
        )
        layers = layers + sum(map(sum, depths))
        tokens = tokens + sum(map(len, depths))
    assert result.mean_depth == pytest.approx(layers / tokens)
    assert 2.0 < result.mean_depth < 6.0, "the threshold must separate tokens, or the test shows nothing"


def test_full_depth_is_torchs(llm: LLM, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_checkpoint(tiny_checkpoint).model.eval()
    result = run_task(
        llm,
        read_tasks(write(tmp_path / "words.jsonl", WORDS), 10),
        Options(threshold=(0.0,)),
        Journal(None, {}),
    )
    total = tokens = 0
    for row, answer in zip(WORDS, result.items, strict=True):
        first, rest = encode_pair(llm, *row["text"].rsplit(maxsplit=1)[:1], " " + row["text"].split()[-1])
        assert [*first, *rest] == llm.encode(row["text"])
        with torch.no_grad():
            logprobs = model(torch.tensor([[*first, *rest][:-1]])).log_softmax(-1)[0, len(first) - 1 :]
        assert answer.full_depth_logprob == pytest.approx(
            logprobs[torch.arange(len(rest)), rest].sum().item(), rel=1e-4
        )
        assert answer.full_depth_correct == (logprobs.argmax(-1).tolist() == rest)
        total = total + answer.full_depth_logprob
        tokens = tokens + len(rest)
    assert result.full_depth_perplexity == pytest.approx(np.exp(-total / tokens))
    assert result.mean_depth == 2.0
    assert result.perplexity != pytest.approx(result.full_depth_perplexity, rel=1e-3)


def test_off_says_what_full_depth_says(llm: LLM, tmp_path: Path) -> None:
    for name, rows in (("choices", CHOICES), ("exact", EXACT), ("words", WORDS)):
        result = run_task(
            llm, read_tasks(write(tmp_path / name, rows), 10), Options(max_tokens=8), Journal(None, {})
        )
        assert (result.agreement, result.mean_depth, result.accuracy) == (
            1.0,
            6.0,
            result.full_depth_accuracy,
        )
        assert result.difference_interval == (0.0, 0.0)


def test_answers_are_generated_through_the_policy(llm: LLM, tmp_path: Path) -> None:
    options = Options(threshold=(0.4,), max_tokens=12, stop=("Question:",))
    result = run_task(
        llm, read_tasks(write(tmp_path / "exact.jsonl", EXACT), 10), options, Journal(None, {}), shots=1
    )
    assert [answer.line for answer in result.items] == [2, 3, 4]
    asked = (
        f"Question: {EXACT[0]['question']}\nAnswer: {EXACT[0]['answer']}\n\nQuestion: "
        f"{EXACT[1]['question']}\nAnswer:"
    )
    events = list(llm.generate(asked, options))
    assert result.items[0].said == "".join(event.text for event in events)
    assert result.items[0].layers == sum(event.depth for event in events) < 6 * len(events)
    assert result.items[0].full_depth_said == "".join(
        event.text for event in llm.generate(asked, options.at_full_depth())
    )


def test_malformed_lines_are_named_and_the_rest_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [
        CHOICES[0],
        "{",
        CHOICES[1],
        "",
        {"question": "?", "choices": ["a", "b"], "answer": 2},
        EXACT[0],
        CHOICES[2],
    ]
    file = write(tmp_path / "mixed.jsonl", rows)
    words = tmp_path / "words.jsonl.gz"
    out = tmp_path / "out.json"
    words.write_bytes(gzip.compress(write(tmp_path / "words.jsonl", WORDS).read_bytes()))
    result = run(tiny_bundle, file, words, "--threshold", "0.5", "--json", out)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("warning")] == [
        f"warning: {file}:2: no JSON; left out",
        f"warning: {file}:5: \"answer\" '2' is none of the 2 choices, by number from 0, letter or text; "
        "left out",
        f"warning: {file}:6: this is exact match, the lines before are multiple choice; left out",
    ]
    found = json.loads(out.read_text())
    assert found.keys() >= {"bundle", "manifest_sha256", "versions", "options", "seed", "device", "tasks"}
    assert [(t["kind"], t["num_items"], len(t["faults"])) for t in found["tasks"]] == [
        ("multiple choice", 3, 3),
        ("last word", 2, 0),
    ]
    assert [item["line"] for item in found["tasks"][0]["items"]] == [1, 3, 7]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_killed_run_ends_in_the_same_json(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "choices.jsonl", CHOICES)
    common = [tiny_bundle, file, "--threshold", "0.5"]
    assert run(*common, "--json", tmp_path / "whole.json").exit_code == 0
    asked: list[int] = []
    ask = tasks_module.ask

    def killed(asking: Any, item: Any) -> Any:
        asked.append(item.line)
        if asked == [1, 2, 3]:
            raise KeyboardInterrupt
        return ask(asking, item)

    monkeypatch.setattr(tasks_module, "ask", killed)
    assert run(*common, "--json", tmp_path / "parts.json").exit_code == 130
    journal = tmp_path / ".parts.json.journal"
    journal.write_text(journal.read_text() + '{"name": "cut o')  # as a kill leaves it
    again = run(*common, "--json", tmp_path / "parts.json")
    assert "2 answers are there from a run before" in again.stderr
    assert asked == [1, 2, 3, 3, 4]
    assert (tmp_path / "parts.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not journal.exists()


def test_a_run_that_asks_for_something_else_begins_anew(tmp_path: Path) -> None:
    def parts(asked: dict[str, Any], fail: bool) -> int:
        with Journal(tmp_path / "a.json", asked) as journal:
            journal.once("part", lambda: 1)
            if fail:
                raise RuntimeError
            return journal.num_read

    for _ in range(2):
        with pytest.raises(RuntimeError):
            parts({"threshold": 0.5}, fail=True)
    assert parts({"threshold": 0.6}, fail=False) == 0
    assert parts({"threshold": 0.6}, fail=False) == 0, "a run that has ended leaves nothing"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "expected a JSON object"),
        ('{"choices": ["a"], "question": "?", "answer": 0}', '"choices" must be two texts or more'),
        ('{"choices": ["a", 1], "question": "?", "answer": 0}', '"choices" must be two texts or more'),
        (
            '{"choices": ["a", "b"], "question": "?", "answer": true}',
            "\"answer\" 'True' is none of the 2 choices",
        ),
        ('{"choices": ["a", "b"], "question": "?"}', "\"answer\" 'None' is none of the 2 choices"),
        ('{"choices": ["a", "b"], "answer": 0}', 'expected a text under "question", "context" or "prompt"'),
        ('{"question": "?", "answer": 42}', '"answer" must be a text'),
        (
            '{"question": "?", "answer": "it is ####42"}',
            '"answer" has "####" without a space behind it; expected "#### 42"',
        ),
        ('{"text": "a \\ud83d b"}', "half of a surrogate pair"),
        ('{"text": "a \ud83d b"}', "no UTF-8: invalid continuation byte at byte 12"),
        ('{"text": "word"}', 'expected "choices", "answer", or a "text" of two words or more'),
        ('{"text": null}', 'expected "choices", "answer", or a "text" of two words or more'),
    ],
)
def test_what_is_wrong_with_a_line(line: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        parse(line.encode(errors="surrogatepass"), 1)


def test_the_interval_of_a_share() -> None:
    """No spread without differences; for a half of 400 near the binomial's 0.5 +- 0.049."""
    assert interval(np.ones(10)) == (1.0, 1.0)
    assert interval(np.arange(400) % 2.0) == pytest.approx((0.451, 0.549), abs=0.008)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (["{", "["], [], "tasks.jsonl:1: no JSON; no other line is good either"),
        ([], [], "tasks.jsonl has no tasks"),
        (CHOICES, ["--shots", "4"], "shots 4 is outside 0..3"),
        (CHOICES, ["--decay", "2", "--threshold", "0.5"], "thresholds that move with a generation"),
        (CHOICES, ["--threshold", "2"], "threshold 2.0 is outside [0, 1]"),
        (
            EXACT,
            ["--max-tokens", "288"],
            "max_tokens 288 leaves no room for a question in this model's context of 288",
        ),
        (EXACT, ["--chat"], "this bundle has no chat template"),
    ],
)
def test_bad_input_ends_in_one_line(
    tiny_bundle: Path, tmp_path: Path, rows: list[Any], options: list[str], message: str
) -> None:
    result = run(tiny_bundle, write(tmp_path / "tasks.jsonl", rows), *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_missing(tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(tiny_bundle, tmp_path / "no.jsonl")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "cannot read tasks from" in result.stderr


def test_examples_are_not_asked(tmp_path: Path) -> None:
    items = read_tasks(write(tmp_path / "words.jsonl", WORDS), 10).items
    before, asked = examples(items, 1)
    assert (before, asked) == (WORDS[0]["text"] + "\n\n", items[1:])


def test_a_text_without_a_context_follows_the_start_token(llm: LLM) -> None:
    first, rest = encode_pair(llm, "", "And the king")
    assert [*first, *rest] == llm.encode("And the king")
    assert first == [llm.start_id]
    with pytest.raises(NoTokensError, match="nothing follows the context"):
        encode_pair(llm, "And", "")


def test_an_answer_to_an_item_that_has_changed_is_not_taken_from_a_journal(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    llm = LLM(tiny_bundle)
    options = Options(max_tokens=4)
    file = tmp_path / "items.jsonl"
    said = []
    for choices in (["aa", "bb"], ["aa", "bb"], ["cc", "dd"]):
        task = read_tasks(write(file, [{"context": "the king", "choices": choices, "answer": 0}]), 9)
        with contextlib.suppress(KeyboardInterrupt), Journal(tmp_path / "out.json", {}) as journal:
            said.append(run_task(llm, task, options, journal).items[0].said)
            raise KeyboardInterrupt
    assert said[0] == said[1] in ("aa", "bb")
    assert said[2] in ("cc", "dd")
