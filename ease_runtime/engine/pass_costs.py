"""What passes cost by their tokens and the length of the cache, learnt while decoding.

The table of `Costs` is where it starts: made once, in a quiet moment, at one length, and without the engine's
own share. What passes really take is divided by it, and a line through these ratios, by tokens, is kept for
each segment and power of two of the length; what is long ago counts less.
"""

from dataclasses import dataclass, replace

from ease_runtime.engine.costs import CACHE_LENGTH, Costs

DECAY = 0.98  # of what is known, a pass
STEADY = 4.0  # passes that speak for the same ratio at any number of tokens
FURTHEST = 2.0  # a pass counts at most this factor beside what was expected, whatever else the machine did
GUESS = 0.25  # of a pass, what a token more costs where nothing was measured


@dataclass
class Line:
    """A ratio by the number of tokens: a line through what was seen, fitted by least squares."""

    weight: float = 2.0
    tokens: float = 1.0  # mean
    ratio: float = 1.0  # mean
    variance: float = 0.0  # of the tokens
    covariance: float = 0.0

    def at(self, num_tokens: int) -> float:
        """The expected ratio, never below a tenth of the mean."""
        slope = self.covariance / (self.variance + STEADY / self.weight)
        return max(self.ratio + slope * (num_tokens - self.tokens), 0.1 * self.ratio)

    def note(self, num_tokens: int, ratio: float) -> None:
        """Take in one pass."""
        expected = self.at(num_tokens)
        ratio = min(max(ratio, expected / FURTHEST), expected * FURTHEST)
        self.weight = DECAY * self.weight + 1.0
        share = 1.0 / self.weight
        aside = num_tokens - self.tokens
        above = ratio - self.ratio
        self.tokens += share * aside
        self.ratio += share * above
        self.variance = (1.0 - share) * (self.variance + share * aside * aside)
        self.covariance = (1.0 - share) * (self.covariance + share * aside * above)


class PassCosts:
    """Seconds of passes at full depth, by tokens, rows and cache length.

    Without `costs` a token more is guessed to cost a quarter of a pass until passes were seen.
    """

    def __init__(self, num_segments: int, costs: Costs | None) -> None:
        self.num_segments = num_segments
        self.costs = costs
        self.lines: dict[tuple[int, int], Line] = {}
        self.newest: dict[int, Line] = {}  # of each segment
        self.tables: dict[
            tuple[int, int], float
        ] = {}  # what the table says of one row, by segment and tokens

    def note(self, segment: int, num_tokens: int, num_rows: int, length: int, seconds: float) -> None:
        """A pass through a segment took so long."""
        line = self._line(segment, length)
        line.note(num_tokens, seconds / self._table(segment, num_tokens, num_rows, length))
        self.newest[segment] = line

    def curve(self, num_tokens: int, more: int, num_rows: int, length: int) -> list[float]:
        """Seconds through all segments for `num_tokens` tokens, one more, and so on: `more` + 1 numbers."""
        lines = [self._line(segment, length) for segment in range(self.num_segments)]
        found: list[float] = []
        for count in range(num_tokens, num_tokens + more + 1):
            seconds = sum(
                line.at(count) * self._table(segment, count, num_rows, length)
                for segment, line in enumerate(lines)
            )
            found.append(max([seconds, *found[-1:]]))  # more tokens take no less time
        return found

    def _line(self, segment: int, length: int) -> Line:
        key = (segment, (length // CACHE_LENGTH).bit_length())
        if key not in self.lines:
            known = self.newest.get(segment)
            self.lines[key] = replace(known) if known else Line()
        return self.lines[key]

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
