import pytest
import torch
from torch.nn import functional as F

from moa.config import RouterConfig
from moa.router import SequenceRouter
from moa.strangeness import fit_mahalanobis, looks_plain, strangeness
from moa.training.router_doubt import with_doubt
from moa.training.router_options import RouterChoices

PROMPTS, RATE = 8000, 0.02


def prompts(seed):
    """Features of two experts' prompts, half of them without templates, which differ far more among each other."""
    torch.manual_seed(seed)
    labels, plain = torch.arange(PROMPTS) % 2, torch.arange(PROMPTS) >= PROMPTS // 2
    noise = torch.randn(PROMPTS, 8)
    noise[plain] *= torch.distributions.StudentT(2.0).sample((PROMPTS // 2, 1)).abs()
    means = F.one_hot(labels + 2 * plain, 8) * 6.0
    return means + noise, labels, plain


@pytest.mark.parametrize("form", ["with", "without"])
def test_prompts_that_look_as_if_with_and_without_templates_fall_back_about_equally_often(form):
    seen, labels, plain = prompts(0)
    router = SequenceRouter(8, 2, head="centroid")
    router.standardise(seen)
    router.fit_centroids(seen, F.one_hot(labels, 2).float())
    router.detector = fit_mahalanobis(router.standardised(seen), labels, 2, plain)
    held_out, labels, plain = prompts(1)
    choices = RouterChoices(ood="both", ood_rate=RATE)
    config, _ = with_doubt(router, RouterConfig(), held_out, F.one_hot(labels, 2).float(), labels, choices)
    new, _, _ = prompts(2)
    with torch.no_grad():
        strange = strangeness(router, config.abstention, new, router(new)) > config.abstention.merged_above
        plain = looks_plain(router.detector.by_form(router.standardised(new)))
    share = strange[plain if form == "without" else ~plain].float().mean()
    assert RATE / 2 < share < 2 * RATE
