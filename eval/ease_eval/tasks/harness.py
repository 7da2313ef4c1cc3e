"""A bundle as a model of EleutherAI's lm-evaluation-harness, every request through the exit policy.

    lm_eval run --model ease --model_args bundle=runs/demo/bundle,threshold=0.7 \\
        --tasks lambada_openai

A harness with plugins finds the model by this package's entry point; for older ones `ease-eval lm-eval run
...` is the same command with the model known to it. Log-likelihoods are of the exits where tokens leave,
after a context whose K/V are exact; generation is the engine's. Under `verify`, and without a threshold, all
is full depth's.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from ease_common.errors import RequestError
from ease_eval.measure.perplexity import Scores, check_scorable, score_documents
from ease_eval.provenance import provenance
from ease_eval.tasks.likelihood import NoTokensError, encode_pair, prefix_id, score_continuation
from ease_runtime.llm import LLM
from ease_runtime.options import SAMPLING, Options
from ease_runtime.policies.thresholds import Thresholds

LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names of one thing, the first counts
OF_TASKS = {  # options of a request that are not this model's to set
    "temperature": "tasks say how they sample; say it with --gen_kwargs do_sample=true,temperature=...",
    "stop": "tasks say where an answer ends; say it with --gen_kwargs until=...",
    "max_tokens": "its name here is max_gen_toks, for where a task says nothing",
    "n": "the harness asks for one answer; it repeats requests by itself",
    "logprobs": "the harness takes no log-probabilities of what is generated",
}
OF_REQUESTS = tuple(name for name in SAMPLING if name not in OF_TASKS and name != "sampler")
UNASKED = "cuda:0"  # the device that the harness's command names when nobody asked for one
logger = logging.getLogger(__name__)


@register_model("ease")
class EaseLM(LM):  # type: ignore[misc]
    """`bundle` is its directory; `threshold` a number, or one an exit; other arguments are fields of Options.
    `policy` may also be an object (docs/contributing/policy.md).

    `batch_size` requests are generated together. Raises an EaseError for a bundle or a setting that cannot
    run.
    """

    def __init__(
        self,
        bundle: str | None = None,
        threshold: float | str | None = None,
        *,
        threads: int = 0,
        device: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        if bundle is None:
            path = options.get("pretrained", "BUNDLE")
            raise RequestError(f"--model_args names no bundle; give bundle={path}")
        num_slots = 1 if batch_size is None or str(batch_size).startswith("auto") else int(str(batch_size))
        if num_slots < 1:
            raise RequestError(f"batch_size {batch_size} is below 1")
        self.llm = LLM(
            bundle,
            num_threads=threads,
            device="auto" if device in (None, UNASKED) else str(device),
            num_slots=num_slots,
        )
        for name in set(options) & OF_TASKS.keys():
            raise RequestError(f"{name} in --model_args has no effect: {OF_TASKS[name]}")
        policy = options.pop("policy", Options.policy)
        own = Options(
            policy=policy if isinstance(policy, str) else Options.policy, sampler=options.pop("sampler", None)
        )
        given = {
            **options,
            "max_tokens": max_gen_toks,
            **({} if threshold is None else {"threshold": read_threshold(threshold)}),
        }
        self.options = Options.from_json(given, own)
        if isinstance(policy, str):
            self.options = self.llm.prepare(self.options)
        self.policy = self.llm.policy(self.options) if isinstance(policy, str) else policy
        self.llm.engine.check(self.policy, self.options.catch_up)
        self.source = provenance(Path(bundle), self.llm, threads)
        self.num_tokens = self.num_layers = self.num_unknown = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether each of its tokens is the most
        probable one.
        """
        check_scorable(self.llm.engine, [self.policy], self.options.catch_up)
        found = []
        for request in requests:
            found.append(self._loglikelihood(*request.args))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    def _loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True  # nothing is certain to follow
        try:
            before, after = encode_pair(self.llm, context, continuation)
        except NoTokensError as error:
            logger.warning("%s; its likelihood is 0", error)
            return -math.inf, False
        self._note_unknown(after)
        (scores,) = score_continuation(self.llm.engine, before, after, [self.policy], self.options.catch_up)
        self._count(scores)
        return float(scores.logprobs.sum()), scores.says.tolist() == after

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in the windows of `ease-eval table`: overlapping by half of the
        context.
        """
        found = []
        for request in requests:
            (text,) = request.args
            ids = self.llm.encode(text)
            first = prefix_id(self.llm)
            ids = ids if ids[:1] == [first] else [first, *ids]
            total = 0.0
            self._note_unknown(ids[1:])
            if len(ids) > 1:
                (scores,) = score_documents(self.llm.engine, [ids], [self.policy], self.options.catch_up)
                self._count(scores)
                total = float(scores.logprobs.sum())
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation, up to a stop string."""
        found: list[str] = []
        together = self.llm.engine.num_slots
        for start in range(0, len(requests), together):
            group = requests[start : start + together]
            texts = self._generate([request.args for request in group])
            for request, text in zip(group, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            found += texts
        return found

    def _generate(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The answers to some requests that run together."""
        generations = []
        texts = {}
        for context, wanted in asked:
            options = self._read(wanted)
            prompt = self.llm.encode(context) or [prefix_id(self.llm)]
            self._note_unknown(prompt)
            generations.append(
                self.llm.submit(
                    prompt[options.max_tokens - self.llm.stack.max_positions :], options, policy=self.policy
                )
            )
            texts[generations[-1].choices[0]] = ""
        while self.llm.busy:
            for choice, events in self.llm.step():
                if choice.error:
                    raise RequestError(choice.error)
                texts[choice] += "".join(event.text for event in events)
                self.num_tokens += len(events)
                self.num_layers += sum(event.depth for event in events)
        return list(texts.values())

    def _read(self, wanted: dict[str, Any]) -> Options:
        """The options that a task's generation arguments make of this model's.

        What cannot be done is warned of.
        """
        known = {"until", "do_sample", "temperature", *LENGTHS, *OF_REQUESTS}
        if unknown := sorted(wanted.keys() - known):
            logger.warning("generation arguments without effect here: %s", ", ".join(unknown))
        until = wanted.get("until") or ()
        values = {name: wanted[name] for name in OF_REQUESTS if wanted.get(name) is not None}
        if wanted.get("do_sample", bool(wanted.get("temperature"))):
            values["temperature"] = wanted.get("temperature", 1.0)
        else:
            values["temperature"] = 0.0
        for name in reversed(LENGTHS):
            if wanted.get(name) is not None:
                values["max_tokens"] = wanted[name]
        options = Options.from_json(
            {**values, "stop": [text for text in ([until] if isinstance(until, str) else until) if text]},
            self.options,
        )
        if options.max_tokens < 1:
            raise RequestError(f"max_gen_toks {options.max_tokens} is below 1")
        room = self.llm.stack.max_positions - 1
        return replace(options, max_tokens=room) if options.max_tokens > room else options

    def _note_unknown(self, ids: Sequence[int]) -> None:
        """Count tokens for characters that the tokenizer does not know, and warn of the first."""
        count = self.llm.count_unknown(ids)
        if count and not self.num_unknown:
            logger.warning(
                "a text has characters that this tokenizer does not know; the results' config counts "
                "their tokens"
            )
        self.num_unknown += count

    def _count(self, scores: Scores) -> None:
        self.num_tokens += len(scores.depths)
        self.num_layers += int(scores.depths.sum())

    def get_model_info(self) -> dict[str, Any]:
        """What stands beside the results: where they come from, and how deep the tokens went."""
        return {
            **self.source,
            "policy": self.policy.name,
            "threshold": self.policy.thresholds.to_json(),
            "catch_up": self.options.catch_up,
            "mean_depth": self.num_layers / self.num_tokens if self.num_tokens else None,
            "unknown_tokens": self.num_unknown,
            "num_layers": self.llm.stack.exit_layers[-1],
        }

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells one tokenizer's cached requests from another's by."""
        return str(self.source["manifest_sha256"])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The bundle's template as text, for the harness's record."""
        return str(self.llm.manifest.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, up to where the answer begins.

        Raises RequestError where the bundle has no template.
        """
        if self.llm.template is None:
            raise RequestError(
                "this bundle has no chat template (a base model); leave --apply_chat_template away"
            )
        if not add_generation_prompt:
            raise RequestError("this model cannot go on with an answer that a task has begun (a gen_prefix)")
        return self.llm.template.render(chat_history)


def read_threshold(value: float | str) -> Thresholds:
    """A threshold of the harness's arguments.

    Those end at a comma, so that a slash may stand for it there. Raises RequestError.
    """
    return Thresholds.of(str(value).replace("/", ","))
