"""How a model's texts begin and end, and how it is spoken to: what comes along with weights besides a
tokenizer.
"""

from dataclasses import dataclass, field
from typing import Any, Self

from tokenizers import Tokenizer

from ease_common.errors import DataError
from ease_train.data.tokens import END


@dataclass(frozen=True)
class TextFormat:
    """`start_id` stands before a text (None: nothing does), each of `stop_ids` ends one; the first is the one
    that stands there.

    `chat_template` is jinja2's source, `special_tokens` the texts that it may write by their names
    (`bos_token`, ...), `generation` what the model's makers sample with, by transformers' names.
    """

    start_id: int | None
    stop_ids: tuple[int, ...]
    chat_template: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Those of a tokenizer trained here: one token stands between texts."""
        end = tokenizer.token_to_id(END)
        return cls(end, () if end is None else (end,))

    @classmethod
    def from_dict(cls, values: dict[str, Any], chat_template: str | None) -> Self:
        special_tokens = values.get("special_tokens", {})
        return cls(
            values["start_id"], tuple(values["stop_ids"]), chat_template, values["generation"], special_tokens
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the template, which is a file of its own."""
        values = {"start_id": self.start_id, "stop_ids": list(self.stop_ids), "generation": self.generation}
        return {**values, "special_tokens": self.special_tokens}

    @property
    def separator(self) -> int:
        """The token that stands before every document in training. Raises DataError where there is none."""
        if self.start_id is not None:
            return self.start_id
        if not self.stop_ids:
            raise DataError(
                "the model has no token that begins or ends a text, which stands between documents; name its "
                "eos_token in tokenizer_config.json, and import it again"
            )
        return self.stop_ids[0]
