"""Bodies of requests, as OpenAI has them, become prompts and options. Whatever is wrong is said in one line.

The object `ease` of a request holds what OpenAI has no word for; where it is there, answers tell each token's
depth.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ease_common.errors import RequestError, did_you_mean
from ease_runtime.llm import TextEngine
from ease_runtime.options import FLAGS, LEAVING, SAMPLING, Options

OTHERWISE = ("logprobs", "sampler")  # each route has its own word for it; only flags name code
IN_BODY = tuple(name for name in SAMPLING if name not in OTHERWISE)
EASE = (*LEAVING, *FLAGS)
SHARED = ("model", "stream", "stream_options", "ease", *IN_BODY)
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)  # they change no answer
Body = Mapping[str, Any]


@dataclass(frozen=True)
class GenerationRequest:
    """A request that was understood. `show_ease`: tell each token's depth and confidence."""

    prompts: list[list[int]]
    options: Options
    stream: bool
    include_usage: bool
    show_logprobs: bool
    show_ease: bool


def read_completion(body: Any, llm: TextEngine, base: Options) -> GenerationRequest:
    """A body of /v1/completions. Raises RequestError."""
    check_names(body, (*SHARED, "prompt", "logprobs", "best_of", "echo", "suffix"))
    for name, default in {"best_of": body.get("n", 1), "echo": False, "suffix": ""}.items():
        if body.get(name) not in (None, default):
            raise RequestError(f"{name} is not supported; leave it away")
    logprobs = body.get("logprobs")
    more = {} if logprobs is None else {"logprobs": logprobs}
    return _request(
        body,
        lambda: read_prompts(body.get("prompt"), llm),
        read_options(body, base, more),
        logprobs is not None,
    )


def read_chat(body: Any, llm: TextEngine, base: Options) -> GenerationRequest:
    """A body of /v1/chat/completions. Raises RequestError."""
    check_names(body, (*SHARED, "messages", "logprobs", "top_logprobs", "max_completion_tokens"))
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
    return _request(
        body,
        lambda: [llm.encode_chat(read_messages(body.get("messages")))],
        read_options(body, base, more),
        logprobs,
    )


def _request(
    body: Body, prompts: Callable[[], list[list[int]]], options: Options, show_logprobs: bool
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
        prompts(), options, stream, include_usage, show_logprobs, body.get("ease") is not None
    )


def check_names(body: Any, known: tuple[str, ...]) -> None:
    """Raises RequestError unless the body is an object of known fields."""
    if not isinstance(body, Mapping):
        raise RequestError("the body must be a JSON object")
    for name, value in body.items():
        if name not in known and name not in IGNORED and value is not None:
            raise RequestError(
                f"unknown or unsupported field {name[:80]!r}; {did_you_mean(name[:80], known)}"
            )


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
    return Options.from_json({"seed": secrets.randbits(63), **given, **ease, **more}, base)


def read_prompts(prompt: Any, llm: TextEngine) -> list[list[int]]:
    """One or several prompts, as texts or ids. Raises RequestError."""
    if isinstance(prompt, str) or _is_ids(prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError("prompt must be a text, a list of token ids, or a list of either")
    return [_ids(part, llm) for part in prompt]


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
