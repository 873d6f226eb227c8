"""Consensus and PCB against dense float64 references written from the papers' formulas."""

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import merge, streaming, thresholds

WEIGHTS = [0.7, 0.5, -0.9]


def dense(members, method, weights=WEIGHTS, **options):
    result = merge(members, method, weights=weights, rank="full", dtype=torch.float64, **options)
    return {module: update.delta() for module, update in result.modules.items()}


def stacked(members, module, weights=WEIGHTS):
    """Dense deltas of those that have the layer, and their weights."""
    present = [(a.modules[module].delta(), w) for a, w in zip(members, weights, strict=True) if module in a.modules]
    return torch.stack([d for d, _ in present]), torch.tensor([w for _, w in present])[:, None, None].double()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("block", [streaming.BLOCK_ENTRIES, 60])
def test_consensus_equals_the_dense_rule(k, threshold, block, adapters, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", block)
    for module, matrix in dense(adapters, "consensus", k=k, threshold=threshold).items():
        deltas, w = stacked(adapters, module)
        total = (w * deltas).sum(0)
        active = (w * deltas).abs() >= threshold * (total - w * deltas).abs()
        torch.testing.assert_close(matrix, total * (active.sum(0) >= k), rtol=1e-5, atol=1e-5)


def test_consensus_of_adapters_on_separate_entries_is_nothing_and_the_report_says_so():
    eye = torch.eye(3, dtype=torch.float64)
    members = [Adapter(str(i), None, {"layer": LowRank(eye[:, [i]], eye[[i]])}, torch.float64) for i in range(3)]
    result = merge(members, "consensus")
    assert result.modules["layer"].norm() == 0
    assert result.report.facts["entries_kept"] == 0
    shared = merge([members[0], members[0], members[1]], "consensus")
    assert shared.report.facts["entries_kept"] == pytest.approx(1 / 9)


@pytest.mark.parametrize("k", [0, 4])
def test_a_number_of_adapters_that_cannot_agree_is_refused(k, adapters):
    with pytest.raises(ValueError, match=f"k must be from 1 to their number, 3, got {k}"):
        merge(adapters, "consensus", k=k)


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_a_threshold_that_is_no_ratio_is_refused(threshold, adapters):
    with pytest.raises(ValueError, match="threshold is a ratio of sizes and must be 0 or more"):
        merge(adapters, "consensus", threshold=threshold)


def dense_pcb(deltas, density):
    """PCB_merge of the official repository without its clamp of outliers, on flat vectors."""
    n, d = deltas.shape
    sizes = deltas.abs()
    span = lambda x: (x - x.amin(1, keepdim=True)) / (x.amax(1, keepdim=True) - x.amin(1, keepdim=True))
    score = torch.exp(n * span(sizes) ** 2) * torch.tanh(deltas * deltas.sum(0))
    limit = score.sort(dim=1).values[:, [d - int(density * d)]]
    scale = span(score.clamp(min=limit))
    return scale, (deltas * scale).sum(0) / scale.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize(("block", "sample"), [(streaming.BLOCK_ENTRIES, 10**9), (60, 100)])
def test_pcb_of_equal_weights_equals_the_dense_rule(density, block, sample, adapters, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_ENTRIES", block)
    monkeypatch.setattr("moa.merging.consensus.LAYER_SAMPLE", sample)
    for module, matrix in dense(adapters, "pcb", weights=[2.0, 2.0, 2.0], density=density).items():
        deltas, _ = stacked(adapters, module)
        _, wanted = dense_pcb(deltas.flatten(1), density)
        torch.testing.assert_close(matrix.flatten(), wanted, rtol=1e-4, atol=1e-5)


def test_pcb_counts_an_adapter_of_more_weight_for_more(adapters):
    module = "model.layers.0.self_attn.q_proj"
    weights = [3.0, 1.0, -2.0]
    deltas, w = stacked(adapters, module, weights)
    weighted = (w / 2.0 * deltas).flatten(1)  # mean size 1
    scale, _ = dense_pcb(weighted, 0.3)
    shares = scale * w.abs().flatten(1) / 2.0
    wanted = (scale * weighted).sum(0) / shares.sum(0).clamp(min=1e-12)
    got = dense(adapters, "pcb", weights=weights, density=0.3)[module]
    torch.testing.assert_close(got.flatten(), wanted, rtol=1e-4, atol=1e-5)


def test_pcb_of_constant_updates_is_their_mean_where_the_published_rule_divides_by_zero():
    flat = lambda value: LowRank(torch.full((5, 1), value).double(), torch.ones(1, 7).double())
    members = [Adapter(str(v), None, {"layer": flat(v)}, torch.float64) for v in (1.0, 3.0)]
    merged = merge(members, "pcb", rank="full", density=1.0, dtype=torch.float64).modules["layer"].delta()
    torch.testing.assert_close(merged, torch.full((5, 7), 2.0).double())


def test_many_adapters_do_not_overflow_the_scores():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)
    members = [Adapter(str(i), None, {"layer": LowRank(draw(8, 1), draw(1, 9))}) for i in range(120)]
    assert torch.isfinite(merge(members, "pcb").modules["layer"].delta()).all()


def test_the_limit_of_scores_is_exact_when_it_is_found_from_a_sample(monkeypatch):
    monkeypatch.setattr(thresholds, "DEVIATIONS", 0.05)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    search = thresholds.Search(0, 700, 5000, values[:100].numpy())
    thresholds.settle([search], lambda see: [see("", 0, part.numpy()) for part in values.split(999)])
    assert search.size == float(values.sort(descending=True).values[699])
