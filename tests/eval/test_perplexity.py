"""What evaluation says equals what the engine does, and both equal an offline simulation in torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ease_eval.measure.perplexity import Scores, score_documents, windows
from ease_eval.tasks.likelihood import score_continuation
from ease_runtime.engine.engine import Engine
from ease_runtime.engine.sampling import Given
from ease_runtime.ort.stack import OrtStack
from ease_runtime.policies import ExitPolicy, make_policy
from ease_train.model.decoder import Decoder
from ease_train.training.checkpoint import load_checkpoint

THRESHOLDS = (0.3, 0.5, 0.8)
TIE = 1e-5  # a confidence this near its threshold may fall on either side in torch and in ONNX Runtime


@pytest.fixture(scope="module")
def stack(tiny_bundle: Path) -> OrtStack:
    return OrtStack(tiny_bundle)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Decoder:
    return load_checkpoint(tiny_checkpoint).model.eval()


def policy(threshold: float | None, name: str = "max-prob") -> ExitPolicy:
    return make_policy(name, None if threshold is None else [threshold], (2, 4, 6))


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 300, length).tolist()


class Simulation:
    """The offline reference: from whole-text passes in torch, with the rules of the engine written again."""

    def __init__(self, model: Decoder, threshold: float, catch_up: str, num_prompt: int) -> None:
        self.model = model
        self.threshold = threshold
        self.catch_up = catch_up
        self.num_prompt = num_prompt
        self.depths: list[int] = []  # of every token that has been predicted

    def next(self, ids: Sequence[int]) -> tuple[int, int, float]:
        """Token, depth and confidence that follow `ids`."""
        hidden = self.model.embed(torch.tensor([list(ids)]))
        frozen_below = [
            0
        ] * self.num_prompt + self.depths  # the depth at which a position's state froze; 0: never
        for first, last in self.model.config.segments:
            hidden = self.model.run_layers(hidden, first, last, self.active(frozen_below, first, hidden))
            probabilities = self.model.lm_head(self.model.exit_hidden(hidden[0, -1], last)).softmax(-1)
            confidence, token = probabilities.max(-1)
            if last == self.model.config.num_layers or confidence.item() >= np.float32(self.threshold):
                self.depths.append(last)
                return int(token), last, confidence.item()
        raise AssertionError("the last layer is an exit")

    def active(self, frozen_below: list[int], first: int, hidden: Tensor) -> Tensor | None:
        if self.catch_up == "recompute":
            return None
        # The state of position i froze where the token after it was predicted; prompt positions never freeze,
        # the newest is on its way.
        depths = [*frozen_below[1:], 0]
        mask = [depths[i] == 0 or depths[i] >= first or i < self.num_prompt for i in range(hidden.shape[1])]
        return torch.tensor([mask])


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_engine_equals_the_simulation_in_torch(
    stack: OrtStack, model: Decoder, catch_up: str, threshold: float
) -> None:
    prompt = text(12, seed=3)
    num_tokens = 120
    engine = Engine(stack)
    produced = list(
        engine.generate(
            engine.start(prompt, max_new_tokens=num_tokens, policy=policy(threshold), catch_up=catch_up)
        )
    )
    simulation = Simulation(model, threshold, catch_up, len(prompt))
    ids = list(prompt)
    ties = 0
    for token in produced:
        with torch.no_grad():
            expected, depth, confidence = simulation.next(ids)
        if abs(confidence - threshold) < TIE:
            ties += 1  # what follows may differ for that reason alone
            break
        assert (token.id, token.depth) == (expected, depth)
        assert token.confidence == pytest.approx(confidence, abs=1e-4)
        ids.append(expected)
    assert ties == 0, "pick another seed: a tie cut this test short"
    assert len({t.depth for t in produced}) >= 2, (
        "the threshold must separate tokens, or the test shows nothing"
    )


def engine_logprobs(
    stack: OrtStack, ids: list[int], chosen: ExitPolicy, catch_up: str, cap: int
) -> tuple[list[float], list[int]]:
    """Token by token, from a prompt of one token."""
    engine = Engine(stack, cap=cap)
    sequence = engine.start(
        ids[:1], max_new_tokens=len(ids) - 1, policy=chosen, catch_up=catch_up, sampler=Given(ids)
    )
    tokens = list(engine.generate(sequence))
    return [t.logprob for t in tokens], [t.depth for t in tokens]


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
@pytest.mark.parametrize("name", ["max-prob", "margin", "entropy", "similarity", "patience"])
@pytest.mark.parametrize("cap", [5, 1000])
def test_parallel_scores_equal_the_engines(stack: OrtStack, catch_up: str, name: str, cap: int) -> None:
    ids = text(150, seed=5)
    policies = [policy(None), policy(0.0, name), *(policy(t, name) for t in THRESHOLDS), policy(1.0, name)]
    scores = score_documents(Engine(stack), [ids], policies, catch_up)
    for chosen, score in zip(policies, scores, strict=True):
        logprobs, depths = engine_logprobs(stack, ids, chosen, catch_up, cap)
        assert score.depths.tolist() == depths
        np.testing.assert_allclose(score.logprobs, logprobs, rtol=1e-4, atol=1e-4)
        assert score.perplexity == pytest.approx(np.exp(-np.mean(logprobs)), rel=1e-4)
    assert len({tuple(score.depths) for score in scores}) >= (3 if name in ("similarity", "patience") else 4)


def test_off_is_the_plain_model(stack: OrtStack, model: Decoder) -> None:
    ids = text(200, seed=8)
    with torch.no_grad():
        expected = model(torch.tensor([ids[:-1]])).log_softmax(-1)[
            0, torch.arange(199), torch.tensor(ids[1:])
        ]
    for catch_up in ("recompute", "propagate"):
        (score,) = score_documents(Engine(stack), [ids], [policy(None)], catch_up)
        assert set(score.depths) == {6}
        np.testing.assert_allclose(score.logprobs, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_threshold_zero_leaves_every_token_at_the_first_exit(stack: OrtStack) -> None:
    for catch_up in ("recompute", "propagate"):
        (score,) = score_documents(Engine(stack), [text(100)], [policy(0.0)], catch_up)
        assert set(score.depths) == {2}


def test_long_documents_are_scored_once_a_token_with_the_context_of_their_window(
    stack: OrtStack, model: Decoder
) -> None:
    documents = [text(700, seed=1), text(2, seed=2), text(stack.max_positions + 1, seed=3)]
    (score,) = score_documents(Engine(stack), documents, [policy(None)], "recompute")
    assert len(score.logprobs) == 699 + 1 + stack.max_positions
    ids = torch.tensor(documents[0])
    with torch.no_grad():  # the second window: inputs 144..432, of which 288.. are new
        window = model(ids[None, 144:432]).log_softmax(-1)[0]
    expected = window[torch.arange(288), ids[145:433]].numpy()[144:]
    np.testing.assert_allclose(score.logprobs[288:432], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("num_ids", "length", "stride"), [(2, 4, 2), (5, 4, 2), (17, 8, 3), (100, 8, 8), (9, 8, 4), (10, 8, 1)]
)
def test_windows_score_every_target_once(num_ids: int, length: int, stride: int) -> None:
    scored: list[int] = []
    for window in windows(num_ids, length, stride):
        assert 0 < window.stop - window.start <= length
        scored += range(window.start + window.scored_from + 1, window.stop + 1)
    assert scored == list(range(1, num_ids))


def test_an_exit_that_is_off_is_not_asked(stack: OrtStack) -> None:
    """Only the second exit: nobody leaves at the first, no head runs there, and who leaves is decided by the
    second alone.
    """
    chosen = make_policy("max-prob", [None, 0.5], (2, 4, 6))
    ids = text(100, seed=4)
    engine = Engine(stack)
    stack.trace = []
    sequence = engine.start(ids[:1], max_new_tokens=99, policy=chosen, sampler=Given(ids))
    depths = [t.depth for t in engine.generate(sequence)]
    asked = {call.number for call in stack.trace if call.graph == "exit"}
    stack.trace = None
    assert asked == {1, 2}
    assert set(depths) == {4, 6}
    (score,) = score_documents(engine, [ids], [chosen], "recompute")
    assert score.depths.tolist() == depths


@pytest.mark.parametrize("catch_up", ["recompute", "propagate"])
@pytest.mark.parametrize("num_prompt", [1, 2, 40, 89])
def test_scores_after_a_prompt_equal_the_engines(stack: OrtStack, catch_up: str, num_prompt: int) -> None:
    """A prompt's K/V are exact, its last token's prediction follows the policy."""
    ids = text(90, seed=6)
    chosen = [policy(None), policy(0.0), policy(0.5)]
    engine = Engine(stack)
    for one, score in zip(
        chosen, score_continuation(engine, ids[:num_prompt], ids[num_prompt:], chosen, catch_up), strict=True
    ):
        sequence = engine.start(
            ids[:num_prompt],
            max_new_tokens=90 - num_prompt,
            policy=one,
            catch_up=catch_up,
            sampler=Given(ids),
        )
        tokens = list(engine.generate(sequence))
        assert score.depths.tolist() == [t.depth for t in tokens]
        np.testing.assert_allclose(score.logprobs, [t.logprob for t in tokens], rtol=1e-4, atol=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning(stack: OrtStack) -> None:
    engine = Engine(stack)
    ids = text(400, seed=7)
    limit = stack.max_positions
    (whole,) = score_continuation(engine, ids[:390], ids[390:], [policy(0.5)], "propagate")
    (cut,) = score_continuation(engine, ids[400 - limit - 1 : 390], ids[390:], [policy(0.5)], "propagate")
    assert whole.logprobs.tolist() == cut.logprobs.tolist()


def test_a_continuation_longer_than_the_context_is_scored_in_windows(stack: OrtStack) -> None:
    engine = Engine(stack)
    ids = text(400, seed=7)
    (scores,) = score_continuation(engine, ids[:10], ids[10:], [policy(0.5)], "propagate")
    (whole,) = score_documents(engine, [ids], [policy(0.5)], "propagate")
    assert scores.logprobs.tolist() == whole.logprobs.tolist()[9:]
    assert len(scores.logprobs) == 390


def test_a_perplexity_beyond_all_numbers_is_the_largest() -> None:
    """As of an exit whose reduced head knows none of a text's tokens."""
    scores = Scores(np.full(3, -1e4), np.ones(3, np.int64), np.zeros(3, np.int64))
    assert 1e308 < scores.perplexity < np.inf
