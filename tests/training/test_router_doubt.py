import pytest
import torch
from torch.nn import functional as F

from moa.config import RouterConfig
from moa.router import SequenceRouter
from moa.strangeness import fit_mahalanobis, looks_plain, strangeness
from moa.training.router_doubt import with_doubt
from moa.training.router_options import RouterChoices

PROMPTS, RATE = 8000, 0.02


def prompts(seed, count=PROMPTS):
    """Features of two experts' rows with their templates, then without, where they differ far more from each other."""
    torch.manual_seed(seed)
    rows = count // 2
    labels, plain = torch.arange(rows).repeat(2) % 2, torch.arange(count) >= rows
    noise = torch.randn(rows, 8) * torch.distributions.StudentT(2.0).sample((rows, 1)).abs()
    means = F.one_hot(labels + 2 * plain, 8) * 6.0
    return means + torch.cat([0.3 * noise, noise]), labels, plain


@pytest.fixture(scope="module")
def router():
    seen, labels, plain = prompts(0)
    router = SequenceRouter(8, 2, head="centroid")
    router.standardise(seen)
    router.fit_centroids(seen, F.one_hot(labels, 2).float())
    router.detector = fit_mahalanobis(router.standardised(seen), labels, 2, plain)
    return router


def limits_from(router, held_out, labels, _plain):
    choices = RouterChoices(ood="both", ood_rate=RATE)
    return with_doubt(router, RouterConfig(), held_out, F.one_hot(labels, 2).float(), labels, choices)[0].abstention


@torch.no_grad()
def strange(router, limits, new):
    return (strangeness(router, limits, new, router(new)) > limits.merged_above).float()


@pytest.mark.parametrize("form", ["with", "without"])
def test_prompts_that_look_as_if_with_and_without_templates_fall_back_about_equally_often(router, form):
    limits, (new, _, _) = limits_from(router, *prompts(1)), prompts(2)
    with torch.no_grad():
        plain = looks_plain(router.detector.by_form(router.standardised(new)))
    share = strange(router, limits, new)[plain if form == "without" else ~plain].mean()
    assert RATE / 2 < share < 1.2 * RATE


@pytest.mark.parametrize("held_out", [24, 48, 98, 200, 400])
def test_no_more_own_prompts_fall_back_than_promised_however_few_were_held_out(router, held_out):
    new, _, _ = prompts(2)
    drawn = [limits_from(router, *prompts(seed, held_out)) for seed in range(3, 103)]
    rate = max(RATE, 2 * 2 / (held_out + 2))  # of either score, and of prompts that come of half as many rows
    assert [limits.rate for limits in drawn] == pytest.approx([rate] * len(drawn))
    shares = torch.stack([strange(router, limits, new).mean() for limits in drawn])
    assert shares.mean() - 2 * shares.std() / len(shares) ** 0.5 < rate
