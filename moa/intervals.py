"""How sure a share is."""

from __future__ import annotations

from typing import TypedDict


class Share(TypedDict):
    """A share of `n`, with the interval that holds the true one in 95 of 100 cases."""

    accuracy: float
    interval: list[float]
    n: int


def share_of(right: int, n: int) -> Share:
    """`right` of `n` with the interval of Wilson (1927), which keeps its promise near 0 and 1 and for few; of none,
    anything from 0 to 1."""
    from scipy.stats import binomtest

    if not n:
        return Share(accuracy=0.0, interval=[0.0, 1.0], n=0)
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return Share(accuracy=right / n, interval=[float(interval.low), float(interval.high)], n=n)
