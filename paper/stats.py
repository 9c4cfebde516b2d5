"""Intervals, exact tests, corrections, frontiers: the one place for statistics. Values in, values out."""

import functools
import math
from collections.abc import Iterable, Sequence

LARGEST_LOSS = 709.0                                       # exp() of more is no float


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, half-width of the 95 % t-interval, or None for one value)."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, t95(n - 1) * standard_error(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more values."""
    n, mean = len(values), math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)


def t_tail(t: float, degrees: int) -> float:
    """P(T > t) of Student's t with a whole number of degrees of freedom: the finite series in the angle
    atan(t / sqrt(degrees)) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    even = degrees % 2 == 0
    term = 1.0 if even else cosine
    total = term if even or degrees > 1 else 0.0
    for k in range(2 if even else 3, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = sine * total if even else 2 / math.pi * (angle + sine * total)     # P(|T| < |t|), with the sign of t
    return (1 - inside) / 2


@functools.cache
def t95(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t, where the tail is 0.025: by halves, from the normal's on up."""
    low, high = 1.95, 12.75
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > 0.025 else (low, middle)
    return high


def p_below(differences: Sequence[float], margin: float) -> float | None:
    """One-sided p of the paired t-test that the mean of the differences is below the margin; None for one value."""
    if len(differences) < 2:
        return None
    error, mean = standard_error(differences), math.fsum(differences) / len(differences)
    if error == 0:
        return float(mean >= margin)
    return t_tail((margin - mean) / error, len(differences) - 1)


def p_text(p: float) -> str:
    """p in two digits; the tails above are differences from 1, so that the smallest have none."""
    return f"{p:.2g}" if p >= 1e-9 else "below 1e-9"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: reject where one is at most alpha, and the chance of any false
    rejection stays below alpha."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share, by Wilson's score."""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def mcnemar(first_only: int, second_only: int) -> float:
    """Exact two-sided p that so uneven a split of the cases in which two results differ is chance."""
    differing = first_only + second_only
    tail = sum(math.comb(differing, i) for i in range(min(first_only, second_only) + 1))
    return min(1.0, 2 * tail / 2**differing)


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
