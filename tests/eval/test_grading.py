"""Answers are graded as lm_eval's gsm8k grades them: expected values are its own, and its own code gives them
where it is installed.
"""

import random

import pytest

from ease_eval.tasks.grading import FILTERS, FIRST_LINE, FLEXIBLE, IGNORED, STRICT, filter_of, is_right

# said, answer, right by strict-match, right by flexible-extract
GRADED = [
    ("48/2 = <<48/2=24>>24\n#### 72", "so\n#### 72", True, True),
    ("#### 72\nThat took 3 steps", "#### 72", True, False),  # a later number
    ("The answer is 72 dollars.", "#### 72", False, True),
    ("It costs $72.", "#### 72", False, True),
    ("It costs $72.00", "#### 72", False, False),
    ("#### $1,234", "#### 1,234", False, True),
    ("#### 1,234.", "#### 1234", True, True),
    ("That makes -4", "#### -4", False, True),
    ("from 5-3 it is", "#### 3", False, False),  # of 5-3 the last number is -3
    ("about 3/4", "#### 4", False, True),
    ("#### 3/4", "#### 3/4", False, False),
    ("1e5", "#### 5", False, True),
    ("seventy-two", "#### 72", False, False),
    ("72 ...", "#### 72", False, False),  # the last match is the dots
    ("", "#### 72", False, False),
    ("It is 7", "7", False, True),
    ("#### 100", "#### 100", True, True),
]


@pytest.mark.parametrize(("said", "answer", "strict", "flexible"), GRADED)
def test_numbers(said: str, answer: str, strict: bool, flexible: bool) -> None:
    assert filter_of(answer) == FLEXIBLE
    assert (is_right(said, answer, STRICT), is_right(said, answer, FLEXIBLE)) == (strict, flexible)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("  Paris.\nIt is in France", "paris", True),
        ("Paris, I think", "Paris", False),
        (" 3/4\n", "3/4", True),
        ("34", "3/4", False),
        ("1e5", "1e5", True),
        ("\n\nyes", "Yes.", True),
        ("", "yes", False),
    ],
)
def test_other_answers_are_compared_with_the_first_line(said: str, answer: str, right: bool) -> None:
    assert filter_of(answer) == FIRST_LINE
    assert is_right(said, answer, FIRST_LINE) == right


def test_the_harness_grades_alike() -> None:
    """The settings of its task file, its filters and its metric, on the table above and on random texts."""
    yaml = pytest.importorskip("yaml")
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed", exc_type=ImportError)
    from pathlib import Path

    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
    metric = task["metric_list"][0]
    assert tuple(metric["regexes_to_ignore"]) == IGNORED
    rng = random.Random(0)
    parts = ["72", "-", "$", ",", ".", "#### ", "3/4", "1e5", " ", "\n", "it is", "7", "%", "####", "72.00"]
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 6))) for _ in range(400)]
    pairs = (
        [(said, answer) for said, answer, _, _ in GRADED]
        + [(text, "#### 72") for text in texts]
        + [(text, "7") for text in texts]
    )
    for one in task["filter_list"]:
        settings = {name: value for name, value in one["filter"][0].items() if name != "function"}
        assert FILTERS[one["name"]] == (settings["regex_pattern"], settings.get("group_select", 0))
        found = RegexFilter(**settings).apply([[said] for said, _ in pairs], [])
        for (said, answer), (extracted,) in zip(pairs, found, strict=True):
            options = {"regexes_to_ignore": list(IGNORED), "ignore_case": metric["ignore_case"]}
            expected = exact_match_hf_evaluate(predictions=[extracted], references=[answer], **options)[
                "exact_match"
            ]
            assert is_right(said, answer, one["name"]) == bool(expected), (said, answer, one["name"])
