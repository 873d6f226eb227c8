"""RegMean and Fisher against dense references written from the papers, and the loss that RegMean predicts."""

import pytest
import torch

from moa.low_rank import LowRank, stack
from moa.merging import merge
from moa.merging.activations import fisher, regmean, solve_regmean
from moa.merging.statistics import LayerStatistics

OUT, IN = 14, 20
WEIGHTS = torch.tensor([0.7, -0.5, 0.9], dtype=torch.float64)
EXACT = {"off_diagonal": 1.0, "ridge": 0.0}


def drawn(*size, seed):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def updates():
    return [LowRank(drawn(OUT, r, seed=r), drawn(r, IN, seed=10 + r)) for r in (2, 3, 4)]


@pytest.fixture
def inputs():
    """Tokens of three tasks whose features differ in size and are correlated: 50 x IN each."""
    return [drawn(50, IN, seed=s) * drawn(IN, seed=s + 1).exp() @ drawn(IN, IN, seed=s + 2) for s in (20, 30, 40)]


def known(inputs, fishers=(None, None, None)):
    return [LayerStatistics(x.T @ x / len(x), len(x), phi) for x, phi in zip(inputs, fishers, strict=True)]


def loss(M, updates, weights, inputs):
    """sum_i |w_i| mean ||(M - sign(w_i) delta_i) x||^2, on the inputs themselves."""
    each = zip(updates, weights, inputs, strict=True)
    return sum(w.abs() * ((M - w.sign() * u.delta()) @ x.T).square().sum() / len(x) for u, w, x in each)


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def shrunk(G, alpha):
    return alpha * G + (1 - alpha) * torch.diag(G.diagonal())


@pytest.mark.parametrize("alpha", [1.0, 0.9, 0.1, 0.0])
def test_regmean_is_the_papers_formula_on_whole_weights(updates, inputs, alpha):
    W0 = drawn(OUT, IN, seed=5)
    grams = [shrunk(x.T @ x / 50, alpha) for x in inputs]
    weights = WEIGHTS.abs()  # the paper has no negative weights
    top = sum(w * (W0 + u.delta()) @ G for u, w, G in zip(updates, weights, grams, strict=True))
    expected = top @ torch.linalg.inv(sum(w * G for w, G in zip(weights, grams, strict=True))) - W0
    got = regmean(updates, weights, statistics=known(inputs), off_diagonal=alpha, ridge=0.0)
    assert relative(got.update.delta(), expected) < 1e-10
    assert got.update.rank == 9


def test_regmean_is_the_minimum_of_its_loss(updates, inputs):
    M = regmean(updates, WEIGHTS, statistics=known(inputs), **EXACT).update.delta().requires_grad_()
    at = loss(M, updates, WEIGHTS, inputs)
    (gradient,) = torch.autograd.grad(at, M)
    assert gradient.norm() < 1e-8 * at


def test_with_equal_grams_regmean_is_the_weighted_mean(updates, inputs):
    got = regmean(updates, WEIGHTS, statistics=known([inputs[0]] * 3))
    mean = sum(w * u.delta() for u, w in zip(updates, WEIGHTS, strict=True)) / WEIGHTS.abs().sum()
    assert relative(got.update.delta(), mean) < 1e-10


def test_where_all_inputs_are_zero_regmean_is_the_weighted_mean(updates):
    got = regmean(updates, WEIGHTS.abs(), statistics=known([torch.zeros(5, IN).double()] * 3))
    mean = sum(w * u.delta() for u, w in zip(updates, WEIGHTS.abs(), strict=True)) / WEIGHTS.abs().sum()
    assert relative(got.update.delta(), mean) < 1e-10


def test_adapters_that_read_different_features_keep_what_they_do(updates, inputs):
    halves = [inputs[0] * (torch.arange(IN) < IN // 2), inputs[1] * (torch.arange(IN) >= IN // 2)]
    got = regmean(updates[:2], WEIGHTS[:2].abs(), statistics=known(halves, (None, None)), ridge=1e-9)
    for update, x in zip(updates[:2], halves, strict=True):
        assert relative(got.update.delta() @ x.T, update.delta() @ x.T) < 1e-5
    assert got.facts["compromise_loss"] < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_a_dropped_rank_costs_what_was_predicted(updates, inputs, rank):
    solved = solve_regmean(updates, WEIGHTS, known(inputs), **EXACT)
    idle = loss(torch.zeros(OUT, IN), updates, WEIGHTS, inputs)
    best = loss(solved.at_full_rank().delta(), updates, WEIGHTS, inputs)
    got = regmean(updates, WEIGHTS, statistics=known(inputs), rank=rank, **EXACT)
    lost = loss(got.update.delta(), updates, WEIGHTS, inputs)
    assert got.update.rank == rank
    assert got.facts["predicted_loss"] == pytest.approx(float((lost - best) / idle), rel=1e-8)
    assert got.facts["compromise_loss"] == pytest.approx(float(best / idle), rel=1e-8)
    assert float(solved.predicted_losses()[rank]) == pytest.approx(got.facts["predicted_loss"], rel=1e-8)
    difference = (solved.at_full_rank().delta() - got.update.delta()).norm() ** 2
    assert got.dropped == pytest.approx(float(difference), rel=1e-8)


def test_no_update_of_that_rank_has_a_smaller_loss(updates, inputs):
    got = loss(
        regmean(updates, WEIGHTS, statistics=known(inputs), rank=3, **EXACT).update.delta(), updates, WEIGHTS, inputs
    )
    # the same loss in coordinates where the inputs are white, so that a descent over B and A gets to its end
    S = sum(w.abs() * x.T @ x / len(x) for w, x in zip(WEIGHTS, inputs, strict=True))
    C = torch.linalg.cholesky(S)
    B, A = drawn(OUT, 3, seed=1).requires_grad_(), drawn(3, IN, seed=2).requires_grad_()
    search = torch.optim.LBFGS([B, A], max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def step():
        search.zero_grad()
        at = loss(torch.linalg.solve_triangular(C, B @ A, upper=False, left=False), updates, WEIGHTS, inputs)
        at.backward()
        return at

    search.step(step)
    assert float(step().detach()) == pytest.approx(float(got), rel=1e-6)
    full = regmean(updates, WEIGHTS, statistics=known(inputs), **EXACT).update
    weighted_sum = stack([u * float(w) for u, w in zip(updates, WEIGHTS, strict=True)])
    for other in (full, weighted_sum):
        assert loss(other.truncated(3)[0].delta(), updates, WEIGHTS, inputs) > got * 1.001


def test_turned_inputs_turn_the_solution_when_nothing_is_shrunk(updates, inputs):
    Q = torch.linalg.qr(drawn(IN, IN, seed=3)).Q
    straight = regmean(updates, WEIGHTS, statistics=known(inputs), off_diagonal=1.0).update.delta()
    turned = [LowRank(u.B, u.A @ Q.T) for u in updates]
    got = regmean(turned, WEIGHTS, statistics=known([x @ Q.T for x in inputs]), off_diagonal=1.0)
    assert relative(got.update.delta(), straight @ Q.T) < 1e-8


def test_grams_read_in_blocks_give_the_same(updates, inputs, monkeypatch):
    whole = regmean(updates, WEIGHTS, statistics=known(inputs), rank=4)
    monkeypatch.setattr("moa.merging.activations.BLOCK_ENTRIES", 3 * IN)
    blocks = regmean(updates, WEIGHTS, statistics=known(inputs), rank=4)
    assert relative(blocks.update.delta(), whole.update.delta()) < 1e-12


def test_fisher_is_the_papers_weighted_mean_of_rows(updates, inputs):
    phi = [drawn(OUT, seed=s).square() for s in (50, 60, 70)]
    got = fisher(updates, WEIGHTS, statistics=known(inputs, phi), balanced=False, eps=1e-12)
    expected = torch.zeros(OUT, IN).double()
    for row in range(OUT):
        F = torch.stack([w.abs() * p[row] for w, p in zip(WEIGHTS, phi, strict=True)])
        for share, w, u in zip(F / F.sum(), WEIGHTS, updates, strict=True):
            expected[row] += share * w.sign() * u.delta()[row]
    assert relative(got.update.delta(), expected) < 1e-9


def test_with_equal_fisher_information_it_is_the_weighted_mean(updates, inputs):
    phi = [torch.ones(OUT) * size for size in (1e-9, 3.0, 1e4)]
    mean = sum(w * u.delta() for u, w in zip(updates, WEIGHTS, strict=True)) / WEIGHTS.abs().sum()
    got = fisher(updates, WEIGHTS, statistics=known(inputs, phi)).update.delta()
    assert relative(got, mean) < 1e-10
    as_it_is = fisher(updates, WEIGHTS, statistics=known(inputs, phi), balanced=False).update.delta()
    assert relative(as_it_is, updates[2].delta()) < 0.05


@pytest.mark.parametrize("balanced", [True, False])
def test_rows_that_nothing_depends_on_are_averaged(updates, inputs, balanced):
    phi = [drawn(OUT, seed=s).square() * (torch.arange(OUT) > 0) for s in (50, 60, 70)]
    mean = sum(w * u.delta() for u, w in zip(updates, WEIGHTS, strict=True)) / WEIGHTS.abs().sum()
    got = fisher(updates, WEIGHTS, statistics=known(inputs, phi), balanced=balanced).update.delta()
    assert relative(got[0], mean[0]) < 1e-9
    silent = fisher(updates, WEIGHTS, statistics=known(inputs, [torch.zeros(OUT)] * 3), balanced=balanced)
    assert relative(silent.update.delta(), mean) < 1e-9


def test_an_adapter_without_the_layer_is_left_out_unless_its_inputs_are_known(updates, inputs):
    absent = LowRank.zero((OUT, IN), torch.float64)
    two = regmean(updates[:2], WEIGHTS[:2], statistics=known(inputs[:2], (None, None)))
    without = regmean([*updates[:2], absent], WEIGHTS, statistics=[*known(inputs[:2], (None, None)), None])
    assert relative(without.update.delta(), two.update.delta()) < 1e-12
    assert without.facts["without_statistics"] == 1 and "without_statistics" not in two.facts
    minded = regmean([*updates[:2], absent], WEIGHTS, statistics=known(inputs), **EXACT).update.delta()
    assert loss(minded, [*updates[:2], absent], WEIGHTS, inputs) < 0.9 * loss(
        two.update.delta(), [*updates[:2], absent], WEIGHTS, inputs
    )


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (regmean, {"off_diagonal": 1.5}, r"off_diagonal is a factor in \[0, 1\], got 1.5"),
        (regmean, {"ridge": -1.0}, "ridge is a share to add and must be at least 0"),
        (fisher, {"eps": 0.0}, "eps must be above 0"),
        (fisher, {}, "the statistics of layer 'q_proj' hold no gradients: collect them with --fisher true"),
    ],
)
def test_bad_options_are_one_sentence(updates, inputs, method, options, said):
    with pytest.raises(ValueError, match=said):
        method(updates, WEIGHTS, statistics=known(inputs), module="q_proj", **options)


def test_grams_that_cannot_be_used_are_one_sentence(updates, inputs):
    few = [x[:2] for x in inputs]
    with pytest.raises(ValueError, match="Grams of layer 'q_proj' have no inverse, even together: raise ridge"):
        regmean(updates, WEIGHTS, statistics=known(few), module="q_proj", **EXACT)
    assert regmean(updates, WEIGHTS, statistics=known(few), off_diagonal=1.0).update.rank == 9
    with pytest.raises(ValueError, match=r"the Gram of layer 'q_proj' must be \[20, 20\], got \[19, 19\]"):
        regmean(updates, WEIGHTS, statistics=known([x[:, 1:] for x in inputs]), module="q_proj")


def test_merge_gives_each_layer_its_statistics_and_reports_the_losses(adapters):
    def data(adapter, seed):
        return {
            module: LayerStatistics(x.T @ x / 60, 60)
            for module, x in ((m, drawn(60, u.shape[1], seed=seed)) for m, u in adapter.modules.items())
        }

    statistics = [data(adapter, seed) for seed, adapter in enumerate(adapters)]
    result = merge(adapters, "regmean", statistics=statistics, weights=[1, 0, 1], rank=3, dtype=torch.float64)
    for module, update in result.modules.items():
        present = [(a, s) for a, s in list(zip(adapters, statistics, strict=True))[::2] if module in s]
        expected = regmean(
            [a.modules[module] for a, _ in present],
            torch.ones(len(present)).double(),
            statistics=[s[module] for _, s in present],
            rank=3,
        )
        assert relative(update.delta(), expected.update.delta()) < 1e-10
    assert 0 < result.report.facts["predicted_loss"] < 1
    assert result.report.layers["model.layers.0.mlp.down_proj"].facts["without_statistics"] == 1
