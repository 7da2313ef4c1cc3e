"""Answers under a grammar: JSON that follows its schema, drafts that change nothing, and what is refused."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from ease_common.errors import DeviceError, RequestError
from ease_runtime.cli.main import main
from ease_runtime.engine.sampling import Greedy
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.server.requests import read_response_format
from ease_runtime.text.grammar import ANY_OBJECT, LONGEST_GRAMMAR, Grammars, JsonSchema, LarkGrammar, Regex

pytest.importorskip("llguidance")

PERSON = JsonSchema(
    json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 6},
                "age": {"type": "integer", "maximum": 99},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    )
)


@pytest.fixture(scope="module")
def llm(tiny_bundle: Path) -> LLM:
    return LLM(tiny_bundle, num_slots=3)


def answer(llm: LLM, prompt: str, options: Options) -> tuple[list[int], str, str | None]:
    """The ids, the text and how it ended."""
    events = list(llm.generate(prompt, options))
    return [event.id for event in events], "".join(event.text for event in events), events[-1].finish_reason


def any_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Small, so that answers end; of every kind of value."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "number"]
    kind = draw.choice([*kinds, "array", "object", "anyOf"] if depth < 2 else kinds)
    match kind:
        case "string":
            return {"type": "string", "minLength": draw.randint(0, 2), "maxLength": draw.randint(2, 5)}
        case "integer" | "number":
            low = draw.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 200)}
        case "enum":
            return {"enum": draw.sample(["the king", "é", 'a "b"', 7, None, True, "日"], draw.randint(1, 4))}
        case "const":
            return {"const": draw.choice(["the sea", 12, [1, 2]])}
        case "array":
            items = any_schema(draw, depth + 1)
            return {"type": "array", "items": items, "minItems": 1, "maxItems": draw.randint(1, 3)}
        case "anyOf":
            return {"anyOf": [any_schema(draw, depth + 1) for _ in range(2)]}
        case "object":
            names = draw.sample(["name", "age", "where it was", "ß"], draw.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: any_schema(draw, depth + 1) for name in names},
                "required": draw.sample(names, draw.randint(0, len(names))),
                "additionalProperties": False,
            }
        case _:
            return {"type": kind}


def check_json(llm: LLM, numbers: Sequence[int]) -> int:
    """Answers of generated schemas follow them. Returns how many came to their end."""
    from jsonschema import validate

    ended = 0
    for number in numbers:
        draw = random.Random(number)
        schema = any_schema(draw)
        options = Options(
            max_tokens=200,
            json_schema=JsonSchema(json.dumps(schema)),
            temperature=draw.choice([0.0, 1.0]),
            seed=number,
            **draw.choice([{}, {"threshold": 0.3}, {"draft": "auto", "catch_up": "verify"}]),
        )
        _, text, reason = answer(llm, "And the king", options)
        if reason == "stop":
            validate(json.loads(text), schema)
            assert json.dumps(json.loads(text), ensure_ascii=False) == text or "\\" in text
            ended += 1
    return ended


def test_answers_follow_generated_schemas(llm: LLM) -> None:
    pytest.importorskip("jsonschema")
    assert check_json(llm, range(40)) >= 35


@pytest.mark.slow
def test_answers_follow_300_generated_schemas(llm: LLM) -> None:
    assert check_json(llm, range(1000, 1300)) >= 270


@pytest.mark.parametrize("kind", ["max-prob", "margin"])
def test_drafts_and_exits_under_verify_change_nothing(
    llm: LLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without costs, so that who drafts does not depend on the machine."""
    monkeypatch.setattr(llm.engine, "measure", lambda: None)
    monkeypatch.setattr(llm.engine, "costs", None)
    monkeypatch.setattr(llm.engine, "pass_costs", None)
    drafted: dict[str, list[int]] = {}
    for number in range(24):
        draw = random.Random(number)
        options = Options(
            max_tokens=60,
            json_schema=PERSON if number % 2 else JsonSchema(json.dumps(any_schema(draw))),
            temperature=draw.choice([0.0, 0.7, 1.5]),
            repetition_penalty=draw.choice([1.0, 1.3]),
            seed=number,
            n=draw.choice([1, 3]),
        )
        prompt = draw.choice(["And the king", '{"name": "a", "age": 12}\n{"name": ', "the people"])
        off = list(llm.generate(prompt, options))
        judged = replace(
            options, catch_up="verify", policy=kind, threshold=draw.choice([0.0, 0.3]), draft="auto"
        )
        generation = llm.submit(prompt, judged)
        while llm.busy:
            llm.step()
        for choice in generation.choices:
            said = [event.id for event in off if event.choice == choice.index]
            assert [token.id for token in choice.sequence.produced] == said
            for name, count in choice.sequence.drafts.counts.items():
                total = drafted.setdefault(name, [0, 0])
                total[0] += count.judged
                total[1] += count.accepted
    assert drafted["grammar"][1] > 0
    for judged_by, accepted in (drafted[name] for name in ("exit", "ngram")):
        assert 0 < accepted < judged_by


def test_a_regex_and_a_grammar_are_followed_whole(llm: LLM) -> None:
    _, text, reason = answer(
        llm, "And", Options(regex=Regex(r"(the |a )(king|sea)[0-9]{2}"), temperature=1.0)
    )
    assert (re.fullmatch(r"(the |a )(king|sea)[0-9]{2}", text) is not None, reason) == (True, "stop")
    lark = LarkGrammar('start: "Yes" | "No, " why\nwhy: /[a-c]{3}/')
    _, text, reason = answer(llm, "And", Options(grammar=lark, temperature=1.0, seed=3))
    assert re.fullmatch("Yes|No, [a-c]{3}", text)
    assert reason == "stop"


def test_a_follower_goes_back_and_forth(llm: LLM) -> None:
    follower = llm.grammars.follow(PERSON)
    ids, _, _ = answer(llm, "And", Options(json_schema=PERSON, temperature=1.0, seed=5))
    draw = random.Random(1)
    size = llm.stack.vocab_size
    for _ in range(60):
        place = draw.randint(0, len(ids) - 1)
        follower.go_to(ids[:place])
        fresh = llm.grammars.follow(PERSON)
        fresh.go_to(ids[:place])
        assert (follower.allowed(size) == fresh.allowed(size)).all()
        assert follower.allowed(size)[ids[place]]


def test_certain_text_is_the_tokenizers_and_always_accepted(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token is allowed where the text is certain, whatever else the model would write it in."""
    monkeypatch.setattr(llm.engine, "measure", lambda: None)
    monkeypatch.setattr(llm.engine, "costs", None)
    monkeypatch.setattr(llm.engine, "pass_costs", None)
    text = "and the king went up to the mountain"
    written = llm.encode_part(text)
    follower = llm.grammars.follow(Regex(text))
    for place, token in enumerate(written):
        follower.go_to(written[:place])
        assert np.flatnonzero(follower.allowed(llm.stack.vocab_size)).tolist() == [token]
    letters = {llm.encode_part(letter)[-1]: 90.0 for letter in set(text)}
    options = Options(regex=Regex(text), logit_bias=letters, draft="auto")
    generation = llm.submit("And", options)
    while llm.busy:
        llm.step()
    sequence = generation.choices[0].sequence
    assert [token.id for token in sequence.produced][: len(written)] == written
    count = sequence.drafts.counts["grammar"]
    assert count.accepted == count.judged > 4


class Stubborn:
    """Says a letter whatever is allowed."""

    def pick(self, logits: NDArray[np.float32], top_id: int, tokens: Sequence[int], position: int) -> int:
        return 70


def test_a_sampler_that_leaves_the_grammar_ends_its_own_request(llm: LLM) -> None:
    alone = answer(llm, "And the king", Options(max_tokens=12))[0]
    other = llm.submit("And the king", Options(max_tokens=12))
    bad = llm.submit("And", Options(json_schema=PERSON, max_tokens=9), sampler=Stubborn())
    while llm.busy:
        llm.step()
    assert [token.id for token in other.choices[0].sequence.produced] == alone
    assert (bad.choices[0].error or "").startswith("the answer left its grammar: ")
    with pytest.raises(DeviceError, match="the answer left its grammar"):
        list(llm.generate("And", Options(json_schema=PERSON, max_tokens=9), sampler=Stubborn()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": {"type": "nothing"}}, "json_schema cannot be followed"),
        ({"json_schema": {"type": "object", "uniqueItems": True, "minProperties": -1}}, "json_schema cannot"),
        ({"json_schema": "{"}, "is no JSON object"),
        ({"json_schema": 7}, "json_schema 7 is not a text"),
        ({"regex": "("}, "regex cannot be followed"),
        ({"grammar": "start: nothing_here"}, "grammar cannot be followed"),
        ({"regex": "x" * (LONGEST_GRAMMAR + 1)}, "up to 65536 are read"),
        ({"regex": "a", "json_schema": {}}, "an answer follows one of json_schema, grammar, regex"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos goes on past the end of the grammar"),
    ],
)
def test_what_cannot_be_followed_is_one_line(llm: LLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        llm.submit("And", Options.from_json(options))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 220


FOLLOWED: dict[str, dict[str, Any]] = {
    "type": {"type": ["string", "null"]},
    "enum": {"enum": [1, "a"]},
    "const": {"const": {"a": 1}},
    "minLength, maxLength": {"type": "string", "minLength": 1, "maxLength": 3},
    "pattern": {"type": "string", "pattern": "^a+$"},
    "format": {"type": "string", "format": "date-time"},
    "minimum, maximum": {"type": "number", "minimum": 1, "maximum": 2.5},
    "exclusiveMinimum, exclusiveMaximum": {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 9},
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "items, prefixItems": {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}},
    "minItems, maxItems": {"type": "array", "minItems": 1, "maxItems": 2},
    "properties, required": {"properties": {"a": {}}, "required": ["a"], "type": "object"},
    "additionalProperties, patternProperties": {
        "type": "object",
        "patternProperties": {"^a": {"type": "integer"}},
        "additionalProperties": False,
    },
    "minProperties, maxProperties": {"type": "object", "minProperties": 1, "maxProperties": 2},
    "anyOf, allOf": {"anyOf": [{"type": "integer"}, {"allOf": [{"type": "string"}, {"maxLength": 3}]}]},
    "oneOf of things apart": {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    "$ref, $defs": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#"}}}},
    },
    "title, description, default, examples": {
        "title": "a",
        "description": "b",
        "default": 1,
        "examples": [2],
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "propertyNames": {"type": "object", "propertyNames": {"type": "string"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "not": {"not": {"type": "integer"}},
    "if, then, else": {"if": {"type": "integer"}, "then": {"minimum": 3}},
    "oneOf of things that overlap": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "$ref to another document": {"$ref": "http://localhost:9/schema"},
}


def test_the_keywords_that_the_page_lists(llm: LLM) -> None:
    page = (Path(__file__).parents[2] / "docs" / "grammars.md").read_text(encoding="utf-8")
    for listed, schema in FOLLOWED.items():
        llm.grammars.follow(JsonSchema(json.dumps(schema)))
        assert f"| {listed} | followed |" in page
    for listed, schema in REFUSED.items():
        with pytest.raises(RequestError, match="json_schema cannot be followed"):
            llm.grammars.follow(JsonSchema(json.dumps(schema)))
        assert f"| {listed} | refused |" in page


def test_a_model_without_an_end_has_no_grammars(llm: LLM) -> None:
    with pytest.raises(RequestError, match="needs a token that ends the text"):
        Grammars(llm.tokenizer, llm.stack.vocab_size, frozenset()).follow(PERSON)


def test_what_openai_asks_for() -> None:
    assert read_response_format(None) == {}
    assert Options.from_json(read_response_format({"type": "json_object"})).json_schema == ANY_OBJECT
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert json.loads(Options.from_json(read_response_format(asked)).json_schema or "") == schema
    for bad in ("json", {"type": "xml"}, {"type": "json_schema"}, {"type": "json_object", "schema": {}}):
        with pytest.raises(RequestError, match="response_format"):
            read_response_format(bad)


def test_the_command_reads_files(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(PERSON, encoding="utf-8")
    flags = ["generate", str(tiny_bundle), "--prompt", "And", "--temperature", "1"]
    result = CliRunner().invoke(main, [*flags, "--json-schema", str(file)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.strip().splitlines()[0]).keys() == {"name", "age"}
    file.write_text("[]", encoding="utf-8")
    result = CliRunner().invoke(main, [*flags, "--json-schema", str(file)])
    assert result.exit_code == 1
    assert "json_schema '[]' is no JSON object" in result.stderr
    result = CliRunner().invoke(main, [*flags, "--grammar", str(tmp_path / "none.lark")])
    assert result.exit_code == 2


def test_greedy_under_a_mask_says_the_best_that_is_allowed(llm: LLM) -> None:
    follower = llm.grammars.follow(Regex("[0-9]"))
    logits = np.random.default_rng(0).standard_normal(llm.stack.vocab_size).astype(np.float32)
    from ease_runtime.text.grammar import Constrained

    picked = Constrained(Greedy(), follower, 1).pick(logits, int(logits.argmax()), [5], 1)
    allowed = [
        token for token in range(len(logits)) if llm.token_bytes(token) in [b"%d" % d for d in range(10)]
    ]
    assert picked == max(allowed, key=lambda token: logits[token])
