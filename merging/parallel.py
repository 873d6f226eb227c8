"""Several layers at the same time: merging one is many small operations, which more threads hardly make faster."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

T = TypeVar("T")

MOST_AT_ONCE = 4
"""Layers, so that what they hold in memory stays small; where there are more threads, each layer has several."""


def layers_at_once() -> int:
    """How many layers are worked on at the same time."""
    return min(torch.get_num_threads(), MOST_AT_ONCE)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch's operations in this thread use so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turn(work: Callable[[str], T], layers: Sequence[str]) -> Iterator[T]:
    """`work(layer)` of each layer, in their order.

    The first one is done alone and in this thread: what it decides for all layers may take long, and Ctrl-C ends it.
    The others are done at the same time. Each has equally many threads, so that results do not depend on the place
    of a layer. What a layer raises is raised in its turn, and those after it are given up.
    """
    threads, workers = torch.get_num_threads(), layers_at_once()
    for layer in layers[:1]:
        with using_threads(threads // workers):
            first = work(layer)
        yield first
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for layer in layers[1:]:
                ahead.append(pool.submit(work, layer))
                if len(ahead) > workers:
                    yield _first(ahead)
            while ahead:
                yield _first(ahead)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _wait_for([future for future in ahead if not future.cancelled()])
            torch.set_num_threads(threads)  # the default of threads to come, which the workers have set too


def _wait_for(futures: Sequence[Future]) -> None:
    """Wait until all are done, however often Ctrl-C is pressed.

    A join of their threads that is interrupted makes Python 3.11 believe that they have ended, and abort at exit.
    """
    while not all(future.done() for future in futures):
        with suppress(KeyboardInterrupt):
            wait(futures)


def _first(ahead: deque[Future[T]]) -> T:
    """The result of the first, which stays among them until it is there."""
    result = ahead[0].result()
    ahead.popleft()
    return result
