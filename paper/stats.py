"""Intervals, exact tests, frontiers: the one place for statistics. Values in, values out."""

import math
from collections.abc import Iterable, Sequence

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom, then the normal's.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
LARGEST_LOSS = 709.0                                       # exp() of more is no float


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half-width of the 95 % t-interval, or None for one value)."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, (T95[n - 2] if n - 2 < len(T95) else 1.96) * standard_error(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more values."""
    n, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's score."""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def mcnemar(here: int, there: int) -> float:
    """Exact two-sided p that so uneven a split of the cases in which two results differ is chance."""
    tail = sum(math.comb(here + there, i) for i in range(min(here, there) + 1))
    return min(1.0, 2 * tail / 2**(here + there))


def frontier(points: Iterable[tuple]) -> list[tuple]:
    """The points (cost, loss, ...) that no other beats in both, by cost."""
    best, kept = math.inf, []
    for point in sorted(points, key=lambda point: point[:2]):
        if point[1] < best:
            best = point[1]
            kept.append(point)
    return kept


def perplexity(loss: float) -> float | None:
    """exp of a loss in nats per token, or None where that is no float."""
    return math.exp(loss) if loss <= LARGEST_LOSS else None
