"""Whether confidence can be believed, against slow and obvious computations, and by simulation."""

import math

import pytest
import torch

from moa.calibration import (
    BINS,
    ConformalSet,
    calibration_error,
    conformal_quantile,
    fit_conformal,
    measure,
    risk_coverage,
)
from moa.routing import route_logits


@pytest.fixture
def judged():
    """Two hundred prompts, many of equal confidence, some of the highest and the lowest."""
    torch.manual_seed(0)
    confidence = (torch.rand(200) * 20).round() / 20
    confidence[:3] = torch.tensor([1.0, 1e-6, 1 / BINS])
    return confidence, torch.rand(200) < confidence


def test_the_calibration_error_is_that_of_a_loop_over_bins(judged):
    confidence, right = judged
    total = 0.0
    for place in range(BINS):
        inside = (confidence.double() > place / BINS) & (confidence.double() <= (place + 1) / BINS)
        if inside.any():
            gap = right[inside].double().mean() - confidence[inside].double().mean()
            total += float(inside.double().mean() * gap.abs())
    assert calibration_error(confidence, right) == pytest.approx(total, abs=1e-3)  # 1/15 itself may fall either side


def test_a_sure_router_that_is_half_wrong_is_off_by_a_half():
    assert calibration_error(torch.ones(4), torch.tensor([True, False, True, False])) == 0.5
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0


def test_the_risk_at_each_coverage_is_the_average_over_orders_of_ties(judged):
    confidence, right = judged
    curves = []
    for seed in range(2000):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
        ranked = order[confidence[order].argsort(descending=True, stable=True)]
        curves.append((~right[ranked]).double().cumsum(0) / torch.arange(1, 201))
    torch.testing.assert_close(risk_coverage(confidence, right), torch.stack(curves).mean(0), atol=0.03, rtol=0)


def test_a_curve_by_hand():
    confidence, right = torch.tensor([0.2, 0.9, 0.6, 0.4]), torch.tensor([False, True, True, False])
    assert risk_coverage(confidence, right).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    found = measure(confidence, right)
    assert found.aurc == pytest.approx((1 / 3 + 1 / 2) / 4) and found.prompts == 4
    assert len(found.risks) == 20 and found.risks[:10] == [0] * 10 and found.risks[-1] == 0.5


def test_the_order_of_prompts_changes_nothing(judged):
    confidence, right = judged
    order = torch.randperm(200)
    assert measure(confidence[order], right[order]).aurc == pytest.approx(measure(confidence, right).aurc)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("prompts", [49, 60, 200])
def test_a_new_prompt_passes_the_quantile_at_most_as_often_as_promised(rate, prompts):
    torch.manual_seed(0)
    passed = []
    for _ in range(2000):
        scores = torch.randn(prompts + 1).exp()
        passed.append(float(scores[-1]) > conformal_quantile(scores[:-1], rate))
    exact = 1 - math.ceil(round((prompts + 1) * (1 - rate), 9)) / (prompts + 1)
    assert exact <= rate + 1e-9
    assert sum(passed) / len(passed) == pytest.approx(exact, abs=4 * (rate / 2000) ** 0.5)


def test_too_few_prompts_promise_nothing():
    assert conformal_quantile(torch.randn(48), 0.02) == math.inf
    assert conformal_quantile(torch.arange(49.0), 0.02) == 48
    assert fit_conformal(torch.full((5, 2), 0.5), torch.zeros(5, dtype=torch.long), 0.95).floor == 0


@pytest.mark.parametrize("coverage", [0.7, 0.9])
def test_conformal_sets_hold_the_right_expert_as_often_as_asked(coverage):
    """Also where the probabilities lie: the logits are three times as sure as they should be."""
    torch.manual_seed(0)
    truth = torch.randn(30_000, 5) * 1.5
    own = torch.distributions.Categorical(logits=truth).sample()
    logits = 3 * truth
    held, sizes = [], []
    for start in range(0, 30_000, 600):
        fit, use = slice(start, start + 100), slice(start + 100, start + 600)
        floor = fit_conformal(logits[fit].softmax(-1), own[fit], coverage).floor
        weights = route_logits(logits[use], "conformal", floor=floor).weights
        held.append((weights.gather(1, own[use, None]) > 0).float().mean())
        sizes.append((weights > 0).sum(dim=-1).float().mean())
        kept = torch.where(weights > 0, logits[use].softmax(-1), 0.0)
        torch.testing.assert_close(weights, kept / kept.sum(dim=-1, keepdim=True))
    assert coverage - 0.01 < torch.stack(held).mean() < coverage + 0.03  # an empty set takes the best one, which adds
    assert torch.stack(sizes).mean() < 4


def test_a_set_is_never_empty():
    weights = route_logits(torch.tensor([[0.0, 0.1, 0.0]]), "conformal", floor=0.9).weights
    assert weights.tolist() == [[0, 1, 0]]


def test_conformal_routing_without_a_set_says_what_to_do():
    with pytest.raises(ValueError, match="fit it again with 'moa fit-router'"):
        route_logits(torch.zeros(1, 2), "conformal")


@pytest.mark.parametrize("values", [(0.0, 0.5), (1.0, 0.5), (0.9, 1.5), (0.9, float("nan"))])
def test_a_set_of_impossible_numbers_is_refused(values):
    with pytest.raises(ValueError, match="conformal set"):
        ConformalSet(*values)
