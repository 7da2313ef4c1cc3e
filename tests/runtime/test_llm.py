"""Text in, text out, over the stand-in stack: options, streams, stops, several completions, several
requests.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy_text
from ease_common.chat import ChatTemplate
from ease_common.errors import DeviceError, RequestError
from ease_runtime.conversation import Conversation
from ease_runtime.engine.mock import MockStack
from ease_runtime.generation import Timing, TokenEvent
from ease_runtime.llm import LLM, TextEngine, load_tokenizer
from ease_runtime.options import Options
from ease_runtime.policies.thresholds import OFF, Thresholds
from ease_runtime.text.grammar import ANY_OBJECT

LETTERS = "abcdefghijklmnopqrstuv"
CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% "
    "endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% "
    "endif %}"
)


def text_engine(num_slots: int = 1, **more: Any) -> TextEngine:
    """Letters over hashes: 22 letters and the end."""
    stack = MockStack(vocab_size=1 + len(LETTERS), max_positions=64)
    tokenizer = toy_text.letter_tokenizer(LETTERS)
    return TextEngine(
        stack, tokenizer, **{"start_id": 0, "stop_ids": frozenset({0}), **more}, num_slots=num_slots
    )


def text_of(events: Sequence[TokenEvent], choice: int = 0) -> str:
    return "".join(event.text for event in events if event.choice == choice)


def run(engine: TextEngine, prompts: Sequence[str], options: Sequence[Options]) -> list[list[TokenEvent]]:
    """All requests together, each one's events."""
    generations = [engine.submit(*request) for request in zip(prompts, options, strict=True)]
    places = {choice: place for place, generation in enumerate(generations) for choice in generation.choices}
    events: list[list[TokenEvent]] = [[] for _ in prompts]
    while engine.busy:
        for choice, new in engine.step():
            events[places[choice]] += new
    assert all(generation.finished for generation in generations)
    return events


def test_the_text_is_that_of_the_tokens() -> None:
    engine = text_engine(stop_ids=frozenset())
    timing = Timing()
    events = list(engine.generate("abc", Options(max_tokens=20), timing))
    assert text_of(events) == engine.tokenizer.decode([event.id for event in events])
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    assert (timing.num_prompt_tokens, timing.num_tokens, len(timing.token_seconds)) == (4, 20, 19)
    assert sum(timing.token_seconds) == pytest.approx(timing.decode_seconds)
    assert not engine.busy


def test_it_ends_at_the_end_token_whose_text_is_empty() -> None:
    events = list(text_engine().generate("abc", Options(max_tokens=60, temperature=1.5, seed=3)))
    assert events[-1].finish_reason == "stop"
    assert (events[-1].id, events[-1].text) == (0, "")
    assert 0 not in [event.id for event in events[:-1]]


@pytest.mark.parametrize("catch_up", ["recompute", "propagate", "verify"])
def test_stop_strings_end_the_answer_before_them(catch_up: str) -> None:
    options = Options(max_tokens=30, catch_up=catch_up, threshold=(0.3,))
    engine = text_engine(stop_ids=frozenset())
    whole = text_of(list(engine.generate("abc", options)))
    stop = whole[11:14]
    events = list(engine.generate("abc", dataclasses.replace(options, stop=("never this", stop))))
    assert text_of(events) == whole[: whole.index(stop)]
    assert [event.finish_reason for event in events if event.finish_reason] == ["stop"]
    assert events[-1].finish_reason == "stop"
    assert len(events) == whole.index(stop) + len(stop)
    assert engine.engine.sequences == []


@pytest.mark.parametrize("catch_up", ["recompute", "verify"])
@pytest.mark.parametrize("count", [1, 2])
def test_special_tokens_stop_an_answer_that_is_to_end_there(count: int, catch_up: str) -> None:
    """The model says nothing but special tokens, which have no text."""
    engine = text_engine(stop_ids=frozenset())
    stop = ("never this", toy_text.END * count)
    options = Options(max_tokens=20, threshold=(0.3,), catch_up=catch_up, stop=stop, logit_bias={0: 1000.0})
    events = list(engine.generate("ab", options))
    assert [(event.id, event.text) for event in events] == [(0, "")] * count
    assert events[-1].finish_reason == "stop"
    assert engine.engine.sequences == []


def test_part_of_a_special_tokens_text_stops_nothing() -> None:
    engine = text_engine(stop_ids=frozenset())
    events = list(engine.generate("ab", Options(max_tokens=4, stop=("end", "|>"), logit_bias={0: 1000.0})))
    assert ([event.id for event in events], events[-1].finish_reason) == ([0, 0, 0, 0], "length")


def test_one_start_token_stands_before_a_prompt() -> None:
    engine = text_engine()
    assert engine.encode("abc") == engine.encode(f"{toy_text.END}abc") == [0, 1, 2, 3]
    assert engine.encode(f"{toy_text.END}{toy_text.END}a") == [0, 0, 1], "who writes two gets two"
    assert engine.encode(toy_text.END) == [0]
    assert text_engine(start_id=None).encode(f"{toy_text.END}a") == [0, 1]


def test_a_document_that_mentions_a_special_token_holds_none() -> None:
    engine = text_engine()
    assert engine.encode_text("abc") == [0, 1, 2, 3]
    assert engine.encode_text(f"a{toy_text.END}b", parse_special=True) == [0, 1, 0, 2]
    tokenizer = toy_text.byte_tokenizer()
    engine = TextEngine(MockStack(vocab_size=tokenizer.get_vocab_size()), tokenizer, start_id=0)
    ids = engine.encode_text(f"the {toy_text.END}")
    assert (ids[0], 0 in ids[1:], tokenizer.decode(ids)) == (0, False, f"the {toy_text.END}")


def test_a_base_models_chat_is_text() -> None:
    tokenizer = toy_text.byte_tokenizer()
    engine = TextEngine(
        MockStack(vocab_size=tokenizer.get_vocab_size()), tokenizer, start_id=0, stop_ids=frozenset({0})
    )
    conversation = Conversation(engine, Options(max_tokens=2))
    list(conversation.say(f"a{toy_text.END}"))
    assert conversation.last is not None
    assert conversation.last.prompt == engine.encode_text(f"a{toy_text.END}\n")


def test_a_tokenizers_file_may_ask_for_truncation_and_padding(tmp_path: Path) -> None:
    tokenizer = toy_text.byte_tokenizer()
    ids = tokenizer.encode("the text that is long").ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.model.dropout = 0.9
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("the text that is long").ids == ids


def test_text_that_may_begin_a_stop_string_waits() -> None:
    engine = text_engine(stop_ids=frozenset())
    whole = text_of(list(engine.generate("abc", Options(max_tokens=8))))
    generation = engine.submit("abc", Options(max_tokens=8, stop=(whole[2:6] + "!",)))
    texts = []
    while engine.busy:
        texts += [text_of(events) for choice, events in engine.step() if choice.num_read]
    assert "".join(texts) == whole
    assert "" in texts
    assert whole[2:6] in "".join(texts[5:])
    assert generation.choices[0].finish_reason == "length"


def test_completions_are_those_of_their_seeds() -> None:
    """The first of n is the one that n = 1 gives; each differs."""
    options = Options(max_tokens=12, temperature=1.0, seed=5, n=4)
    events = list(text_engine(num_slots=3).generate("abc", options))
    texts = [text_of(events, choice) for choice in range(4)]
    assert len(set(texts)) == 4
    assert texts[0] == text_of(list(text_engine().generate("abc", dataclasses.replace(options, n=1))))
    assert [
        sum(e.finish_reason is not None for e in events if e.choice == choice) for choice in range(4)
    ] == [1] * 4


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_requests_together_are_those_alone(num_slots: int) -> None:
    options = [
        Options(max_tokens=20),
        Options(max_tokens=9, threshold=(0.2, 0.6), catch_up="propagate"),
        Options(max_tokens=30, temperature=0.9, seed=4, stop=("a", "ee")),
        Options(max_tokens=14, threshold=(0.3,), catch_up="verify", repetition_penalty=1.3),
        Options(max_tokens=11, temperature=1.2, min_p=0.05, presence_penalty=1.0, n=2, logprobs=3),
    ]
    prompts = ["abc", "a", "hello", "ponmlk", "tuv"]
    alone = [list(text_engine().generate(*request)) for request in zip(prompts, options, strict=True)]
    together = run(text_engine(num_slots), prompts, options)
    for one, other, setting in zip(alone, together, options, strict=True):
        for choice in range(setting.n):
            assert [e for e in one if e.choice == choice] == [e for e in other if e.choice == choice]


def test_logprobs_name_the_most_probable() -> None:
    events = list(text_engine().generate("abc", Options(max_tokens=5, logprobs=4)))
    for event in events:
        assert len(event.top_logprobs) == 4
        assert event.top_logprobs[0] == (event.id, event.logprob)
        assert math.fsum(math.exp(logprob) for _, logprob in event.top_logprobs) < 1
    assert not next(text_engine().generate("abc", Options(max_tokens=1))).top_logprobs


def test_bias_and_penalties_reach_the_tokens() -> None:
    engine = text_engine()
    assert text_of(list(engine.generate("abc", Options(max_tokens=5, logit_bias={7: 100.0})))) == "ggggg"
    told = text_of(
        list(engine.generate("abc", Options(max_tokens=22, frequency_penalty=100.0, logit_bias={0: -1000.0})))
    )
    assert sorted(told) == list(LETTERS)


def test_a_given_up_request_leaves_nothing() -> None:
    engine = text_engine(num_slots=2)
    kept = engine.submit("abc", Options(max_tokens=10))
    gone = [engine.submit("xyz", Options(max_tokens=50, n=3)) for _ in range(2)]
    for _ in range(7):
        engine.step()
    for generation in gone:
        engine.cancel(generation)
    while engine.busy:
        engine.step()
    assert kept.finished
    assert engine.engine.sequences == []
    assert not engine.choices


def test_a_text_without_numbers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = text_engine()
    plain = engine.stack.run_exit

    def run_exit(number: int, rows: Any) -> Any:
        output = plain(number, rows)
        output.top_prob[:] = math.nan
        return output

    monkeypatch.setattr(engine.stack, "run_exit", run_exit)
    with pytest.raises(DeviceError, match="no finite numbers"):
        list(engine.generate("abc"))
    assert engine.engine.sequences == []


def test_a_row_without_numbers_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = text_engine(num_slots=2)
    sick = engine.submit("abc", Options(max_tokens=9))
    well = engine.submit("hij", Options(max_tokens=9))
    plain = engine.stack.run_exit

    def run_exit(number: int, rows: Any) -> Any:
        output = plain(number, rows)
        for place, row in enumerate(rows):
            sequence = sick.choices[0].sequence
            if (
                len(sequence.produced) == 4
                and row in sequence.counters.rows[sequence.counters.done[0] - 1 : sequence.counters.done[0]]
            ):
                output.logits[place] = math.nan
                output.top_prob[place] = math.nan
        return output

    monkeypatch.setattr(engine.stack, "run_exit", run_exit)
    while engine.busy:
        engine.step()
    assert (sick.choices[0].finish_reason, well.choices[0].finish_reason) == ("error", "length")
    assert "finite" in (sick.choices[0].error or "")
    monkeypatch.undo()
    alone = [event.id for event in text_engine().generate("hij", Options(max_tokens=9))]
    assert [token.id for token in well.choices[0].sequence.produced] == alone


def test_a_conversation_goes_on_from_its_cache() -> None:
    """The next turn runs only what it does not share with the last, and says what it would say afresh."""
    engine = text_engine()
    fresh = text_engine()
    first = engine.submit([0, 1, 2, 3], Options(max_tokens=6), keep=True)
    while engine.busy:
        engine.step()
    said = [token.id for token in first.choices[0].sequence.produced]
    prompt = [0, 1, 2, 3, *said, 9, 8]
    engine.stack.trace = []
    second = engine.submit(prompt, Options(max_tokens=5), after=first)
    while engine.busy:
        engine.step()
    ran = sum(call.num_tokens for call in engine.stack.trace if (call.graph, call.number) == ("segment", 0))
    assert ran < len(prompt)
    assert [token.id for token in second.choices[0].sequence.produced] == [
        e.id for e in fresh.generate(prompt, Options(max_tokens=5))
    ]


@pytest.mark.parametrize("stop", [(), ("u", "t", "s")])
def test_a_chat_keeps_its_history_in_the_cache(stop: tuple[str, ...]) -> None:
    """Each turn runs about what is new in it, says what it would say afresh, and can be cut short, refused or
    forgotten.
    """
    template = ChatTemplate("{% for m in messages %}{{ m.content }}b{% endfor %}")
    engine = text_engine(template=template, stop_ids=frozenset())
    options = Options(max_tokens=6, stop=stop)
    conversation = Conversation(engine, options, system="de")
    history = [{"role": "system", "content": "de"}]
    for _ in range(3):
        engine.stack.trace = []
        history.append({"role": "user", "content": "abc"})
        text = text_of(list(conversation.say("abc")))
        assert text == text_of(
            list(text_engine(stop_ids=frozenset()).generate(engine.encode_chat(history), options))
        )
        history.append({"role": "assistant", "content": text})
        assert conversation.messages == history
        ran = sum(
            call.num_tokens for call in engine.stack.trace if (call.graph, call.number) == ("segment", 0)
        )
        assert ran <= 14  # the history alone has 29 tokens in the end, and 6 come out
    events = conversation.say("abc")
    first = next(events)
    events.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": first.text}
    with pytest.raises(RequestError, match="context of 64"):
        list(conversation.say("a" * 64))
    assert len(conversation.messages) == 9
    conversation.reset()
    assert conversation.messages == history[:1]
    assert engine.engine.sequences == []
    with pytest.raises(RequestError, match="a chat has one answer"):
        Conversation(engine, Options(n=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": -2}, "max_tokens -2 is below 0"),
        ({"max_tokens": "7"}, "max_tokens '7' is not a whole number"),
        ({"max_tokens": True}, "max_tokens True is not a whole number"),
        ({"max_token": 7}, "unknown option 'max_token'; did you mean 'max_tokens'"),
        ({"temperature": "hot"}, "temperature 'hot' is not a number"),
        ({"temperature": -1}, "temperature -1.0"),
        ({"temperature": 10**400}, "is not a number that fits"),
        ({"top_p": 0}, "top_p 0.0"),
        ({"n": 0}, "n 0 is outside"),
        ({"n": 1000}, "n 1000 is outside"),
        ({"logprobs": 21}, "logprobs 21 is outside"),
        ({"stop": ""}, "stop string is empty"),
        ({"stop": [1]}, "not a text or a list of texts"),
        ({"stop": ["x"] * 17}, "more than 16 stop strings"),
        ({"stop": "x" * 70_000}, "stop strings"),
        ({"threshold": "0.5x"}, "threshold '0.5x' is not a number"),
        ({"threshold": []}, "no threshold in an empty list"),
        ({"threshold": math.nan}, "threshold nan is outside"),
        ({"logit_bias": [1]}, "logit_bias \\[1\\] is not an object"),
        ({"logit_bias": {"a": 1}}, "is not an object of token ids"),
        ({"logit_bias": {"5": None}}, "is not an object of token ids"),
        ({"depth_budget": "4"}, "depth_budget '4' is not a number"),
        ({"patience": 1.5}, "patience 1.5 is not a whole number"),
        ({"policy": None}, "policy None is not a text"),
        ({"seed": 2**64}, "is outside"),
        ({"threshold": 10**400}, "threshold 10+... is not a number in"),
        ({"logit_bias": {"1" * 5000: 1.0}}, "is not an object of token ids"),
    ],
)
def test_options_that_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as by_json:
        Options.from_json(values)
    if "max_token" not in values:
        with pytest.raises(RequestError) as by_python:
            Options(**values)
        assert str(by_python.value) == str(by_json.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"threshold": 0.5}, {"threshold": Thresholds((0.5,))}),
        ({"threshold": "off,0.5"}, {"threshold": Thresholds((None, 0.5))}),
        ({"threshold": np.float64(0.5)}, {"threshold": Thresholds((0.5,))}),
        ({"max_tokens": np.int64(7), "temperature": 1}, {"max_tokens": 7, "temperature": 1.0}),
        ({"stop": "x", "stop_token_ids": [3]}, {"stop": ("x",), "stop_token_ids": (3,)}),
        ({"json_schema": {"type": "object"}}, {"json_schema": ANY_OBJECT}),
    ],
)
def test_options_from_python(given: dict[str, Any], expected: dict[str, Any]) -> None:
    options = Options(**given)
    assert {name: getattr(options, name) for name in expected} == expected
    assert options == Options.from_json(given)


def test_complete(tiny_bundle: Path) -> None:
    llm = LLM(tiny_bundle)
    options = Options(max_tokens=6, threshold=0.0, catch_up="propagate")
    completion = llm.complete("And the king", options)
    events = list(llm.generate("And the king", options))
    assert completion.tokens == events
    assert completion.text == "".join(event.text for event in events)
    assert completion.depths == [2] * 6
    assert completion.finish_reason == "length"
    assert completion.tokens_per_second == completion.timing.tokens_per_second > 0
    with pytest.raises(RequestError, match="complete has one answer"):
        llm.complete("And", Options(n=2))


def test_options_from_json() -> None:
    base = Options(max_tokens=5, threshold=(0.3,), seed=2)
    values = {
        "threshold": [0.2, None],
        "stop": "x",
        "logit_bias": {"3": 1},
        "temperature": 1,
        "min_exit": None,
    }
    expected = Options(
        max_tokens=5, threshold=(0.2, None), seed=2, stop=("x",), logit_bias={3: 1.0}, temperature=1.0
    )
    assert Options.from_json(values, base) == expected
    assert Options.from_json({"threshold": None}, base).threshold == OFF
    assert Options.from_json({}) == Options()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", Options(), "the prompt is empty"),
        ("ab\ud800c", Options(), "no valid Unicode: half of a surrogate pair at character 2"),
        ("a" * 64, Options(), "context of 64"),
        ("a", Options(logit_bias={23: 1.0}), "token id 23, outside the vocabulary of 23"),
        ("a", Options(policy="sure"), "unknown policy 'sure'"),
        ("a", Options(catch_up="later"), "unknown catch-up 'later'"),
        ("a", Options(threshold=(0.1, 0.2, 0.3)), "3 thresholds given"),
    ],
)
def test_requests_that_cannot_run(prompt: str, options: Options, message: str) -> None:
    engine = text_engine()
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt, options)
    assert not engine.busy


def test_a_chat_is_rendered_by_the_template() -> None:
    template = ChatTemplate(CHATML, bos_token="[", eos_token="]")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "<b>"}]
    assert template.render(messages) == "[<system>be kind]<user><b>]<assistant>"
    engine = text_engine(template=template)
    assert (
        engine.encode_chat(messages) == engine.tokenizer.encode("[<system>be kind]<user><b>]<assistant>").ids
    )
    with pytest.raises(RequestError, match="no chat template"):
        text_engine().encode_chat(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list"),
        ("hello", "messages must be a list"),
        ([{"role": "user"}], "messages\\[0\\] has no text"),
        ([{"role": "user", "content": ["x"]}], "messages\\[0\\] has no text"),
        ([{"role": "king", "content": "x"}], "the role 'king'; use one of"),
        ([{"role": "user", "content": "x"}, 3], "messages\\[1\\] has no text"),
        ([{"role": "tool", "content": "x"}], "no tools"),
    ],
)
def test_messages_that_cannot_be_used(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate(CHATML).render(messages)


def test_templates_are_kept_in_their_box() -> None:
    """jinja2's known ways out, and programs that would change what they are given."""
    messages = [{"role": "user", "content": "x"}]
    for source in (
        "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(RequestError, match="the chat template cannot take"):
            ChatTemplate(source).render(messages)
    for source in ("{% for %}", "{% blink %}", "{{ messages|blink }}", b"\xff\xfe"):
        template = ChatTemplate(source)
        assert template.problem is not None
        assert len(template.problem.splitlines()) == 1
        with pytest.raises(
            RequestError, match=r"the chat template cannot be read .*; chat is refused, all else works"
        ):
            text_engine(template=template).encode_chat(messages)
        with pytest.raises(RequestError, match="cannot be read"):
            Conversation(text_engine(template=template), Options())
    now = ChatTemplate("{{ strftime_now('%Y') }}{{ messages | tojson }}").render(messages)
    assert now.endswith('[{"role": "user", "content": "x"}]')
