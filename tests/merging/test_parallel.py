"""Layers that are merged at the same time: in their order, each alike, and none left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moa.merging import parallel
from moa.merging.layers import Layers
from moa.merging.parallel import MOST_AT_ONCE, in_turn, layers_at_once, using_threads

NAMES = [f"layer {number}" for number in range(9)]


@pytest.fixture(autouse=True)
def three_threads():
    with using_threads(3):
        yield
        assert torch.get_num_threads() == 3


def test_results_come_in_the_order_of_the_layers_whichever_is_done_first():
    slower_first = {name: 0.02 * (len(NAMES) - place) for place, name in enumerate(NAMES)}
    assert list(in_turn(lambda name: time.sleep(slower_first[name]) or name.upper(), NAMES)) == [
        name.upper() for name in NAMES
    ]


def test_layers_run_at_the_same_time_each_with_its_share_of_the_threads():
    met = threading.Barrier(3, timeout=20)  # passes only when three are there at once
    threads = []

    def work(name):
        threads.append(torch.get_num_threads())
        if name != NAMES[0]:
            met.wait()

    assert len(list(in_turn(work, NAMES[:7]))) == 7
    assert threads == [1] * 7


@pytest.mark.parametrize(("threads", "layers", "each"), [(1, 1, 1), (3, 3, 1), (9, MOST_AT_ONCE, 9 // MOST_AT_ONCE)])
def test_no_more_layers_at_once_than_memory_allows(threads, layers, each):
    with using_threads(threads):
        assert layers_at_once() == layers
        assert set(in_turn(lambda name: torch.get_num_threads(), NAMES)) == {each}


def test_no_layers_are_no_work():
    assert list(in_turn(len, [])) == []


def test_the_first_layer_is_done_in_the_callers_thread_so_that_it_can_be_interrupted():
    threads = list(in_turn(lambda name: threading.get_ident(), NAMES))
    assert threads[0] == threading.get_ident()
    assert threading.get_ident() not in threads[1:]


@pytest.mark.parametrize("failing", [0, 4])
def test_an_error_comes_in_its_layers_turn_and_ends_the_work(failing):
    done = []

    def work(name):
        if name == NAMES[failing]:
            raise ValueError(f"{name} is broken")
        done.append(name)
        return name

    got = []
    with pytest.raises(ValueError, match=f"{NAMES[failing]} is broken"):
        for result in in_turn(work, NAMES):
            got.append(result)
    assert got == NAMES[:failing]
    assert len(done) < len(NAMES) - 1


def test_a_pass_that_is_left_early_starts_no_more_layers():
    started = []
    turns = in_turn(lambda name: started.append(name) or time.sleep(0.01), NAMES)
    next(turns)
    next(turns)
    turns.close()
    assert NAMES[-1] not in started


@pytest.fixture
def interruptible():
    """Ctrl-C also where a shell has started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_layers_at_work_and_starts_no_more(interruptible, monkeypatch):
    started, busy, given_up = [], threading.Barrier(3, timeout=20), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, **how):
            super().shutdown(**how)
            given_up.set()

    def work(name):
        started.append(name)
        if name != NAMES[0]:
            if busy.wait() == 0:
                time.sleep(0.5)  # a signal on the way to a wait is seen after it: let the main thread be there
                os.kill(os.getpid(), signal.SIGINT)
            assert given_up.wait(20)

    monkeypatch.setattr(parallel, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        list(in_turn(work, NAMES))
    assert sorted(started) == NAMES[:4]


def test_what_is_decided_once_for_all_layers_is_decided_once_and_with_all_threads(adapters):
    shapes = dict.fromkeys(NAMES, (24, 24))
    layers = Layers(adapters, torch.ones(3), shapes)
    decided = []

    def decide(layers, number):
        decided.append(torch.get_num_threads())
        time.sleep(0.05)
        return number

    asked = dict(layers.mapped("asking", lambda module, updates: layers.once(decide, module != NAMES[0])))
    assert asked == {name: name != NAMES[0] for name in NAMES}
    assert decided == [3, 3]


def test_a_pass_may_start_within_a_pass(adapters):
    layers = Layers(adapters, torch.ones(3), dict.fromkeys(NAMES, (24, 24)))

    def names(layers):
        return [module for module, _ in layers.mapped("within", lambda module, updates: module)]

    assert dict(layers.mapped("asking", lambda module, updates: layers.once(names))) == dict.fromkeys(NAMES, NAMES)


def test_more_interrupts_leave_no_layer_at_work():
    script = """
import os, signal, threading, time
import torch
from moa.merging.parallel import in_turn

signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(3)
started, ended = [], []

def work(name):
    started.append(name)
    if name == 3:
        for _ in range(3):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
    if name:
        time.sleep(1.5)
    ended.append(name)

try:
    list(in_turn(work, range(9)))
except KeyboardInterrupt:
    print(sorted(started) == sorted(ended) == [0, 1, 2, 3])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
