"""What is strange to a mixture, and what runs it."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.covariance import LedoitWolf

from moa.config import MoaConfig
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.router_checks import describe_router
from moa.routing import BASE, EXPERT, MERGED, Routing, fall_back
from moa.strangeness import Abstention, energy, fit_mahalanobis, larger, looks_plain

IDS = torch.tensor([[5, 9, 12, 4], [4, 6, 10, 13], [7, 8, 3, 14]])


def some_prompts(prompts, hidden=32, experts=3):
    torch.manual_seed(0)
    labels = torch.arange(prompts) % experts
    spread = torch.randn(hidden, hidden)
    return 2 * torch.randn(experts, hidden)[labels] + torch.randn(prompts, hidden) @ spread, labels


@pytest.mark.parametrize("prompts", [200, 20])
def test_distances_are_those_of_sklearns_covariance(prompts):
    """Also where a hidden state is wider than there are prompts."""
    z, labels = some_prompts(prompts)
    detector = fit_mahalanobis(z, labels, 3)
    means = torch.stack([z[labels == expert].mean(0) for expert in range(3)])
    sklearn = LedoitWolf(assume_centered=True).fit((z - means[labels]).numpy())
    new = 3 * torch.randn(7, 32)
    squared = torch.stack([torch.tensor(sklearn.mahalanobis((new - mean).numpy())) for mean in means], dim=1)
    torch.testing.assert_close(detector.distances(new).double(), squared.double().sqrt(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(detector(new), detector.distances(new).min(dim=1).values)


def test_prompts_without_templates_have_means_of_their_own_about_one_covariance():
    z, labels = some_prompts(60)
    plain = torch.arange(60) >= 30
    z = z + 5 * plain[:, None]
    detector = fit_mahalanobis(z, labels, 3, plain)
    clusters = labels + 3 * plain
    means = torch.stack([z[clusters == cluster].mean(0) for cluster in range(6)])
    sklearn = LedoitWolf(assume_centered=True).fit((z - means[clusters]).numpy())
    squared = torch.stack([torch.tensor(sklearn.mahalanobis((z - mean).numpy())) for mean in means], dim=1)
    by_form = squared.double().sqrt().view(60, 2, 3).transpose(1, 2)
    torch.testing.assert_close(detector.by_form(z).double(), by_form, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(detector.distances(z), detector.by_form(z).amin(dim=-1))
    assert torch.equal(looks_plain(detector.by_form(z)), by_form.amin(dim=1).argmin(dim=-1) == 1)
    assert (looks_plain(detector.by_form(z)) == plain).float().mean() > 0.9


def test_each_prompt_is_compared_with_what_is_typical_of_its_own_form():
    scores = {"mahalanobis": torch.tensor([3.0, 3.0]), "energy": torch.tensor([-4.0, -4.0])}
    typical = {"mahalanobis": [1.0, 2.0, 5.0, 1.0], "energy": [-6.0, 4.0, -6.0, 1.0]}
    assert larger(scores, typical, torch.tensor([False, True])).tolist() == [1.0, 2.0]


def test_what_never_varied_in_training_is_strange_later():
    z, labels = some_prompts(60)
    z[:, 0] = 0
    detector = fit_mahalanobis(z, labels, 3)
    other = z[:1].clone()
    other[0, 0] = 100
    assert detector(other) > 5 * detector(z[:1]) and torch.isfinite(detector(other)).all()


def test_one_prompt_for_each_expert_gives_plain_distances():
    z, labels = some_prompts(3)
    new = torch.randn(4, 32)
    torch.testing.assert_close(fit_mahalanobis(z, labels, 3)(new), torch.cdist(new, z).min(dim=1).values)


def test_energy_is_of_the_uncalibrated_logits():
    logits, temperature = torch.randn(4, 3), torch.tensor(2.5)
    expected = [-2.5 * sum(value.div(2.5).exp() for value in row).log() for row in logits]
    torch.testing.assert_close(energy(logits / temperature, temperature), torch.stack(expected))


@pytest.mark.parametrize(
    "values, said",
    [
        (("entropy", 0.1, 1.0, 2.0), "does not exist"),
        (("energy", 0.0, 1.0, 2.0), "between 0 and 1"),
        (("energy", 1.0, 1.0, 2.0), "between 0 and 1"),
        (("energy", 0.1, 3.0, 2.0), "merged adapter before"),
        (("energy", 0.1, float("nan"), 2.0), "fit the router again"),
    ],
)
def test_impossible_thresholds_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Abstention(*values)


@pytest.mark.parametrize(
    "numbers", [[1.0], [1.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [1.0, float("inf")], [1.0, 1.0, 1.0], []]
)
def test_what_nothing_can_be_compared_with_is_not_typical(numbers):
    with pytest.raises(ValueError, match="what is typical of energy is a median and a reach above it"):
        Abstention("both", 0.1, 1.0, 2.0, {"mahalanobis": [1.0, 2.0], "energy": numbers})


def test_strange_sequences_leave_the_experts():
    routing, strange = Routing(torch.eye(3), torch.eye(3)), torch.tensor([1.0, 2.5, 9.0])
    found = fall_back(routing, strange, 2.0, 5.0, merged=True)
    assert found.weights.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert found.fallback.tolist() == [EXPERT, MERGED, BASE] and found.experts == [0, 1, 2]
    alone = fall_back(routing, strange, 2.0, 5.0, merged=False)
    assert alone.weights.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]] and alone.fallback.tolist() == [0, BASE, BASE]
    own = fall_back(routing, strange, 10.0, 11.0, merged=True)
    assert own.weights.tolist() == torch.eye(3).tolist() and own.fallback.tolist() == [0, 0, 0]


# ---- a mixture that falls back


def doubting(model, limits=None):
    """Give a mixture a router with a detector, whose thresholds put each prompt of IDS on another level."""
    torch.manual_seed(0)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight)
    z = router.standardised(model.features(IDS))
    router.detector = fit_mahalanobis(z[:1] + 0.1 * torch.randn(9, 32), torch.arange(9) % 3, 3)
    first, second, third = router.detector(z).sort().values.tolist()
    limits = limits or Abstention("mahalanobis", 0.1, (first + second) / 2, (second + third) / 2)
    config = describe_router(model, router, model.moa_config.router.layer)
    model.set_router(router, dataclasses.replace(config, abstention=limits))
    return model


@pytest.fixture
def bare(base_folder, adapters):
    return MoaModel.from_adapters(str(base_folder), adapters)


@pytest.fixture
def model(bare):
    bare.set_fallback("svd")
    return doubting(bare)


def logits_of(model, row):
    return model(input_ids=IDS[row : row + 1]).logits


def test_each_prompt_runs_its_expert_or_the_merged_adapter_or_the_base(model):
    routing = model.route(IDS)
    levels = dict(zip(routing.fallback.tolist(), range(3), strict=True))
    assert set(levels) == {EXPERT, MERGED, BASE}
    together = model(input_ids=IDS).logits
    assert model.last_routing.fallback.tolist() == routing.fallback.tolist()
    with model.using(model.experts[routing.experts[levels[EXPERT]]]):
        torch.testing.assert_close(together[levels[EXPERT]], logits_of(model, levels[EXPERT])[0])
    with model.using("default"):
        torch.testing.assert_close(together[levels[MERGED]], logits_of(model, levels[MERGED])[0])
    with model.using_base():
        torch.testing.assert_close(together[levels[BASE]], logits_of(model, levels[BASE])[0])


def test_both_scores_are_compared_by_what_is_typical_and_the_larger_counts(bare):
    typical = {"mahalanobis": [3.0, 2.0], "energy": [-1.0, 0.5]}
    model = doubting(bare, Abstention("both", 0.1, 0.0, 1.0, typical))
    router, pooled = model.moa_router, model.features(IDS)
    distances = router.detector(router.standardised(pooled)).numpy()
    energies = -logsumexp((router.temperature * router(pooled)).numpy(), axis=1)  # at a temperature of 1
    expected = np.maximum((distances - 3) / 2, (energies + 1) / 0.5)
    with pytest.warns(UserWarning, match="no merged adapter"):
        found = model.route(IDS).strangeness.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_both_scores_without_what_is_typical_of_them_are_refused():
    with pytest.raises(ValueError, match="what is typical of mahalanobis and energy, got nothing"):
        Abstention("both", 0.1, 0.0, 1.0)


def test_generation_falls_back_prompt_by_prompt(model):
    together = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    for row, level in enumerate(model.route(IDS).fallback.tolist()):
        alone = {MERGED: lambda: model.using("default"), BASE: model.using_base}.get(
            level, lambda row=row: model.using(model.experts[model.route(IDS).experts[row]])
        )
        with alone():
            prompt = IDS[row : row + 1]
            own = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        assert together[row, : own.shape[1]].tolist() == own[0].tolist()


def test_it_can_be_turned_off(model):
    routing = model.route(IDS, abstain=False)
    assert routing.fallback is None and routing.strangeness is None
    assert (routing.weights.sum(dim=-1) == 1).all() and routing.weights.shape == (3, 3)
    model.moa_config.router.abstention = None
    torch.testing.assert_close(model.route(IDS).weights, routing.weights)


def test_a_mixture_in_training_teaches_its_experts_with_every_prompt(model):
    model.train()
    assert model.route(IDS).fallback is None


def test_gradients_reach_the_router_of_what_did_not_fall_back(model):
    model.moa_router.requires_grad_(True)
    model.route(IDS, routing="soft").weights[:, 0].sum().backward()
    assert model.moa_router.head.weight.grad.abs().sum() > 0


def test_without_a_merged_adapter_the_base_answers_and_it_is_said(bare):
    doubting(bare)
    with pytest.warns(UserWarning, match="set_fallback"):
        found = bare.route(IDS)
    assert sorted(found.fallback.tolist()) == [EXPERT, BASE, BASE] and found.weights.shape == (3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = found.fallback.tolist().index(EXPERT)
        bare.route(IDS[row : row + 1])


def test_energy_needs_no_detector(bare):
    doubting(bare, Abstention("energy", 0.1, -1e9, -1e8))
    bare.moa_router.detector = None
    with pytest.warns(UserWarning):
        assert bare.route(IDS).fallback.tolist() == [BASE] * 3


def test_what_it_doubts_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path / "moa")
    loaded = MoaModel.from_pretrained(None, tmp_path / "moa")
    assert loaded.moa_config.router == model.moa_config.router
    ours, theirs = model.route(IDS), loaded.route(IDS)
    torch.testing.assert_close(ours.strangeness, theirs.strangeness, rtol=0, atol=0)
    assert ours.fallback.tolist() == theirs.fallback.tolist()


def test_a_distance_without_a_detector_is_refused(model):
    config = model.moa_config.router
    with pytest.raises(ValueError, match="fit it again with 'moa fit-router'"):
        model.set_router(SequenceRouter(32, 3), config)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rate": 2.0}, "between 0 and 1"),
        ({"rate": "much"}, "abstention cannot be read"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"score": "entropy"}, "choose one of both, mahalanobis, energy"),
        ({"score": None, "rate": None}, "does not exist"),
        ({"score": "both", "typical": {"mahalanobis": [1.0, 2.0], "energy": "x"}}, "typical of energy"),
        ({"score": "both", "typical": {"mahalanobis": [1.0, 2.0], "energy": 1.0}}, "abstention cannot be read"),
    ],
)
def test_a_saved_file_with_bad_thresholds_is_refused(model, tmp_path, change, said):
    model.save_pretrained(tmp_path / "moa")
    file = tmp_path / "moa" / "moa_config.json"
    read = json.loads(file.read_text())
    read["router"]["abstention"] |= change
    file.write_text(json.dumps(read))
    with pytest.raises(ValueError, match=said):
        MoaConfig.from_json(file)
