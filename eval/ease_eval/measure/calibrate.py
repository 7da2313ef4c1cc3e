"""Thresholds that hold a tolerance with a guarantee: Learn then Test over exit policies.

The risk of a threshold vector is the mean over documents of how much an early-exit model differs from full
depth: the share of tokens that it says differently, or how much less likely it makes the text (nats a token,
each token's clipped to [0, 1]). Candidates are ordered from careful to eager before the test documents are
seen: on the fit documents, candidate r gives each exit the lowest threshold above which the tokens that would
leave have a mean risk of at most r. On the test documents each candidate's null hypothesis "its risk is above
delta" is tested in that order at level epsilon, and the first that is not rejected ends the walk. The last
rejected candidate's true risk is at most delta with probability 1 - epsilon over the draw of the test
documents (Angelopoulos et al. 2021, arXiv 2110.01052, fixed-sequence testing, for CALM by Schuster et al.
2022, arXiv 2207.07061). P-values are Hoeffding-Bentkus and count documents, which are independent; tokens are
not.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ease_common.errors import RequestError, did_you_mean
from ease_common.files import write_whole
from ease_common.progress import Each, silently
from ease_eval.measure.perplexity import Scores, record_exits, score_documents
from ease_eval.results import as_json
from ease_runtime.bundle.manifest import MANIFEST_FILE
from ease_runtime.engine.engine import Engine
from ease_runtime.policies import FULL_DEPTH, ThresholdPolicy, make_policy
from ease_runtime.policies.thresholds import Thresholds

RISKS = ("disagreement", "loss")
LEVELS = tuple(step / 10 for step in range(1, 31))  # candidate risks on the fit documents, in shares of delta
FIT_SHARE = 1 / 3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """A threshold vector and what the test documents say of it."""

    thresholds: Thresholds
    risk: float
    p_value: float
    mean_depth: float


@dataclass(frozen=True)
class Certificate:
    """What a calibration promises and from what: `thresholds` null when not even the most careful candidate
    passed.
    """

    policy: str
    catch_up: str
    thresholds: Thresholds | None
    risk: str
    delta: float
    epsilon: float
    data: str
    split: str
    seed: int
    num_fit_documents: int
    num_test_documents: int
    tokens_per_document: int
    tested: list[Candidate]
    data_sha256: str = ""  # of the split's documents, where it is known


def hoeffding_bentkus(risk: float, num_documents: int, delta: float) -> float:
    """P-value of "the true risk is above delta", for risks in [0, 1] with this mean over independent
    documents.

    The smaller of Hoeffding's exp(-n h1(min(risk, delta), delta)), h1 the Bernoulli relative entropy, and
    Bentkus' e times the binomial tail P(Bin(n, delta) <= ceil(n risk)) (Bates et al. 2021, arXiv 2101.02703,
    theorem 4).
    """
    below = min(risk, delta)
    entropy = below * math.log(below / delta) if below > 0 else 0.0
    entropy += (1.0 - below) * math.log((1.0 - below) / (1.0 - delta)) if below < 1 else 0.0
    hoeffding = math.exp(-num_documents * entropy)
    bentkus = math.e * binomial_tail(math.ceil(num_documents * risk - 1e-9), num_documents, delta)
    return min(1.0, hoeffding, bentkus)


def binomial_tail(count: int, trials: int, chance: float) -> float:
    """P(Bin(trials, chance) <= count)."""
    terms = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(chance)
        + (trials - k) * math.log1p(-chance)
        for k in range(min(count, trials) + 1)
    ]
    return min(1.0, sum(math.exp(term) for term in terms))


def walk(risks: Sequence[Floats], delta: float, epsilon: float) -> tuple[int, list[float]]:
    """Fixed-sequence testing of candidates in order, each with its risk by document.

    Shape: risks (documents) each.

    Returns how many candidates are certified, and the p-values computed (one more than that, when one
    failed).
    """
    p_values: list[float] = []
    for risk in risks:
        p_values.append(hoeffding_bentkus(float(risk.mean()), len(risk), delta))
        if p_values[-1] > epsilon:
            return len(p_values) - 1, p_values
    return len(p_values), p_values


def lowest_threshold(confidence: Floats, harm: Floats, level: float) -> float | None:
    """The lowest threshold such that the tokens at or above it have a mean harm of at most `level`; None when
    there is none.

    Shape: both (tokens).
    """
    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    mean = np.cumsum(harm[order]) / np.arange(1, len(harm) + 1)
    last_of_its_value = np.append(
        confidence[1:] != confidence[:-1], True
    )  # a threshold takes all tokens of a confidence or none
    fine = np.flatnonzero(last_of_its_value & (mean <= level))
    return float(confidence[fine[-1]]) if len(fine) else None


def candidates(confidences: Floats, harms: Floats, delta: float) -> list[Thresholds]:
    """Threshold vectors from careful to eager, each no higher than the one before.

    Shapes: (early exits, tokens).
    """
    vectors: list[Thresholds] = []
    lowest: list[float | None] = [None] * len(confidences)
    for share in LEVELS:
        for k, (confidence, harm) in enumerate(zip(confidences, harms, strict=True)):
            found = lowest_threshold(confidence, harm, share * delta)
            before = lowest[k]
            lowest[k] = before if found is None else found if before is None else min(found, before)
        if any(value is not None for value in lowest) and (
            not vectors or Thresholds(tuple(lowest)) != vectors[-1]
        ):
            vectors.append(Thresholds(tuple(lowest)))
    return vectors


def harm(scores: Scores, off: Scores, risk: str) -> Floats:
    """What leaving early does to each token, in [0, 1]: it is said differently, or less likely by so many
    nats. Shape: (tokens).
    """
    if risk == "disagreement":
        differs: Floats = (scores.says != off.says).astype(np.float64)
        return differs
    lost: Floats = np.clip(off.logprobs - scores.logprobs, 0.0, 1.0)
    return lost


def calibrate(
    engine: Engine,
    documents: Sequence[Sequence[int]],
    *,
    policy: str | type[ThresholdPolicy] | ThresholdPolicy,
    catch_up: str,
    risk: str,
    delta: float,
    epsilon: float,
    data: str,
    split: str,
    seed: int = 0,
    each: Each = silently,
) -> Certificate:
    """Fit candidates on a third of the documents (ids), test them on the others.

    Raises RequestError for bad values.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0.0 < value < 1.0:
            raise RequestError(f"{name} {value} is outside (0, 1)")
    if risk not in RISKS:
        raise RequestError(f"unknown risk '{risk}'; {did_you_mean(risk, RISKS)}")
    if catch_up == "verify":
        raise RequestError("catch-up 'verify' says what full depth says: it needs no calibration")
    layers = engine.stack.exit_layers
    if len(layers) == 1:
        raise RequestError("this bundle has no early exit: there is nothing to calibrate")
    if len(documents) < 6:
        raise RequestError(
            f"only {len(documents)} documents; calibration needs at least 6, and a small delta many more"
        )
    everything = make_policy(policy, 1.0, layers)
    engine.check(everything, catch_up)
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    num_fit = max(2, round(FIT_SHARE * len(documents)))
    fit = [documents[i] for i in order[:num_fit]]
    test = [documents[i] for i in order[num_fit:]]
    confidences, exits, off = record_exits(engine, fit, everything)
    vectors = candidates(confidences, np.array([harm(scores, off, risk) for scores in exits]), delta)
    policies = [FULL_DEPTH, *(make_policy(policy, vector, layers) for vector in vectors)]
    by_document = [
        score_documents(engine, [ids], policies, catch_up) for ids in each("documents tested", test)
    ]
    risks = [np.array([harm(s[i], s[0], risk).mean() for s in by_document]) for i in range(1, len(policies))]
    depths = [
        float(np.concatenate([s[i].depths for s in by_document]).mean()) for i in range(1, len(policies))
    ]
    certified, p_values = walk(risks, delta, epsilon)
    tested = [Candidate(vectors[i], float(risks[i].mean()), p, depths[i]) for i, p in enumerate(p_values)]
    return Certificate(
        policy=everything.name,
        catch_up=catch_up,
        thresholds=vectors[certified - 1] if certified else None,
        risk=risk,
        delta=delta,
        epsilon=epsilon,
        data=data,
        split=split,
        seed=seed,
        num_fit_documents=len(fit),
        num_test_documents=len(test),
        tokens_per_document=max(map(len, documents)) - 1,
        tested=tested,
    )


def write_certificate(bundle: Path, certificate: Certificate) -> None:
    """Put a calibration into a bundle's manifest, whole or not at all.

    Raises RequestError when it promises nothing.
    """
    if certificate.thresholds is None:
        raise RequestError(
            f"no threshold holds {certificate.risk} at {certificate.delta} with confidence "
            f"{1 - certificate.epsilon:g} on "
            f"{certificate.num_test_documents} documents; use a larger --delta or --epsilon, or more "
            "documents"
        )
    path = bundle / MANIFEST_FILE
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    values["calibration"] = as_json(certificate)
    write_whole(path, json.dumps(values, indent=2) + "\n")
