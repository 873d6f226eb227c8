"""The search for a merge's scale finds the best one and tries no more than it must."""

import pytest

from moa.evaluation import scale


@pytest.mark.parametrize(
    ("best", "tried"),
    [(2.0, [1.0, 1.5, 2.0, 3.0]), (1.0, [0.5, 1.0, 1.5]), (0.25, [0.25, 0.5, 1.0, 1.5]), (3.0, [1.0, 1.5, 2.0, 3.0])],
)
def test_the_search_walks_towards_the_lowest_likelihood(monkeypatch, best, tried):
    monkeypatch.setattr(scale, "_nll", lambda model, tokenizer, adapter, examples, at: abs(at - best) + len(examples))
    found, seen = scale.choose_scale(None, None, "merged", [[1], [1, 2]], [3.0, 0.25, 0.5, 1.0, 1.5, 2.0])
    assert found == best
    assert list(seen) == tried
    assert seen[best] == pytest.approx(1.5)  # the mean over tasks


def test_a_single_scale_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(scale, "_nll", lambda *args: 1.0)
    assert scale.choose_scale(None, None, "merged", [[1]], [2.0])[0] == 2.0
