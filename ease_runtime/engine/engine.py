"""The engine: schedule → choose → run → commit, one graph pass a step, over the rows of a batch.

    engine = Engine(stack, num_slots=8)
    policy = make_policy("max-prob", 0.7, stack.exit_layers)
    sequence = engine.start([5, 17, 3], max_new_tokens=50, policy=policy)
    while engine.busy:
        for sequence in engine.step():       # those that got tokens in this pass, or ended
            ...

Here is the queue and the step. Every row has its own depth: `schedule` says what a sequence needs next and
looks at no other, `choose` only picks which of these passes run now, together. So a row's tokens are those it
would have alone. slots.py knows who sits where, runner.py runs (and it alone), commit.py decides. Knows
nothing about text.
"""

import time
from collections.abc import Iterator, Sequence

from ease_common.errors import RequestError, did_you_mean, out_of_memory
from ease_runtime.drafters.protocol import Drafter
from ease_runtime.engine.commit import commit, fail
from ease_runtime.engine.costs import DEFAULT_CAP, Costs, RequestCost
from ease_runtime.engine.drafting import draft, wants_drafts
from ease_runtime.engine.lookups import Lookups
from ease_runtime.engine.pass_costs import PassCosts
from ease_runtime.engine.prefixes import open_prefixes
from ease_runtime.engine.probe import measure_costs
from ease_runtime.engine.runner import Runner
from ease_runtime.engine.sampling import Greedy, Sampler
from ease_runtime.engine.schedule import CHUNK, Batch, choose, near, schedule
from ease_runtime.engine.sequence import Request, Token, TokenSequence
from ease_runtime.ort.stack import Cache, Stack
from ease_runtime.policies import FULL_DEPTH, ExitPolicy

CATCH_UPS = ("propagate", "recompute", "verify")
UP_TO_ROUNDING = (
    "verify holds up to rounding here: passes of several tokens differ from single ones in their last bits"
)
DRAFT_LENGTH = 8  # tokens drafted before full depth is asked


class Engine:
    """Drives sequences over a stack, `num_slots` at a time; the others wait for a slot, first come, first
    served.

    `cap` bounds the pending tokens at a boundary, `chunk` the tokens of prompts in one pass, `draft_length`
    the drafts of `verify`, from exits or text. Once costs are known (`measure`), `verify` drafts as many
    tokens as pays, and none where that is slower; with `adapt` any request that leaving early makes slower
    stays at full depth from then on: its tokens then depend on the machine. Both say so in the request's
    notes. `exact`: as Runner's. `prefix_bytes` of keys and values are kept of texts that have ended, for
    requests that begin as they did (see prefixes.py); none where the stack's cannot be shared. Raises
    RequestError for a number below 1.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        num_slots: int = 1,
        cap: int = DEFAULT_CAP,
        chunk: int = CHUNK,
        draft_length: int = DRAFT_LENGTH,
        adapt: bool = False,
        exact: bool = False,
        prefix_bytes: int = 0,
    ) -> None:
        for name, value in {
            "num_slots": num_slots,
            "cap": cap,
            "chunk": chunk,
            "draft_length": draft_length,
        }.items():
            if value < 1:
                raise RequestError(f"{name} {value} is below 1")
        self.stack = stack
        self.runner = Runner(stack, num_slots, exact)
        self.cap = cap
        self.chunk = chunk
        self.draft_length = draft_length
        self.adapt = adapt
        self.prefixes = open_prefixes(stack, self.runner.cache, prefix_bytes)
        self.waiting: list[TokenSequence] = []
        self.prefill_turn = True
        self.num_rows = 0  # of the last pass
        self.costs: Costs | None = None
        self.pass_costs: PassCosts | None = None

    @property
    def cache(self) -> Cache:
        """The keys and values of all slots."""
        return self.runner.cache

    @property
    def num_slots(self) -> int:
        """Sequences that run together at most."""
        return len(self.runner.slots)

    @property
    def sequences(self) -> list[TokenSequence]:
        """Those that have a slot."""
        return self.runner.slots.sequences

    @property
    def running(self) -> list[TokenSequence]:
        """Those that have a slot and work to do."""
        return self.runner.slots.running

    @property
    def busy(self) -> bool:
        """Whether some sequence has not finished."""
        return bool(self.waiting or self.running)

    def start(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        policy: ExitPolicy | None = None,
        catch_up: str = "recompute",
        sampler: Sampler | None = None,
        drafters: Sequence[Drafter] = (),
        stop_ids: frozenset[int] = frozenset(),
        num_logprobs: int = 0,
        keep: bool = False,
        after: TokenSequence | None = None,
        score_prompt: bool = False,
        sharing: str | None = None,
        notes: Sequence[str] = (),
    ) -> TokenSequence:
        """A new sequence, in the queue for a slot, with what its request should be told (`notes`).

        `drafters` draft from text, which needs the catch-up 'verify'. One of no new tokens ends when its
        prompt has run. With `score_prompt` it has `prompt_scores`. With `sharing`, the name of who asks, it
        begins with what is kept of that one's earlier texts.

        With `keep` its slot stays its own when it has finished, until it is released or another sequence
        comes `after` it, which takes the slot over and runs only what its prompt does not share with it.

        Raises RequestError when the prompt is empty, too long, or has ids outside the vocabulary, or when
        this bundle cannot run the policy or the catch-up.
        """
        limit = self.stack.max_positions
        policy = policy or FULL_DEPTH
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) + min(1, max_new_tokens) > limit:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this model's context of {limit} leaves no room "
                "for an answer"
            )
        self.check_ids(prompt)
        if max_new_tokens < 0:
            raise RequestError(f"max_new_tokens {max_new_tokens} is below 0")
        self.check(policy, catch_up)
        if drafters and catch_up != "verify":
            raise RequestError(
                f"drafts from text are judged by full depth: catch-up '{catch_up}' takes none; use verify"
            )
        max_length = min(limit, len(prompt) + max_new_tokens)
        request = Request(
            max_length, catch_up, sampler or Greedy(), stop_ids, num_logprobs, keep, score_prompt, sharing
        )
        asked = frozenset(k for k in range(self.runner.num_early) if policy.thresholds.at(k) is not None)
        sequence = self.runner.new(prompt, policy, request, asked)
        sequence.drafts.length = self.draft_length if asked else 0
        if drafters:
            sequence.drafts.lookups = Lookups(drafters, self.pass_costs)
        if catch_up == "verify" and not self.stack.exact:
            sequence.notes.append(UP_TO_ROUNDING)
        sequence.notes += notes
        if self.costs and asked and (self.adapt or catch_up == "verify"):
            sequence.decision.request_cost = RequestCost(self.costs, policy, catch_up, self.cap)
            if drafters:
                drafts = sequence.drafts
                drafts.length, drafts.trial = 0, drafts.length
        if after is not None and after.slot is not None:
            blocks = frozenset(k for k, leave in enumerate(self.stack.exits) if leave.block is not None)
            self.runner.slots.take_over(sequence, after, blocks)
        else:
            self.waiting.append(sequence)
        return sequence

    def measure(self) -> None:
        """Measure what passes cost, once, when nothing is running: the passes that are timed run over the
        pool.

        From then on what drafts cost is learnt from every pass; while something runs, from a guess.
        """
        if self.costs is None and not self.sequences:
            self.costs = measure_costs(self.stack)
            self.pass_costs = None
        if self.pass_costs is None:
            self.pass_costs = PassCosts(len(self.stack.layout), self.costs)

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raises RequestError for an id that the model has no row for: not every kernel would refuse it."""
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < self.stack.vocab_size:
            token = next(token for token in tokens if not 0 <= token < self.stack.vocab_size)
            raise RequestError(f"the token id {token} is outside the vocabulary of {self.stack.vocab_size}")

    def check(self, policy: ExitPolicy, catch_up: str) -> None:
        """Raises RequestError for a catch-up that is unknown, or a setting that this bundle cannot run."""
        if catch_up not in CATCH_UPS:
            raise RequestError(f"unknown catch-up '{catch_up}'; {did_you_mean(catch_up, CATCH_UPS)}")
        if not policy.thresholds:
            return
        policy.thresholds.for_exits(self.runner.num_early)
        routed = any(segment.routed for segment in self.stack.layout)
        if routed and catch_up == "propagate":
            raise RequestError("catch-up 'propagate' has no K/V for routed layers; use recompute")
        if routed and policy.asks == "similarity":
            raise RequestError(
                f"policy '{policy.name}' compares the states around a segment, which routed layers cut; "
                "use another policy"
            )
        self.check_asks(policy)

    def check_asks(self, policy: ExitPolicy) -> None:
        """Raises RequestError for a policy that asks what some early exit of this bundle cannot say."""
        for leave in self.stack.exits[:-1]:
            if not leave.can_say(policy.asks):
                raise RequestError(
                    f"policy '{policy.name}' needs a {policy.asks} at every early exit"
                    + (
                        "; train them: ease-train gates CHECKPOINT --out CHECKPOINT2"
                        if policy.asks == "gate"
                        else ""
                    )
                )

    def release(self, sequence: TokenSequence) -> None:
        """Give up a sequence, wherever it is: its slot, or its place in the queue."""
        self.waiting = [other for other in self.waiting if other is not sequence]
        self.runner.release(sequence)

    def end(self, sequence: TokenSequence, reason: str) -> None:
        """End a sequence that runs, for a reason that the engine cannot know."""
        sequence.finish_reason = reason
        if not sequence.request.keep:
            self._keep_prefix(sequence)
            self.release(sequence)

    def generate(self, sequence: TokenSequence) -> Iterator[Token]:
        """Step until a sequence ends, yielding its tokens. Whoever stops reading early ends it."""
        given = 0
        try:
            while True:
                yield from sequence.produced[given:]
                given = len(sequence.produced)
                if sequence.finish_reason is not None:
                    return
                while len(sequence.produced) == given and sequence.finish_reason is None:
                    self.step()
        finally:
            if sequence.finish_reason is None or not sequence.request.keep:
                self.release(sequence)

    def step(self) -> list[TokenSequence]:
        """One pass; the sequences that got tokens in it, or ended."""
        slots = self.runner.slots
        while self.waiting and slots.has_room:
            sequence = self.waiting.pop(0)
            slots.seat(sequence)
            if self.prefixes:
                sequence.num_shared = self.prefixes.load(sequence)
        running = slots.running
        if not running and self.waiting:
            raise RequestError(
                "every slot is kept by a sequence that has ended; release one, or give the model more slots"
            )
        if not running:
            return []
        began = time.perf_counter()
        changed = [
            sequence
            for sequence in running
            if wants_drafts(sequence) and draft(sequence, running, self.draft_length, self.stack.vocab_size)
        ]
        running = slots.running
        if not running:
            return self._release(changed)
        works = [(sequence, schedule(sequence, self.cap, self.chunk)) for sequence in running]
        batch = near(choose(works, self.prefill_turn, self.chunk), self.costs)
        prefilling = batch[0][0].prefilling
        self.prefill_turn = not prefilling
        self.num_rows = len(batch)
        for sequence in running:
            sequence.waited += 1
        try:
            outputs = self.runner.run(batch)
        except Exception as error:  # ONNX Runtime's share no base of their own
            if not out_of_memory(error):
                raise
            return self._release([*changed, *_without_memory(batch, error)])
        for (sequence, work), said in zip(batch, outputs, strict=True):
            sequence.waited = 0
            if prefilling and not sequence.prefilling:
                self._keep_prefix(sequence)
            if commit(sequence, work, said, self.stack.layout, num_running=len(slots.running)):
                changed.append(sequence)
            elif said is not None and sequence.decision.leaving is not None:
                self.runner.hold(sequence, said.exit_index)
        if self.pass_costs and not prefilling and batch[0][1].kind == "segment":
            self._note_costs(self.pass_costs, batch, time.perf_counter() - began)
        return self._release(changed)

    def _keep_prefix(self, sequence: TokenSequence) -> None:
        """Keep a sequence's K/V for others, where that is asked for."""
        if self.prefixes and sequence.error is None:
            self.prefixes.store(sequence)

    def _note_costs(self, pass_costs: PassCosts, batch: Batch, seconds: float) -> None:
        """Learn what a pass took, all of its step."""
        num_tokens = sum(work.stop - work.start for _, work in batch)
        length = max(work.stop for _, work in batch)
        pass_costs.note(batch[0][1].segment, num_tokens, len(batch), length, seconds)

    def _release(self, changed: list[TokenSequence]) -> list[TokenSequence]:
        """Give up those of the sequences that changed that have ended and are not kept."""
        for sequence in changed:
            if sequence.finish_reason is not None and not (sequence.request.keep and sequence.error is None):
                self._keep_prefix(sequence)
                self.release(sequence)
        if any(sequence.error for sequence in changed):
            self.cache.scrub()
        return changed


def _without_memory(batch: Batch, error: Exception) -> list[TokenSequence]:
    """End the longest sequence of a pass that found no memory; the others will run it again. All of them end
    where the layers had run and it was an exit's turn: nobody could go on there.
    """
    longest = max(batch, key=lambda part: part[1].stop)
    undone = all(sequence.counters.done[work.segment] < work.stop for sequence, work in batch)
    ended = [longest[0]] if undone else [sequence for sequence, _ in batch]
    said = " ".join(str(error).split())[:300] or type(error).__name__
    for sequence in ended:
        fail(
            sequence, said if "not enough memory" in said else f"not enough memory for this request ({said})"
        )
    return ended
