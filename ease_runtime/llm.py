"""Text in, text out, over the engine.

llm = LLM("runs/demo/bundle")
for event in llm.generate("In the beginning", Options(threshold=(0.7,), catch_up="propagate")):
    print(event.text, end="", flush=True)
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ease_runtime.engine import Engine
from ease_runtime.errors import BundleError, DeviceError, RequestError
from ease_runtime.policy import ExitPolicy
from ease_runtime.sampling import Greedy, GumbelSampler, Sampler
from ease_runtime.stack import OrtStack

DEVICES = ("auto", "cpu")


@dataclass(frozen=True)
class Options:
    """How to continue a prompt.

    `threshold` None: no token leaves early; one value holds for every early exit; None among several is an exit that is not
    asked. temperature 0 is greedy.
    """

    max_tokens: int = 128
    policy: str = "max-prob"
    threshold: tuple[float | None, ...] | None = None
    catch_up: str = "recompute"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def sampler(self) -> Sampler:
        """Greedy at temperature 0, else Gumbel-max. Raises RequestError for values outside their range."""
        sampler = GumbelSampler(self.temperature or 1.0, self.top_k, self.top_p, self.seed)
        return sampler if self.temperature else Greedy()


@dataclass(frozen=True)
class TokenEvent:
    """One token. `text` is what became printable with it: '' while a character is incomplete.

    `depth` counts layers; `finish_reason` is set on the last event: 'stop' (the end token, whose text is '') or 'length'.
    """

    id: int
    text: str
    depth: int
    confidence: float
    logprob: float
    finish_reason: str | None = None


@dataclass
class Timing:
    """Wall-clock seconds of one generation, prefill and decoding apart. The first token belongs to the prefill."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    token_seconds: list[float] = field(default_factory=list)  # of every token after the first

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over their time."""
        return len(self.token_seconds) / self.decode_seconds if self.decode_seconds else 0.0


class LLM:
    """A bundle ready to generate. Raises BundleError or DeviceError when it cannot run."""

    def __init__(self, bundle: str | Path, *, device: str = "auto", num_threads: int = 0, cap: int | None = None) -> None:
        if device not in DEVICES:
            raise DeviceError(f"device '{device}' is not supported by this version; use one of: {', '.join(DEVICES)}")
        self.stack = OrtStack(Path(bundle), num_threads=num_threads)
        self.engine = Engine(self.stack) if cap is None else Engine(self.stack, cap=cap)
        self.manifest = self.stack.manifest
        try:
            self.tokenizer = Tokenizer.from_file(str(Path(bundle) / self.manifest.tokenizer))
        except Exception as error:  # tokenizers raises plain Exception
            raise BundleError(f"{Path(bundle) / self.manifest.tokenizer} cannot be read: {error}") from None

    def encode(self, text: str) -> list[int]:
        """A prompt's ids; the end token, which stands before every text in training, comes first."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self.manifest.end_id is None else [self.manifest.end_id, *ids]

    def policy(self, options: Options) -> ExitPolicy:
        """The checked policy for this bundle's exits."""
        return ExitPolicy.create(options.policy, options.threshold, len(self.stack.exit_layers))

    def generate(self, prompt: str, options: Options | None = None, timing: Timing | None = None) -> Iterator[TokenEvent]:
        """Continue a prompt, token by token; fills `timing` when given. Raises RequestError before the first token."""
        options, timing = options or Options(), timing or Timing()
        if not prompt:
            raise RequestError("the prompt is empty; give at least one character")
        ids = self.encode(prompt)
        stop_ids = frozenset() if self.manifest.end_id is None else frozenset({self.manifest.end_id})
        sequence = self.engine.start(
            ids,
            max_new_tokens=options.max_tokens,
            policy=self.policy(options),
            catch_up=options.catch_up,
            sampler=options.sampler(),
            stop_ids=stop_ids,
        )
        timing.num_prompt_tokens = len(ids)
        stream, last = DecodeStream(ids=ids, skip_special_tokens=True), time.perf_counter()
        for token in self.engine.generate(sequence):
            now = time.perf_counter()
            if timing.num_tokens == 0:
                timing.prefill_seconds = now - last
            else:
                timing.token_seconds.append(now - last)
                timing.decode_seconds += now - last
            timing.num_tokens += 1
            text = stream.step(self.tokenizer, token.id) or ""
            yield TokenEvent(token.id, text, token.depth, token.confidence, token.logprob, sequence.finish_reason)
            last = time.perf_counter()
