"""Bodies of requests, as OpenAI has them, become prompts and options. Whatever is wrong is said in one line.

The object `ease` of a request holds what OpenAI has no word for; where it is there, answers tell each token's
depth.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ease_common.errors import RequestError, did_you_mean, shown
from ease_runtime.llm import TextEngine
from ease_runtime.options import FLAGS, GRAMMARS, LEAVING, SAMPLING, TO_THE_END, Options
from ease_runtime.server.api_error import ApiError
from ease_runtime.server.no_effect import NO_EFFECT, with_effect
from ease_runtime.server.tools import ToolUse, read_tools
from ease_runtime.text.grammar import ANY_OBJECT
from ease_runtime.text.streaming import Detokenizer, StopPattern

OTHERWISE = (
    "logprobs",
    "sampler",
    "draft_corpus",
)  # each route has its own word; only flags name code, files
IN_BODY = tuple(name for name in SAMPLING if name not in OTHERWISE)
EASE = (*LEAVING, *FLAGS)
SHARED = ("model", "stream", "stream_options", "ease", "response_format", *IN_BODY)
TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
CHAT = (
    "messages",
    "top_logprobs",
    "max_completion_tokens",
    "add_generation_prompt",
    "continue_final_message",
)
LENGTHS = ("max_tokens", "max_completion_tokens")
Body = Mapping[str, Any]


@dataclass(frozen=True)
class Echo:
    """A prompt that an answer repeats: its text, and what each of its tokens adds to that."""

    text: str
    pieces: list[str]


@dataclass(frozen=True)
class GenerationRequest:
    """A request that was understood.

    `show_ease`: tell each token's depth and confidence. `names_length`: whether the client said how long an
    answer may be. `echoes`: the prompts as their answers repeat them, none where they do not. `tools`: what a
    chat's answers may call.
    """

    prompts: list[list[int]]
    options: Options
    stream: bool
    include_usage: bool
    show_logprobs: bool
    show_ease: bool
    names_length: bool = False
    echoes: Sequence[Echo] = ()
    patterns: Sequence[StopPattern] = ()  # of its stop strings
    tools: ToolUse | None = None

    @property
    def score_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are asked for."""
        return self.show_logprobs and bool(self.echoes)


def read_completion(
    body: Any, llm: TextEngine, base: Options, max_prompt: int | None = None
) -> GenerationRequest:
    """A body of /v1/completions. Raises RequestError, of texts that no `max_prompt` tokens could hold before
    any is encoded.
    """
    body = read_fields(body, (*SHARED, "prompt", "logprobs", "echo"))
    logprobs = body.get("logprobs")
    more = {} if logprobs is None else {"logprobs": logprobs}
    asked = _request(
        body,
        llm,
        lambda: read_prompts(body.get("prompt"), llm, max_prompt),
        read_options(body, base, more),
        logprobs is not None,
    )
    if not read_switch(body, "echo"):
        return asked
    return replace(asked, echoes=read_echoes(body.get("prompt"), asked.prompts, llm))


def read_chat(body: Any, llm: TextEngine, base: Options, max_prompt: int | None = None) -> GenerationRequest:
    """A body of /v1/chat/completions. Raises RequestError."""
    body = read_fields(body, (*SHARED, *CHAT, *TOOLS, "logprobs"))
    logprobs = read_switch(body, "logprobs")
    more = {"logprobs": body["top_logprobs"]} if body.get("top_logprobs") is not None else {}
    if more and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true")
    if body.get("max_completion_tokens") is not None:
        if body.get("max_tokens") not in (None, body["max_completion_tokens"]):
            raise RequestError(
                "max_tokens and max_completion_tokens are two names of one option; leave one out"
            )
        more["max_tokens"] = body["max_completion_tokens"]
    tools = read_tools(body, llm)
    options = read_options(body, base, more)
    if tools is not None:
        options = with_tools(options, tools)
    go_on = read_switch(body, "continue_final_message")
    if body.get("add_generation_prompt") is not None and not go_on:
        raise RequestError("add_generation_prompt: false needs continue_final_message: true")
    asked = _request(
        body,
        llm,
        lambda: [
            llm.encode_chat(read_messages(body.get("messages")), tools.tools if tools else None, go_on=go_on)
        ],
        options,
        logprobs,
    )
    return replace(asked, tools=tools)


def with_tools(options: Options, tools: ToolUse) -> Options:
    """The options with the grammar of a call that has to come.

    Raises RequestError beside another form, or beside a schema, which no call follows.
    """
    for name in GRAMMARS if tools.grammar is not None else ("json_schema",):
        if getattr(options, name) is not None:
            asked = "response_format" if name == "json_schema" else name
            raise RequestError(f"{asked} leaves no room for calls of tools; leave one of the two out")
    return options if tools.grammar is None else Options.from_json({"grammar": tools.grammar}, options)


def _request(
    body: Body, llm: TextEngine, prompts: Callable[[], list[list[int]]], options: Options, show_logprobs: bool
) -> GenerationRequest:
    stream = read_switch(body, "stream")
    of_stream = body.get("stream_options") or {}
    if not isinstance(of_stream, Mapping):
        raise RequestError('stream_options must be an object like {"include_usage": true}')
    include_usage = read_switch(of_stream, "include_usage")
    if include_usage and not stream:
        raise RequestError(
            "stream_options has no effect without stream: true; a whole answer always has its usage"
        )
    return GenerationRequest(
        prompts(),
        options,
        stream,
        include_usage,
        show_logprobs,
        show_ease=body.get("ease") is not None,
        names_length=any(body.get(name) is not None for name in LENGTHS),
        patterns=llm.stop_patterns(options),
    )


def read_fields(body: Any, known: tuple[str, ...]) -> Body:
    """The fields of a body that may change the answer.

    Raises RequestError unless it is an object and these are known.
    """
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    fields = with_effect(body)
    for name in fields:
        if name in known:
            continue
        if name == "best_of":
            raise RequestError("best_of must be n: every completion is given back")
        if name in NO_EFFECT:
            values = " or ".join(json.dumps(value) for value in NO_EFFECT[name])
            raise RequestError(f"{name} is supported as {values} only; leave it away")
        raise RequestError(f"unknown or unsupported field {name[:80]!r}; {did_you_mean(name[:80], known)}")
    return fields


def check_length(asked: GenerationRequest, *, context: int, max_prompt: int | None, clamp: bool) -> None:
    """Raises ApiError for prompts that are too long, or leave no room in the model's context for the answer
    that is asked for; with `clamp` that may be shorter.
    """
    length = asked.options.max_tokens if asked.names_length else TO_THE_END
    for size in map(len, asked.prompts):
        if max_prompt is not None and size > max_prompt:
            _refuse_length(f"the prompt has {size} tokens; this server takes up to {max_prompt}")
        limit = f"this model's maximum context length is {context} tokens"
        if size + (length != 0) > context:
            _refuse_length(f"{limit}: the prompt has {size} tokens, which leaves no room for an answer")
        if size + length > context and not clamp:
            _refuse_length(
                f"{limit}: the prompt has {size}, and max_tokens {length} is more than the {context - size} "
                "that are left; -1 takes what there is"
            )


def _refuse_length(message: str) -> NoReturn:
    raise ApiError(400, message, code="context_length_exceeded")


def read_switch(values: Body, name: str) -> bool:
    """A field that is true or false; false where it is not there. Raises RequestError."""
    value = values.get(name)
    if value not in (None, True, False):
        raise RequestError(f"{name} must be true or false")
    return bool(value)


def read_options(body: Body, base: Options, more: Body) -> Options:
    """The options that a body gives, over the server's own.

    Without a seed, one is drawn. Raises RequestError.
    """
    given = {name: body[name] for name in IN_BODY if body.get(name) is not None}
    ease = body.get("ease") or {}
    if not isinstance(ease, Mapping):
        raise RequestError('ease must be an object like {"threshold": 0.7}')
    for name in ease:
        if name not in EASE:
            raise RequestError(f"unknown field {f'ease.{name[:80]}'!r}; {did_you_mean(name[:80], EASE)}")
    form = read_response_format(body.get("response_format"))
    return Options.from_json({"seed": secrets.randbits(63), **given, **form, **ease, **more}, base)


def read_response_format(value: Any) -> Body:
    """OpenAI's `response_format` as the option it is. Raises RequestError.

    Its `strict` and `name` change nothing: a schema is always followed.
    """
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object" and value.keys() <= {"type"}:
        return {"json_schema": ANY_OBJECT}
    if kind == "json_schema" and value.keys() <= {"type", "json_schema"}:
        named = value.get("json_schema")
        if isinstance(named, Mapping) and isinstance(named.get("schema"), Mapping | bool):
            return {"json_schema": named["schema"]}
    raise RequestError(
        f"response_format {shown(value)} is none of {{'type': 'text'}}, {{'type': 'json_object'}} and "
        "{'type': 'json_schema', 'json_schema': {'schema': {...}}}"
    )


def read_prompts(prompt: Any, llm: TextEngine, max_prompt: int | None = None) -> list[list[int]]:
    """One or several prompts, as texts or ids. Raises RequestError."""
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError("prompt must be a text, a list of token ids, or a list of either")
    for text in prompt:
        if isinstance(text, str):
            _check_characters(text, llm, max_prompt)
    return [_ids(part, llm) for part in prompt]


def _check_characters(text: str, llm: TextEngine, max_prompt: int | None) -> None:
    limit = min(max_prompt or llm.stack.max_positions, llm.stack.max_positions)
    if len(text) > limit * llm.longest_token:
        _refuse_length(
            f"the prompt has {len(text)} characters, more than the {limit} tokens that this server takes hold"
        )


def read_echoes(prompt: Any, prompts: Sequence[list[int]], llm: TextEngine) -> list[Echo]:
    """How answers repeat these prompts: texts as they came, ids as their text, special tokens written out."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    echoes = []
    for place, ids in enumerate(prompts):
        detokenizer = Detokenizer(llm.tokenizer, [])
        special = llm.special.tokens
        pieces = [special[i].content if i in special else detokenizer.step(i) for i in ids]
        text = texts[place]
        if not isinstance(text, str):
            text = "".join(pieces)
        elif ids[:1] == [llm.start_id] and not text.startswith(pieces[0]):
            pieces[0] = ""  # the server has put it there
        echoes.append(Echo(text, pieces))
    return echoes


def _is_ids(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and all(type(token) is int for token in part)


def _ids(part: Any, llm: TextEngine) -> list[int]:
    if isinstance(part, str) and part:
        return llm.encode(part)
    if not _is_ids(part):
        raise RequestError("prompt must be a text with at least one character, or a list of token ids")
    ids: list[int] = part
    return ids


def read_messages(messages: Any) -> Any:
    """Messages with their texts joined, where they came in parts; what else is wrong with them the template
    says.
    """
    if not isinstance(messages, list):
        return messages
    return [{**m, "content": _joined(m.get("content"))} if isinstance(m, Mapping) else m for m in messages]


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("a message has a part that is no text; this model takes texts only")
    return "".join(str(text) for text in texts)
