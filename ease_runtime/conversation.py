"""A chat with a model, whose history stays in the cache between turns.

conversation = Conversation(llm, Options(), system="Be brief.")
for event in conversation.say("Hello"):
    print(event.text, end="")
"""

from collections.abc import Generator

from ease_common.chat import PlainTemplate
from ease_common.errors import RequestError
from ease_runtime.generation import Generation, Timing, TokenEvent
from ease_runtime.llm import TextEngine
from ease_runtime.options import Options


class Conversation:
    """Messages so far, and the request whose cache holds them. A base model goes on with the plain texts."""

    def __init__(self, llm: TextEngine, options: Options, system: str | None = None) -> None:
        if options.n != 1:
            raise RequestError(f"n {options.n}: a chat has one answer")
        if llm.template is not None and llm.template.problem is not None:
            raise RequestError(llm.template.problem)
        self.llm = llm
        self.options = options
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        self.last: Generation | None = None

    def say(self, text: str, timing: Timing | None = None) -> Generator[TokenEvent, None, None]:
        """The answer to a message.

        Who stops reading keeps what was said. Raises RequestError, and then nothing has been said.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        generation = self.llm.submit(self._encode(asked), self.options, after=self.last, keep=True)
        said: list[str] = []
        try:
            for event in self.llm.follow(generation, timing or Timing()):
                said.append(event.text)
                yield event
        finally:
            if generation.finished and generation.choices[0].error is None:
                self.last = generation
            else:
                self.llm.cancel(generation)
                self.last = None
            if said:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    def reset(self) -> None:
        """Forget everything but the system's message."""
        if self.last is not None:
            self.llm.cancel(self.last)
        self.last, self.messages = None, list(self.opening)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        if self.llm.template is not None:
            return self.llm.encode_chat(messages)
        return self.llm.encode_text(PlainTemplate().render(messages))
