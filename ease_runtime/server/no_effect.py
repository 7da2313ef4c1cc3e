"""Fields of requests that change no answer here: some whatever their value, others at the values of this
table, which clients send because they are the defaults of OpenAI, vLLM or llama.cpp.

At any other value the answer would be another one than was asked for, and the request is refused.
"""

from collections.abc import Mapping
from typing import Any

Body = Mapping[str, Any]
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",  # makes an answer come sooner, and changes none of it
        "cache_prompt",
        "id_slot",
        "priority",
        "request_id",
    }
)
NO_EFFECT: Mapping[str, tuple[Any, ...]] = {
    # the form of the answer
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "suffix": ("",),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "timings_per_token": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    # tools
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    # the template
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "reasoning_effort": ("none",),
    # the sampling
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "typical_p": (1,),
    "mirostat": (0,),
    "n_probs": (0,),
    "logits_processors": ([],),
    "bad_words": ([],),
}


def is_without_effect(name: str, value: Any, num_choices: Any) -> bool:
    """Whether a request says the same without this field. `num_choices` is its `n`."""
    if value is None or name in IGNORED:
        return True
    values = (num_choices,) if name == "best_of" else NO_EFFECT.get(name, ())
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def with_effect(body: Body) -> dict[str, Any]:
    """The fields of a body that may change the answer. Tools that must not be called are not shown."""
    if body.get("tool_choice") == "none":
        body = {name: value for name, value in body.items() if name != "tools"}
    num_choices = 1 if body.get("n") is None else body["n"]
    return {name: value for name, value in body.items() if not is_without_effect(name, value, num_choices)}
