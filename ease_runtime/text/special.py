"""Special tokens that a text only mentions stay text; those that a chat template writes are real.

    special = SpecialTokens(tokenizer)
    special.encode_text("the tag <|end|>")          # no special token among the ids
    special.encode_chat(template, messages)         # the template's alone
    special.split("<|im_end|>\\n")                   # (2, "\\n"): how a stop string looks among tokens

Knows nothing about models or requests.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ease_common.chat import DIGITS, ChatTemplate, Message, Tool, as_templates_know_it, check_messages
from ease_common.errors import PanicError, RequestError, without_panics
from ease_common.tokenizers import whole_texts

ID_DIGITS = 9
LONG_TEXT = 4096  # characters


class SpecialTokens:
    """The special tokens of a tokenizer, which texts may hold as words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: dict[int, AddedToken] = {
            token: added for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        }
        self.ids = {added.content: token for token, added in self.tokens.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # Digits, which no template changes: the first stand in messages for what must stay text, the others
        # never leave this object.
        self.mention, self.marker = (f"{secrets.randbelow(10**DIGITS):0{DIGITS}}" for _ in range(2))

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text in which nothing is a special token. Raises RequestError."""
        check_unicode(text)
        tokenizer = self.blind[0] if self.pattern.search(text) else self.tokenizer
        return encode_ids(tokenizer, text)

    def encode_chat(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        go_on: bool = False,
    ) -> list[int]:
        """The ids of messages and tools in a template's form. Raises RequestError."""
        check_messages(messages)
        known = [as_templates_know_it(message) for message in messages]  # before: what JSON escapes shows now
        hidden = [
            {name: value if name == "role" else self._hide(value) for name, value in m.items()} for m in known
        ]
        text = template.render(hidden, tools and self._hide(tools), go_on=go_on)
        check_unicode(text)
        if self.mention not in text:
            return encode_ids(self.tokenizer, text)
        marked = self.pattern.sub(lambda found: self._stand_in(self.marker, found[0]), text)
        shown = re.sub(
            rf"{self.mention}(\d{{{ID_DIGITS}}})", lambda found: self.tokens[int(found[1])].content, marked
        )
        tokenizer, meant = self.blind
        return [meant.get(token, token) for token in encode_ids(tokenizer, shown)]

    def split(self, text: str) -> tuple[str | int, ...]:
        """A text as characters, but the id of a special token where its text stands."""
        items: list[str | int] = []
        end = 0
        for found in self.pattern.finditer(text):
            items += [*text[end : found.start()], self.ids[found[0]]]
            end = found.end()
        return (*items, *text[end:])

    @cached_property
    def blind(self) -> tuple[Tokenizer, dict[int, int]]:
        """A copy of the tokenizer that knows special tokens by their markers only, and which ids these
        markers stand for.

        Made when it is first needed: a large vocabulary takes a second, and its memory again.
        """
        copy = whole_texts(Tokenizer.from_str(self.tokenizer.to_str()))
        copy.encode_special_tokens = True
        meant: dict[int, int] = {}
        for token, added in self.tokens.items():
            marker = self._stand_in(self.marker, added.content)
            flags = {name: getattr(added, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            copy.add_tokens([AddedToken(marker, special=False, **flags)])
            known = copy.token_to_id(marker)
            assert known is not None, "it was added the line before"
            meant[known] = token
        return copy, meant

    def _stand_in(self, secret: str, content: str) -> str:
        return f"{secret}{self.ids[content]:0{ID_DIGITS}}"

    def _hide(self, value: Any) -> Any:
        """The same value, with stand-ins for the special tokens that its texts mention."""
        if isinstance(value, str):
            return self.pattern.sub(lambda found: self._stand_in(self.mention, found[0]), value)
        if isinstance(value, Mapping):
            return {self._hide(name): self._hide(part) for name, part in value.items()}
        return [self._hide(part) for part in value] if isinstance(value, list | tuple) else value


def encode_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's ids, without what a post-processor puts around them.

    A long text goes as a batch of one: that lets other threads run meanwhile, which `encode` does not. Raises
    RequestError where the tokenizer's own rules break down over it.
    """
    try:
        with without_panics():
            if len(text) <= LONG_TEXT:
                ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
                return ids
            (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    except PanicError as error:
        raise RequestError(f"the tokenizer fails on this text: {error}") from None
    found: list[int] = encoding.ids
    return found


def check_unicode(text: str) -> None:
    """Raises RequestError for a text that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is no valid Unicode: half of a surrogate pair at character {error.start}"
        ) from None
