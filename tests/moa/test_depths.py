"""Routers at several depths: what each layer follows, what is saved, what grows."""

import pytest
import torch
from torch.nn import functional as F

from moa.depths import router_of_layers
from moa.model import MoaModel
from moa.prefix import prompt_states
from moa.router import SequenceRouter, mean_pool
from moa.routing import BASE, EXPERT
from moa.strangeness import Abstention

PROMPT = torch.tensor([[3, 7, 9, 11, 24, 5], [5, 10, 12, 16, 23, 3], [9, 3, 3, 8, 17, 20]])
MASK = torch.ones_like(PROMPT)
GREEDY = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}


@pytest.fixture
def model(base_model, adapters):
    """Three experts on four layers; routers read layers 1 and 3."""
    torch.manual_seed(0)
    model = MoaModel.from_adapters(base_model, adapters, router_layer=1)
    router, deeper = SequenceRouter(32, 3), SequenceRouter(32, 3)
    for one in (router, deeper):
        torch.nn.init.normal_(one.head.weight, std=3.0)
    router.others["3"] = deeper
    model.set_router(router)
    model.set_granularity("layer")
    return model


def chosen_at(model, router, layer):
    (states,) = prompt_states(model.get_base_model(), [layer], PROMPT, MASK)
    return router(mean_pool(states, MASK.bool())).argmax(dim=-1)


def test_each_layer_follows_the_router_that_read_the_nearest_layer_before_it(model):
    with model.using_base():
        shallow, deep = chosen_at(model, model.moa_router, 1), chosen_at(model, model.moa_router.others["3"], 3)
    assert not torch.equal(shallow, deep), "routers that agree would prove nothing"
    weights = model.route(PROMPT).weights
    assert weights.shape == (3, len(model.route_state.layers), 3)
    for place, name in enumerate(model.route_state.layers):
        expected = deep if ".layers.3." in f".{name}" else shallow
        assert torch.equal(weights[:, place], F.one_hot(expected, 3).float())


def test_layers_before_the_first_router_follow_it_too(base_model):
    names = [f"model.layers.{block}.self_attn.q_proj" for block in range(4)]
    assert router_of_layers(base_model, names, [2, 3]) == [0, 0, 0, 1]


@pytest.mark.parametrize("routing", ["hard", "soft", "top_k"])
def test_a_forward_and_a_generation_run_that_route(model, routing):
    model.moa_config.routing = routing
    with torch.no_grad():
        got = model(input_ids=PROMPT).logits
        with model.pinned(model.route(PROMPT)):
            torch.testing.assert_close(got, model(input_ids=PROMPT).logits)
            written = model.generate(input_ids=PROMPT, attention_mask=MASK, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(input_ids=PROMPT, attention_mask=MASK, **GREEDY), written)


def test_one_router_for_all_layers_is_another_route(model):
    by_layer = model(input_ids=PROMPT).logits
    model.set_granularity("sequence")
    assert not torch.allclose(model(input_ids=PROMPT).logits, by_layer, atol=1e-3)


def test_a_strange_prompt_runs_the_base_model_in_every_layer(model):
    energies = -model.moa_router(model.features(PROMPT)).logsumexp(dim=-1)
    limit = float(energies.sort().values[1])
    model.moa_config.router.abstention = Abstention("energy", 0.1, limit, limit)
    with pytest.warns(UserWarning, match="no merged adapter"):
        routing = model.route(PROMPT)
    strangest = int(energies.argmax())
    assert routing.fallback.tolist() == [BASE if row == strangest else EXPERT for row in range(3)]
    assert not routing.weights[strangest].any()
    assert routing.weights.sum(dim=-1).sum() == 2 * len(model.route_state.layers)


def test_a_saved_mixture_routes_as_before(model, base_folder, tmp_path):
    expected = model.route(PROMPT)
    model.save_pretrained(tmp_path / "saved")
    loaded = MoaModel.from_pretrained(str(base_folder), tmp_path / "saved")
    assert loaded.moa_config.granularity == "layer" and loaded.moa_config.router.depths == [3]
    assert torch.equal(loaded.route(PROMPT).weights, expected.weights)
    unfitted = MoaModel.from_pretrained(str(base_folder), tmp_path / "saved", router=False)
    assert unfitted.moa_config.granularity == "sequence"


def test_gradients_reach_the_routers_of_all_depths(model):
    model.moa_router.requires_grad_(True)
    model.moa_config.routing = "soft"
    model.train()(input_ids=PROMPT, labels=PROMPT.where(PROMPT > 8, -100)).loss.backward()
    for router in (model.moa_router, model.moa_router.others["3"]):
        assert router.head.weight.grad.abs().sum() > 0


def test_an_expert_comes_and_goes_at_every_depth(model, make_adapter, tmp_path, base_folder):
    router = SequenceRouter(32, 3, head="centroid")
    router.others["3"] = SequenceRouter(32, 3, head="centroid")
    model.set_router(router)
    model.add_expert("new", make_adapter(tmp_path / "new", seed=9), ["a red cat sat", "the blue dog ran", "one two"])
    assert model.route(PROMPT).weights.shape[-1] == 4
    assert model.moa_router.others["3"].num_experts == 4
    model.remove_expert("cats")
    assert [router.num_experts for router in (model.moa_router, model.moa_router.others["3"])] == [3, 3]
    assert model.route(PROMPT).weights.shape[-1] == 3


def test_folding_experts_folds_the_routers_of_all_depths(model):
    folded = model.moa_router.folded([0, 1, 0])
    features = model.features(PROMPT, layer=3)
    whole, clusters = (router.others["3"](features).softmax(dim=-1) for router in (model.moa_router, folded))
    torch.testing.assert_close(clusters, torch.stack([whole[:, [0, 2]].sum(dim=1), whole[:, 1]], dim=1))


def test_layers_cannot_be_routed_apart_by_one_router(base_model, adapters):
    model = MoaModel.from_adapters(base_model, adapters)
    with pytest.raises(ValueError, match="needs routers at several depths, and this mixture has no router"):
        model.set_granularity("layer")
    model.set_router(SequenceRouter(32, 3))
    with pytest.raises(ValueError, match=r"a router at one depth only: fit them with 'moa fit-router"):
        model.set_granularity("layer")


@pytest.mark.parametrize(
    "depth, other, said",
    [
        (
            "3",
            SequenceRouter(32, 3, pooling="last"),
            "the router of layer 3 has pooling 'last', that of layer 1 'mean'",
        ),
        ("3", SequenceRouter(32, 2), "has num_experts 2, that of layer 1 3"),
        ("1", SequenceRouter(32, 3), "is called by the layer that it reads: got '1'"),
        ("x", SequenceRouter(32, 3), "is called by the layer that it reads: got 'x'"),
    ],
)
def test_routers_that_are_unlike_each_other_are_refused(base_model, adapters, depth, other, said):
    model = MoaModel.from_adapters(base_model, adapters, router_layer=1)
    router = SequenceRouter(32, 3)
    router.others[depth] = other
    with pytest.raises(ValueError, match=said):
        model.set_router(router)


def test_a_layer_that_no_router_reads_has_no_features(model):
    with pytest.raises(ValueError, match="no router of this mixture reads layer 2"):
        model.features(PROMPT, layer=2)
    torch.testing.assert_close(model.features(PROMPT, layer=1), model.features(PROMPT))


def test_a_mixture_can_be_asked_for_the_other_granularity_once(model):
    by_layer = model.route(PROMPT).weights
    model.set_granularity("sequence")
    assert torch.equal(model.route(PROMPT, granularity="layer").weights, by_layer)
    model.set_granularity("layer")
    alone = model.route(PROMPT, granularity="sequence").weights
    with model.using_base():
        assert torch.equal(alone, F.one_hot(chosen_at(model, model.moa_router, 1), 3).float())
    model.set_granularity("sequence")
    model.moa_router.others.clear()
    with pytest.raises(ValueError, match="needs routers at several depths, and this mixture has a router at one"):
        model.route(PROMPT, granularity="layer")
