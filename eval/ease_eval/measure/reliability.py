"""Does an exit's confidence mean what it says? Reliability by bins, expected calibration error, temperature
scaling.

Guo et al. 2017 (arXiv 1706.04599): equal-width bins; ECE is the mean distance of confidence and accuracy,
weighted by bin. Accuracy here is agreement with full depth. The temperature scales the confidence's log-odds
and minimises the likelihood's negative logarithm; it is fitted on half of the documents, and both errors are
those of the other half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ease_eval.measure.perplexity import record_exits
from ease_runtime.engine.engine import Engine
from ease_runtime.policies import make_policy

NUM_BINS = 10
TEMPERATURES = np.geomspace(0.1, 10.0, 201)
SMALLEST = 1e-6  # confidences are kept this far from 0 and 1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """One exit. By bin (empty ones left out): mean confidence, share that agrees with full depth, tokens."""

    layer: int
    confidence: list[float]
    agreement: list[float]
    counts: list[int]
    error: float  # expected calibration error
    temperature: float
    scaled_error: float


def measure_reliability(engine: Engine, documents: Sequence[Sequence[int]], policy: str) -> list[Reliability]:
    """Every early exit's, over the first window of each document.

    Raises RequestError where the bundle cannot run the policy.
    """
    layers = engine.stack.exit_layers
    if len(layers) == 1 or len(documents) < 2:
        return []
    everything = make_policy(policy, 1.0, layers)
    engine.check(everything, "recompute")
    fit, test = (record_exits(engine, documents[part::2], everything) for part in (0, 1))
    found = []
    for k, layer in enumerate(layers[:-1]):
        temperature = fit_temperature(fit[0][k], fit[1][k].says == fit[2].says)
        confidence = test[0][k]
        agrees = test[1][k].says == test[2].says
        means, shares, counts = bins(confidence, agrees)
        error, scaled = (
            expected_error(values, agrees) for values in (confidence, scale(confidence, temperature))
        )
        found.append(Reliability(layer, means, shares, counts, error, temperature, scaled))
    return found


def bins(confidence: Floats, agrees: NDArray[np.bool_]) -> tuple[list[float], list[float], list[int]]:
    """Mean confidence, share of agreement and tokens of each bin that has some. Shape: both (tokens)."""
    place = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    used = [number for number in range(NUM_BINS) if (place == number).any()]
    inside = [place == number for number in used]
    return (
        [float(confidence[mask].mean()) for mask in inside],
        [float(agrees[mask].mean()) for mask in inside],
        [int(mask.sum()) for mask in inside],
    )


def expected_error(confidence: Floats, agrees: NDArray[np.bool_]) -> float:
    """ECE: the distance of confidence and agreement, bins weighted by their tokens. Shape: both (tokens)."""
    means, shares, counts = (np.array(values) for values in bins(confidence, agrees))
    return float((counts * np.abs(means - shares)).sum() / counts.sum())


def scale(confidence: Floats, temperature: float) -> Floats:
    """Confidences with their log-odds divided by a temperature. Shape: (tokens) -> (tokens)."""
    kept = np.clip(confidence, SMALLEST, 1.0 - SMALLEST)
    scaled: Floats = 1.0 / (1.0 + np.exp(-np.log(kept / (1.0 - kept)) / temperature))
    return scaled


def fit_temperature(confidence: Floats, agrees: NDArray[np.bool_]) -> float:
    """The temperature under which agreement is likeliest, of a fine grid. Shape: both (tokens)."""
    losses = []
    for temperature in TEMPERATURES:
        scaled = np.clip(scale(confidence, float(temperature)), SMALLEST, 1.0 - SMALLEST)
        losses.append(-np.log(np.where(agrees, scaled, 1.0 - scaled)).mean())
    return float(TEMPERATURES[int(np.argmin(losses))])
