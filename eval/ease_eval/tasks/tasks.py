"""Quality tasks through the exit policy: what leaving early does to answers, item by item beside full depth.

    task = read_tasks(Path("arc.jsonl"), 200)
    result = run_task(llm, task, Options(threshold=0.7), Journal(None, {}))

Continuations are scored where their tokens leave, with the K/V that the catch-up leaves behind; answers are
generated the same way. Nothing is scored at full depth but the column that says so. Intervals are 95 %,
bootstrap over items.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError
from ease_eval.journal import Journal
from ease_eval.measure.perplexity import Scores, check_scorable
from ease_eval.tasks.grading import FIRST_LINE, STRICT, is_right
from ease_eval.tasks.likelihood import NoTokensError, encode_pair, score_continuation
from ease_eval.tasks.task_files import ExactMatch, Item, LastWord, MultipleChoice, TaskFile, examples
from ease_runtime.llm import LLM
from ease_runtime.options import Options
from ease_runtime.policies import FULL_DEPTH, ExitPolicy

DRAWS = 1000
SEED = 0  # of the bootstrap
QUESTION_STOP = "Question:"  # where a model that goes on by itself asks the next


@dataclass(frozen=True)
class Answer:
    """One item: what was said under the policy and at full depth, and whether it was right."""

    line: int
    said: str
    full_depth_said: str
    correct: bool
    full_depth_correct: bool
    tokens: int  # whose depths count: of the continuations scored, or generated
    layers: int  # that they used, together
    logprob: float | None = None  # of the right continuation, in nats
    full_depth_logprob: float | None = None
    normalised_correct: bool | None = None  # multiple choice: by log-probability a byte
    full_depth_normalised_correct: bool | None = None
    filter: str | None = None  # exact match: what found the answers of `correct` in the texts
    strict_correct: bool | None = None  # exact match of numbers: by lm_eval's strict-match
    full_depth_strict_correct: bool | None = None


@dataclass(frozen=True)
class TaskResult:
    """One file."""

    file: str
    kind: str
    num_items: int
    faults: list[str]
    shots: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    full_depth_accuracy: float
    difference_interval: tuple[float, float]  # of accuracy - full_depth_accuracy, items drawn with both
    agreement: float  # share of the items where the same is said as at full depth
    mean_depth: float
    normalised_accuracy: float | None
    full_depth_normalised_accuracy: float | None
    perplexity: float | None  # last word: of the word
    full_depth_perplexity: float | None
    filters: list[str]  # exact match: which of lm_eval's filters found the answers that `accuracy` counts
    strict_accuracy: float | None  # exact match of numbers: by lm_eval's strict-match
    full_depth_strict_accuracy: float | None
    items: list[Answer]


@dataclass(frozen=True)
class Asking:
    """How a task's items are asked."""

    llm: LLM
    options: Options
    policy: ExitPolicy
    before: str  # solved examples
    chat: bool

    def score(self, item: Item, continuation: str) -> tuple[Scores, Scores]:
        """A continuation's scores under the policy and at full depth."""
        context, ids = encode_pair(self.llm, self.before + item.context, continuation)
        early, full = score_continuation(
            self.llm.engine, context, ids, [self.policy, FULL_DEPTH], self.options.catch_up
        )
        return early, full

    def generate(self, item: Item, options: Options) -> tuple[str, list[int]]:
        """The text that answers an item, and its tokens' depths."""
        limit = self.llm.stack.max_positions - options.max_tokens
        text = self.before + item.context
        prompt = (
            self.llm.encode_chat([{"role": "user", "content": text}]) if self.chat else self.llm.encode(text)
        )
        events = list(self.llm.generate(prompt[-limit:], options))
        return "".join(event.text for event in events), [event.depth for event in events]


def run_task(
    llm: LLM, task: TaskFile, options: Options, journal: Journal, shots: int = 0, chat: bool = False
) -> TaskResult:
    """Ask every item of a file.

    Raises RequestError for options that this bundle cannot run, or that say nothing of given texts.
    """
    options = llm.prepare(options)
    policy = llm.policy(options)
    llm.check(options)
    before, items = examples(task.items, shots)
    if isinstance(items[0], ExactMatch):
        if options.max_tokens < 1:
            raise RequestError(f"max_tokens {options.max_tokens} is below 1")
        if options.max_tokens >= llm.stack.max_positions:
            raise RequestError(
                f"max_tokens {options.max_tokens} leaves no room for a question in this model's context "
                f"of {llm.stack.max_positions}"
            )
        if not options.stop and not chat:
            options = replace(options, stop=(QUESTION_STOP,))
    else:
        check_scorable(llm.engine, [policy], options.catch_up)
    asking = Asking(llm, options, policy, before, chat)
    said = hashlib.sha256(repr(task.items).encode()).hexdigest()[
        :16
    ]  # answers to a file that has changed since are asked for anew
    answers = []
    faults = list(task.faults)
    for item in journal.each(f"items of {task.path.name} answered", items):
        try:
            answers.append(Answer(**journal.once(f"{task.path}:{item.line}:{said}", _asker(asking, item))))
        except NoTokensError as error:
            faults.append(f"{task.path}:{item.line}: {error}")
    if not answers:
        raise RequestError(f"{faults[-1]}; no other line is good either")
    return summarise(replace(task, faults=tuple(faults)), answers, shots)


def _asker(asking: Asking, item: Item) -> Callable[[], dict[str, Any]]:
    return lambda: asdict(ask(asking, item))


def ask(asking: Asking, item: Item) -> Answer:
    """One item's answer."""
    if isinstance(item, MultipleChoice):
        return ask_choice(asking, item)
    return ask_last_word(asking, item) if isinstance(item, LastWord) else ask_exact(asking, item)


def ask_choice(asking: Asking, item: MultipleChoice) -> Answer:
    """Every choice is scored after the context; the likeliest is what is said."""
    scores = [asking.score(item, f" {choice}") for choice in item.choices]
    sums = np.array([[float(one.logprobs.sum()) for one in pair] for pair in scores]).T  # (2, choices)
    normalised = (sums / [len(choice.encode()) for choice in item.choices]).argmax(axis=1) == item.answer
    best = sums.argmax(axis=1)
    depths = np.concatenate([early.depths for early, _ in scores])
    return Answer(
        line=item.line,
        said=item.choices[best[0]],
        full_depth_said=item.choices[best[1]],
        correct=bool(best[0] == item.answer),
        full_depth_correct=bool(best[1] == item.answer),
        tokens=len(depths),
        layers=int(depths.sum()),
        logprob=float(sums[0, item.answer]),
        full_depth_logprob=float(sums[1, item.answer]),
        normalised_correct=bool(normalised[0]),
        full_depth_normalised_correct=bool(normalised[1]),
    )


def ask_last_word(asking: Asking, item: LastWord) -> Answer:
    """The word is right where each of its tokens is the most probable one; what is said are the most probable
    tokens.
    """
    _, ids = encode_pair(asking.llm, asking.before + item.context, f" {item.word}")
    early, full = asking.score(item, f" {item.word}")
    return Answer(
        line=item.line,
        said=asking.llm.tokenizer.decode(early.says.tolist()),
        full_depth_said=asking.llm.tokenizer.decode(full.says.tolist()),
        correct=early.says.tolist() == ids,
        full_depth_correct=full.says.tolist() == ids,
        tokens=len(ids),
        layers=int(early.depths.sum()),
        logprob=float(early.logprobs.sum()),
        full_depth_logprob=float(full.logprobs.sum()),
    )


def ask_exact(asking: Asking, item: ExactMatch) -> Answer:
    """An answer is generated with the same sampling under the policy and at full depth."""
    said, depths = asking.generate(item, asking.options)
    full, _ = asking.generate(item, asking.options.at_full_depth())
    return Answer(
        line=item.line,
        said=said,
        full_depth_said=full,
        correct=is_right(said, item.answer, item.filter),
        full_depth_correct=is_right(full, item.answer, item.filter),
        tokens=len(depths),
        layers=sum(depths),
        filter=item.filter,
        strict_correct=None if item.filter == FIRST_LINE else is_right(said, item.answer, STRICT),
        full_depth_strict_correct=None if item.filter == FIRST_LINE else is_right(full, item.answer, STRICT),
    )


def summarise(task: TaskFile, answers: Sequence[Answer], shots: int) -> TaskResult:
    """A file's figures from its items'."""
    correct, full = (
        np.array([getattr(a, name) for a in answers], np.float64)
        for name in ("correct", "full_depth_correct")
    )
    tokens = sum(a.tokens for a in answers)
    word = task.kind == LastWord.kind
    return TaskResult(
        file=str(task.path),
        kind=task.kind,
        num_items=len(answers),
        faults=list(task.faults),
        shots=shots,
        accuracy=float(correct.mean()),
        accuracy_interval=interval(correct),
        full_depth_accuracy=float(full.mean()),
        difference_interval=interval(correct - full),
        agreement=float(np.mean([a.said == a.full_depth_said for a in answers])),
        mean_depth=sum(a.layers for a in answers) / max(1, tokens),
        normalised_accuracy=_mean([a.normalised_correct for a in answers]),
        full_depth_normalised_accuracy=_mean([a.full_depth_normalised_correct for a in answers]),
        perplexity=_perplexity([a.logprob for a in answers], tokens) if word else None,
        full_depth_perplexity=_perplexity([a.full_depth_logprob for a in answers], tokens) if word else None,
        filters=sorted({a.filter for a in answers if a.filter}),
        strict_accuracy=_mean([a.strict_correct for a in answers]),
        full_depth_strict_accuracy=_mean([a.full_depth_strict_correct for a in answers]),
        items=list(answers),
    )


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean. Shape: (items)."""
    drawn = np.random.default_rng(SEED).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5)).tolist()
    return low, high


def _mean(values: Sequence[bool | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None


def _perplexity(logprobs: Sequence[float | None], tokens: int) -> float:
    return float(np.exp(-sum(value for value in logprobs if value is not None) / tokens))
