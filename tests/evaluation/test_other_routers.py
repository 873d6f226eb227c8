"""Rows of the table for other routers, against the rows that they should equal."""

import copy
import json

import pytest
import torch
from torch.nn.functional import one_hot

from moa.calibration import ConformalSet
from moa.evaluation.full_evaluation import main
from moa.evaluation.other_routers import router_systems
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.strangeness import Abstention, fit_mahalanobis

TASKS = ("sst2", "squad", "wmt14")


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    """With a router that knows the means of its prompts, and a head that says nothing."""
    model = MoaModel.from_adapters(str(base_folder), dict(zip(TASKS, adapters.values(), strict=True)))
    torch.manual_seed(0)
    router = SequenceRouter(32, 3)
    router.detector = fit_mahalanobis(torch.randn(12, 32), torch.arange(12) % 3, 3)
    model.set_router(router)
    model.save_pretrained(tmp_path / "moa")
    return tmp_path / "moa"


def test_other_routers_are_rows_of_the_table(mixture, tmp_path, capsys):
    words = ["--mixture", str(mixture), "--tasks", "sst2", "--source", "pocket", "--rows", "6", "--other_rows", "6"]
    words += ["--validation_rows", "4", "--methods", "average", "--routers", "uniform", "random", "centroid", "arrow"]
    main([*words, "--output_dir", str(tmp_path / "evaluation")])
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    cells = {cell["system"]: cell for cell in found["cells"]}
    assert "other routers" in capsys.readouterr().out
    # equal weights are the average of the updates
    uniform, average = (cells[name]["nll_per_example"] for name in ("router:uniform", "merge:average"))
    assert uniform == pytest.approx(average, rel=1e-3)
    # a random choice is one of the experts' answers
    alone = torch.tensor([cells[f"lora:{task}"]["nll_per_example"] for task in TASKS])
    chosen = torch.tensor(cells["router:random"]["nll_per_example"])
    nearest = torch.tensor(cells["router:centroid"]["nll_per_example"])
    for one in (chosen, nearest):
        assert ((alone - one).abs().amin(dim=0) < 1e-4).all()
    kinds = {system["name"]: system["kind"] for system in found["systems"]}
    assert kinds["router:arrow"] == "router" and cells["router:arrow"]["nll"] > 0


def test_a_random_choice_depends_on_the_prompt_alone(mixture, base_folder):
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    (system,) = router_systems(model, ["random"], seed=1)

    def weights(ids, mask):
        with system.activate(torch.tensor(ids), torch.tensor(mask)):
            return model.route_state.weights.clone()

    ids = [[0, 5, 6, 7], [8, 9, 10, 11], [0, 0, 12, 13]]
    together = weights(ids, [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    assert weights([[12, 13]], [[1, 1]]).equal(together[2:]) and weights([[5, 6, 7]], [[1, 1, 1]]).equal(together[:1])
    many = weights([[one, two] for one in range(3, 23) for two in range(3, 23)], [[1, 1]] * 400).mean(dim=0)
    assert (many - 1 / 3).abs().max() < 0.08


def test_the_nearest_centroid_is_found_on_standardised_features(mixture, base_folder):
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    router = model.moa_router
    router.mean += 0.3
    router.std *= 1.7
    (system,) = router_systems(model, ["centroid"])
    ids = torch.arange(3, 27).view(8, 3)
    z = ((model.features(ids) - router.mean) / router.std).double()
    with system.activate(ids, torch.ones_like(ids)):
        found = model.route_state.weights.argmax(dim=1)
    assert found.equal(torch.cdist(z, router.detector.means.double()).argmin(dim=1))


IDS = torch.arange(3, 27).view(8, 3)
ALL = torch.ones_like(IDS)


@pytest.fixture
def model(mixture, base_folder):
    """With a second router, at another depth, and gates; every router is of an opinion."""
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    torch.manual_seed(1)
    deeper = copy.deepcopy(model.moa_router)
    model.moa_router.others["3"] = deeper
    for router in (model.moa_router, deeper):
        torch.nn.init.normal_(router.head.weight, std=2.0)
    model.set_router(model.moa_router, model.moa_config.router)
    model.set_granularity("token", by="gates")
    for gate in model.moa_gates.gates:
        torch.nn.init.normal_(gate.weight, std=0.5)
    model.save_pretrained(mixture)
    return model


def likely(model, layer, router):
    """The router's probabilities of each prompt's experts, from a forward of the whole base model."""
    with model.using_base():
        states = model.get_base_model()(input_ids=IDS, output_hidden_states=True).hidden_states[layer]
    return router(states.mean(dim=1)).softmax(dim=-1)


@torch.no_grad()
def test_a_fitted_router_is_compared_per_sequence_and_layer_hard_and_soft(model):
    depths = {model.moa_config.router.layer: model.moa_router, 3: model.moa_router.others["3"]}
    assert list(depths) == [1, 3]
    shallow, deep = (likely(model, layer, router) for layer, router in depths.items())
    in_last = torch.tensor([".layers.3." in name for name in model.route_state.layers])
    by_layer = torch.where(in_last[None, :, None], deep[:, None], shallow[:, None])
    soft = {"soft": shallow, "layer_soft": by_layer}
    hard = {"sequence": shallow, "layer": by_layer}
    expected = soft | {name: one_hot(of.argmax(dim=-1), 3).float() for name, of in hard.items()}
    for system in router_systems(model, list(expected)):
        with system.activate(IDS, ALL):
            got = model.route_state.weights
        torch.testing.assert_close(got, expected[system.name.removeprefix("router:")], rtol=1e-4, atol=1e-5)
        assert system.cost["prefill_overhead"] == (3 if "layer" in system.name else 1) / 4
    assert not shallow.argmax(dim=-1).equal(deep.argmax(dim=-1)), "routers that agree would prove nothing"


@torch.no_grad()
def test_the_likely_experts_are_compared_where_it_is_known_which_are_likely(model):
    model.moa_config.router.conformal = None
    with pytest.raises(ValueError, match="fitted without one"):
        router_systems(model, ["conformal"])
    probabilities = likely(model, model.moa_config.router.layer, model.moa_router)
    model.moa_config.router.conformal = ConformalSet(0.9, floor=0.1)
    (system,) = router_systems(model, ["conformal"])
    kept = probabilities * (probabilities >= 0.1)
    with system.activate(IDS, ALL):
        torch.testing.assert_close(model.route_state.weights, kept / kept.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert {int(row) for row in kept.ne(0).sum(dim=-1)} >= {1, 2}, "sets of one size would prove little"


@torch.no_grad()
def test_a_fitted_router_that_is_compared_trusts_its_experts_with_strange_prompts_too(model):
    model.moa_config.router.abstention = Abstention("energy", 0.02, merged_above=-1e9, base_above=-1e9)
    assert not model.route(IDS, ALL).weights[:, :3].any(), "all of these prompts would fall back"
    for system in router_systems(model, ["sequence", "layer_soft"]):
        with system.activate(IDS, ALL):
            to_experts = model.route_state.weights[..., :3].sum(dim=-1)
        torch.testing.assert_close(to_experts, torch.ones_like(to_experts))


@torch.no_grad()
def test_gates_are_compared_also_where_the_mixture_routes_otherwise(model):
    expected = model(input_ids=IDS).logits
    model.set_granularity("sequence")
    (system,) = router_systems(model, ["gates"])
    assert not torch.allclose(model(input_ids=IDS).logits, expected)
    with system.activate(IDS, ALL):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ("sequence", "--routers sequence needs the mixture's fitted router, and it has none"),
        ("centroid", "--routers centroid needs the mixture's fitted router, and it has none"),
        ("soft", "--routers soft needs the mixture's fitted router, and it has none"),
        ("layer_soft", "--routers layer_soft needs the mixture's fitted router, and it has none"),
        ("gates", "--routers gates: this mixture has none, train them with 'moa fit-gates'"),
    ],
)
def test_routers_whose_parts_a_mixture_lacks_are_refused(base_model, adapters, tmp_path, router, message):
    bare = MoaModel.from_adapters(base_model, adapters)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=message):
        router_systems(bare, [router])


def test_a_router_of_one_depth_is_not_compared_by_layer(mixture, base_folder):
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    with pytest.raises(ValueError, match="granularity 'layer' needs routers at several depths"):
        router_systems(model, ["layer_soft"])


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        (["oracle"], "the table has it always"),
        (
            ["arow"],
            "--routers arow does not exist: choose from uniform, random, centroid, arrow, sequence, soft, conformal, "
            "layer, layer_soft, gates; did you mean 'arrow'?",
        ),
        (["random", "random"], "--routers names one twice"),
    ],
)
def test_unknown_routers_are_refused_in_one_sentence(mixture, refusal, routers, message):
    assert message in refusal(main, ["--mixture", str(mixture), "--source", "pocket", "--routers", *routers])
