"""What passes cost by their tokens and the length of the cache, learnt while decoding.

The table of `Costs` is where it starts: made once, in a quiet moment, at one length, and without the engine's
own share. What passes really take is divided by it. For each segment and power of two of the length there is
a mean of these ratios for each number of tokens, and a line through all of them for numbers that were seldom
seen; what is long ago counts less.
"""

from dataclasses import dataclass, field, replace

from ease_runtime.engine.costs import CACHE_LENGTH, Costs

DECAY = 0.98  # of what is known, a pass
STEADY = 4.0  # passes that a line speaks for, and among those of a line the same ratio at any number
FURTHEST = 2.0  # a pass counts at most this factor beside what was expected, whatever else the machine did
GUESS = 0.25  # of a pass, what a token more costs where nothing was measured


@dataclass
class Ratios:
    """A ratio by the number of tokens: means, drawn towards a line that is fitted by least squares."""

    weight: float = 0.0
    tokens: float = 1.0  # mean
    ratio: float = 1.0  # mean
    variance: float = 0.0  # of the tokens
    covariance: float = 0.0
    means: dict[int, tuple[float, float]] = field(default_factory=dict)  # weight and mean, by tokens

    def at(self, num_tokens: int) -> float:
        """The expected ratio."""
        slope = self.covariance / (self.variance + STEADY / max(self.weight, 1.0))
        line = max(self.ratio + slope * (num_tokens - self.tokens), 0.1 * self.ratio)
        weight, mean = self.means.get(num_tokens, (0.0, 0.0))
        return (weight * mean + STEADY * line) / (weight + STEADY)

    def note(self, num_tokens: int, ratio: float) -> None:
        """Take in one pass."""
        expected = self.at(num_tokens)
        if self.weight:
            ratio = min(max(ratio, expected / FURTHEST), expected * FURTHEST)
        self.weight = DECAY * self.weight + 1.0
        share = 1.0 / self.weight
        aside = num_tokens - self.tokens
        above = ratio - self.ratio
        self.tokens += share * aside
        self.ratio += share * above
        self.variance = (1.0 - share) * (self.variance + share * aside * aside)
        self.covariance = (1.0 - share) * (self.covariance + share * aside * above)
        weight, mean = self.means.get(num_tokens, (0.0, 0.0))
        weight = DECAY * weight + 1.0
        self.means[num_tokens] = (weight, mean + (ratio - mean) / weight)

    def start(self) -> "Ratios":
        """Where another length starts from: the same, less surely."""
        means = {count: (min(weight, STEADY), mean) for count, (weight, mean) in self.means.items()}
        return replace(self, weight=min(self.weight, STEADY), means=means)


class PassCosts:
    """Seconds of passes at full depth, by tokens, rows and cache length.

    Without `costs` a token more is guessed to cost a quarter of a pass until passes were seen.
    """

    def __init__(self, num_segments: int, costs: Costs | None) -> None:
        self.num_segments = num_segments
        self.costs = costs
        self.ratios: dict[tuple[int, int], Ratios] = {}
        self.newest: dict[int, Ratios] = {}  # of each segment
        self.tables: dict[tuple[int, int], float] = {}  # of one row, by segment and tokens

    def note(self, segment: int, num_tokens: int, num_rows: int, length: int, seconds: float) -> None:
        """A pass through a segment took so long."""
        ratios = self._ratios(segment, length)
        ratios.note(num_tokens, seconds / self._table(segment, num_tokens, num_rows, length))
        self.newest[segment] = ratios

    def curve(self, num_tokens: int, more: int, num_rows: int, length: int) -> list[float]:
        """Seconds through all segments for `num_tokens` tokens, one more, and so on: `more` + 1 numbers."""
        learnt = [self._ratios(segment, length) for segment in range(self.num_segments)]
        found: list[float] = []
        for count in range(num_tokens, num_tokens + more + 1):
            seconds = sum(
                ratios.at(count) * self._table(segment, count, num_rows, length)
                for segment, ratios in enumerate(learnt)
            )
            found.append(max([seconds, *found[-1:]]))  # more tokens take no less time
        return found

    def _ratios(self, segment: int, length: int) -> Ratios:
        key = (segment, (length // CACHE_LENGTH).bit_length())
        if key not in self.ratios:
            known = self.newest.get(segment)
            self.ratios[key] = known.start() if known else Ratios()
        return self.ratios[key]

    def _table(self, segment: int, num_tokens: int, num_rows: int, length: int) -> float:
        """What the table says; a row and a length more cost attention over them."""
        key = (segment, num_tokens)
        if key not in self.tables:
            self.tables[key] = self._one_row(segment, num_tokens)
        seconds = self.tables[key]
        per_slot = self.costs.per_slot.get(segment, 0.0) if self.costs else 0.0
        return max(seconds + per_slot * (num_rows * length / CACHE_LENGTH - 1.0), 0.2 * seconds)

    def _one_row(self, segment: int, num_tokens: int) -> float:
        costs = self.costs
        if costs is None:
            return 1.0 + GUESS * (num_tokens - 1)
        seconds = costs.seconds("segment", segment, num_tokens)
        last = costs.layout[segment].last
        return seconds + (costs.seconds("exit", costs.last_exit, num_tokens) if last else 0.0)
