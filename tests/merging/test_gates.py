"""Weights found on examples: planted optima, what a search is told and keeps, and what it refuses."""

import json
import logging
import sys
import threading
from pathlib import Path

import pytest
import torch

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging import find_method, merge

LINEAR = ["lorahub_linear", "lora_soups", "adamerging", "distillation"]
METHODS = ["lorahub", *LINEAR]
OPTIMUM = {"a": 0.9, "b": -0.4, "c": 0.3}


class Planted:
    """An objective that is the squared distance from planted gates; the tasks' shares only scale it."""

    def __init__(self, members, optimum=OPTIMUM, tasks=("new",)):
        self.names = [adapter.name for adapter in members]
        self.layers = sorted({module for adapter in members for module in adapter.modules})
        self.tasks = list(tasks)
        self.optimum = torch.tensor([optimum[name] for name in self.names], dtype=torch.float64)
        self.asked, self.shares = [], None

    def describe(self):
        return {"optimum": self.optimum.tolist()}

    def losses(self, gates, shares, *, crossed):
        self.asked.append(gates)
        self.shares = shares
        return (gates - self.optimum).square().sum(dim=1) + 1

    def step_loss(self, gates, shares, *, kind, guard, step, seed):
        self.asked.append(gates.detach())
        self.shares = shares
        return (gates - self.optimum).square().sum() + 1 + guard * gates.square().sum()


@pytest.fixture
def planted(equal_rank_adapters):
    return Planted(equal_rank_adapters)


def gates_of(result):
    return {name.removeprefix("gate_"): fact for name, fact in result.report.facts.items() if name.startswith("gate_")}


@pytest.mark.parametrize("method", ["lorahub", "lorahub_linear"])
@pytest.mark.parametrize(("parallel", "budget"), [(1, 60), (8, 240)])
def test_a_search_finds_planted_weights(equal_rank_adapters, planted, method, parallel, budget):
    result = merge(equal_rank_adapters, method, objective=planted, parallel=parallel, budget=budget, l1=0.0)
    assert gates_of(result) == pytest.approx(OPTIMUM, abs=0.1)
    assert result.report.facts["loss"] == pytest.approx(1, abs=0.02)
    assert result.report.facts["loss_of_base"] == pytest.approx(1 + 0.81 + 0.16 + 0.09)
    assert sum(map(len, planted.asked)) == budget + 2 and all(
        len(batch) <= max(2, parallel) for batch in planted.asked
    )


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("lora_soups", {}, OPTIMUM),
        ("lora_soups", {"granularity": "adapter"}, OPTIMUM),
        ("adamerging", {"guard": 0.0}, OPTIMUM),
        ("adamerging", {"guard": 1.0, "granularity": "adapter"}, {name: g / 2 for name, g in OPTIMUM.items()}),
        # (g - t)^2 + c |g| / 3 is least where |g| is c / 6 less than |t|
        ("distillation", {"l1": 0.6, "granularity": "adapter"}, {"a": 0.8, "b": -0.3, "c": 0.2}),
    ],
)
def test_training_finds_planted_weights(equal_rank_adapters, planted, method, options, expected):
    result = merge(equal_rank_adapters, method, objective=planted, steps=300, lr=0.03, **options)
    assert gates_of(result) == pytest.approx(expected, abs=5e-3)
    assert result.report.facts["loss_of_last_tenth"] < result.report.facts["loss_of_first_tenth"]


def test_convex_weights_are_a_share_of_each_adapter(equal_rank_adapters, planted):
    gates = gates_of(merge(equal_rank_adapters, "lora_soups", objective=planted, convex=True, steps=300, lr=0.1))
    assert sum(gates.values()) == pytest.approx(1) and min(gates.values()) >= 0
    # the nearest point of the simplex to the planted one
    assert gates == pytest.approx({"a": 0.8, "b": 0.0, "c": 0.2}, abs=0.02)


def test_gates_of_each_layer_find_what_each_layer_needs(equal_rank_adapters, planted):
    per_layer = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    planted.layers = planted.layers[::-1]  # the order of an objective is its own
    planted.optimum = per_layer
    result = merge(equal_rank_adapters, "lora_soups", objective=planted, steps=300, lr=0.03)
    for row, module in zip(per_layer, planted.layers, strict=True):
        facts = result.report.layers[module].facts
        assert [facts[f"gate_{name}"] for name in "abc"] == pytest.approx(row.tolist(), abs=5e-3)


@pytest.mark.parametrize("method", LINEAR)
def test_the_result_is_the_weighted_sum_with_the_found_weights(adapters, dense_sum, method):
    result = merge(adapters, method, objective=Planted(adapters), dtype=torch.float64)
    for module, update in result.modules.items():
        facts = result.report.layers[module].facts
        expected = dense_sum(adapters, [facts[f"gate_{name}"] for name in "abc"], module)
        torch.testing.assert_close(update.delta(), expected)


def test_published_lorahub_is_the_product_of_the_weighted_sums_of_factors(equal_rank_adapters, planted):
    result = merge(equal_rank_adapters, "lorahub", objective=planted, dtype=torch.float64)
    gates = gates_of(result)
    for module, update in result.modules.items():
        B, A = (sum(gates[a.name] * getattr(a.modules[module], f) for a in equal_rank_adapters) for f in "BA")
        torch.testing.assert_close(update.delta(), B @ A)


@pytest.mark.parametrize("method", METHODS)
def test_weights_say_how_much_the_examples_of_each_adapter_count(equal_rank_adapters, method):
    options = {"budget": 2} if "lorahub" in method else {"steps": 1}
    objective = Planted(equal_rank_adapters, tasks=["c", "new", "a"])
    merge(equal_rank_adapters, method, objective=objective, weights=[1.0, 2.0, -3.0], **options)
    torch.testing.assert_close(objective.shares, torch.tensor([3.0, 2.0, 1.0]).double() / 6)  # "new": the mean
    merge(equal_rank_adapters, method, objective=objective, weights=[1.0, 2.0, 0.0], **options)
    torch.testing.assert_close(objective.shares, torch.tensor([0.0, 1.5, 1.0]).double() / 2.5)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_changes_nothing_has_no_weight_to_find(equal_rank_adapters, method):
    a, b, c = equal_rank_adapters
    idle = Adapter("c", None, {m: LowRank(0 * u.B, u.A) for m, u in c.modules.items()}, torch.float64)
    options = {"budget": 5} if "lorahub" in method else {"steps": 5}
    objective = Planted([a, b, idle])
    assert gates_of(merge([a, b, idle], method, objective=objective, **options))["c"] == 0
    assert all((gates[..., 2] == 0).all() for gates in objective.asked)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_all_change_nothing_give_one_that_changes_nothing(equal_rank_adapters, planted, method):
    idle = [
        Adapter(a.name, None, {m: LowRank(0 * u.B, u.A) for m, u in a.modules.items()}) for a in equal_rank_adapters
    ]
    result = merge(idle, method, objective=planted)
    assert all(update.rank >= 1 and update.norm() == 0 for update in result.modules.values())
    assert not planted.asked


@pytest.mark.parametrize("method", ["lorahub", "lorahub_linear"])
def test_weights_may_all_be_zero(equal_rank_adapters, method):
    nothing = Planted(equal_rank_adapters, dict.fromkeys("abc", 0.0))
    result = merge(equal_rank_adapters, method, objective=nothing)
    assert gates_of(result) == dict.fromkeys("abc", 0.0)
    assert all(update.norm() == 0 for update in result.modules.values())


def test_weights_under_which_a_model_breaks_are_counted_and_not_chosen(equal_rank_adapters, planted):
    judge = planted.losses
    planted.losses = lambda gates, shares, *, crossed: judge(gates, shares, crossed=crossed).where(
        gates[:, 0] < 0.5, torch.nan
    )
    result = merge(equal_rank_adapters, "lorahub_linear", objective=planted)
    assert result.report.facts["failed_candidates"] > 0
    assert gates_of(result)["a"] < 0.5 and result.report.facts["loss"] < 3


@pytest.mark.parametrize("method", ["lorahub_linear", "lora_soups"])
def test_results_depend_on_the_seed_alone(equal_rank_adapters, method):
    options = {"parallel": 4} if method == "lorahub_linear" else {}
    found = [
        gates_of(merge(equal_rank_adapters, method, objective=Planted(equal_rank_adapters), seed=seed, **options))
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1]
    assert (found[0] != found[2]) == (method == "lorahub_linear")  # the toy's examples are not drawn


@pytest.mark.parametrize(
    ("method", "options"), [("lorahub_linear", {"parallel": 4}), ("lorahub", {}), ("adamerging", {})]
)
def test_an_interrupted_search_goes_on_to_the_same_result(equal_rank_adapters, tmp_path, method, options):
    whole = Planted(equal_rank_adapters)
    expected = merge(equal_rank_adapters, method, objective=whole, **options)

    threads = threading.active_count()
    state = str(tmp_path / "states" / "state.json")
    broken = Planted(equal_rank_adapters)
    for name in ("losses", "step_loss"):
        setattr(broken, name, interrupted_after(5, getattr(broken, name)))
    with pytest.raises(KeyboardInterrupt):
        merge(equal_rank_adapters, method, objective=broken, journal=state, **options)
    assert json.loads(Path(state).read_text())["content"]
    assert threading.active_count() == threads  # a process that is interrupted ends

    rest = Planted(equal_rank_adapters)
    resumed = merge(equal_rank_adapters, method, objective=rest, journal=state, **options)
    assert len(rest.asked) == len(whole.asked) - 5
    for module, update in expected.modules.items():
        assert torch.equal(resumed.modules[module].B, update.B) and torch.equal(resumed.modules[module].A, update.A)

    again = Planted(equal_rank_adapters)
    merge(equal_rank_adapters, method, objective=again, journal=state, **options)
    assert not again.asked


def interrupted_after(calls, judge):
    count = iter(range(calls + 1))

    def judged(*args, **kwargs):
        if next(count) == calls:
            raise KeyboardInterrupt
        return judge(*args, **kwargs)

    return judged


def test_progress_and_the_best_so_far_are_told(equal_rank_adapters, planted, caplog):
    shown = {}

    def progress(names, description):
        shown[description] = len(names)
        return names

    with caplog.at_level(logging.INFO, logger="moa.merging"):
        merge(equal_rank_adapters, "lorahub_linear", objective=planted, parallel=8, progress=progress)
    assert shown["searching weights"] == 5
    assert len(caplog.messages) == 5 and caplog.messages[-1].startswith("40 of 40 candidates, least loss so far 1.")


@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_another_search_is_refused(equal_rank_adapters, planted, tmp_path, method):
    state = str(tmp_path / "state.json")
    options = {"budget": 2} if "lorahub" in method else {"steps": 1}
    merge(equal_rank_adapters, method, objective=planted, journal=state, **options)
    with pytest.raises(ValueError, match="is of a search with another seed"):
        merge(equal_rank_adapters, method, objective=planted, journal=state, seed=1, **options)
    other = Planted(equal_rank_adapters, dict.fromkeys("abc", 1.0))
    with pytest.raises(ValueError, match="is of a search with another objective"):
        merge(equal_rank_adapters, method, objective=other, journal=state, **options)
    (tmp_path / "state.json").write_text("half of a")
    with pytest.raises(ValueError, match="holds no search to go on with"):
        merge(equal_rank_adapters, method, objective=planted, journal=state, **options)


def test_a_search_without_nevergrad_says_how_to_get_it(equal_rank_adapters, planted, monkeypatch):
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(ValueError, match=r"pip install 'moa-peft\[search\]'"):
        merge(equal_rank_adapters, "lorahub", objective=planted)


@pytest.mark.parametrize("method", METHODS)
def test_what_makes_no_sense_is_refused(equal_rank_adapters, planted, method):
    with pytest.raises(ValueError, match="looks for weights by examples and was given none"):
        merge(equal_rank_adapters, method)
    with pytest.raises(ValueError, match="the objective knows no adapter 'c', only a, b"):
        merge(equal_rank_adapters, method, objective=Planted(equal_rank_adapters[:2]))
    planted.layers = planted.layers[:2]
    with pytest.raises(ValueError, match="the objective knows no layer"):
        merge(equal_rank_adapters, method, objective=planted)
    with pytest.raises(ValueError, match="examples are for c, of which none is among what is merged"):
        merge(equal_rank_adapters, method, objective=Planted(equal_rank_adapters, tasks=["c"]), weights=[1, 1, 0])
    wrong = {"budget": 0, "parallel": 0, "bound": -1.0, "l1": -0.1, "steps": 0, "lr": 0.0, "guard": -1.0}
    for option, value in wrong.items():
        if option in find_method(method).options:
            with pytest.raises(ValueError, match=f"{option} must"):
                merge(equal_rank_adapters, method, objective=Planted(equal_rank_adapters), **{option: value})


def test_a_loss_that_is_not_finite_ends_a_training(equal_rank_adapters, planted):
    planted.step_loss = lambda gates, shares, **_: gates.sum() * float("nan")
    with pytest.raises(ValueError, match="the loss of step 0 is nan: pass a smaller lr than 0.01"):
        merge(equal_rank_adapters, "lora_soups", objective=planted)


def test_published_lorahub_needs_equal_ranks(adapters):
    with pytest.raises(ValueError, match="got ranks 2 and 3.* use lorahub_linear"):
        merge(adapters, "lorahub", objective=Planted(adapters))
