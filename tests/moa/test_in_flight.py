"""Routing inside the forward that answers, against the prefix pass, which routes before it."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache

from moa.config import FALLBACK
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.routing import BASE, EXPERT, MERGED
from moa.strangeness import Abstention

PROMPT = torch.tensor([[3, 7, 9, 11, 24, 5], [5, 10, 12, 16, 23, 3], [9, 3, 3, 8, 17, 20]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
GREEDY = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4}
MASKS = {"whole": torch.ones_like(PROMPT), "left": LEFT, "right": LEFT.flip(1)}


@pytest.fixture(scope="module")
def late(make_adapter, tmp_path_factory):
    """Two experts that leave the first two of four layers as they are."""
    folder = tmp_path_factory.mktemp("late")
    modules = {"cats": ["q_proj", "down_proj"], "dogs": ["v_proj", "o_proj"]}
    shape = {"layers_to_transform": [2, 3], "lora_alpha": 24}  # strong enough to change what is written
    return {
        name: make_adapter(folder / name, seed=seed, target_modules=modules[name], **shape)
        for seed, name in enumerate(modules)
    }


@pytest.fixture
def model(base_model, late):
    return routed(MoaModel.from_adapters(base_model, late, router_layer=2))


def routed(model):
    torch.manual_seed(2)
    router = SequenceRouter(32, len(model.experts))
    torch.nn.init.normal_(router.head.weight, std=3.0)
    router.mean.copy_(model.features(PROMPT, LEFT).mean(dim=0))  # in the middle between these prompts
    model.set_router(router)
    for mask in MASKS.values():
        assert len(set(model.route(PROMPT, mask).experts)) > 1, "a batch that all goes to one expert proves nothing"
    return model


def told_apart(model, generated):
    """A generation is worth comparing if each expert alone would have written something else."""
    for name in model.experts:
        with model.using(name):
            assert not torch.equal(generated, model.generate(input_ids=PROMPT, attention_mask=LEFT, **GREEDY))


@contextmanager
def passes(model, module="layers.0"):
    """How often a module runs inside the block."""
    seen = []
    hook = model.get_base_model().model.get_submodule(module).register_forward_pre_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()


@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_a_forward_equals_that_of_the_route_of_its_prompts_and_needs_no_second_pass(model, mask):
    inputs = {"input_ids": PROMPT, "attention_mask": MASKS[mask]}
    routing = model.route(**inputs)
    with model.pinned(routing):
        expected = model(**inputs).logits
    with passes(model) as seen:
        got = model(**inputs).logits
    assert len(seen) == 1
    held = MASKS[mask].bool()
    torch.testing.assert_close(got[held], expected[held], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.last_routing.logits, routing.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["cache", "no cache", "static cache", "beams"],
)
def test_a_generation_routes_once_in_its_first_forward(model, more):
    inputs = {"input_ids": PROMPT, "attention_mask": LEFT, **GREEDY, **more}
    with model.pinned(model.route(PROMPT, LEFT)):
        expected = model.generate(**inputs)
    with passes(model) as seen:
        got = model.generate(**inputs)
    assert torch.equal(got, expected) and len(seen) == GREEDY["max_new_tokens"]
    assert not model.route_state.pinned
    if len(got) == len(PROMPT):
        told_apart(model, got)


@pytest.mark.parametrize(
    "more",
    [
        lambda model: {"prefill_chunk_size": 2},
        lambda model: {"prompt_lookup_num_tokens": 2, "rows": 1},
    ],
    ids=["chunked prefill", "prompt lookup"],
)
def test_a_generation_whose_first_forward_is_not_the_prompt_alone_routes_before_it(model, more):
    more = more(model)
    ids = PROMPT[: more.pop("rows", None)]
    with model.pinned(model.route(ids)):
        expected = model.generate(input_ids=ids, **GREEDY)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY, **more), expected)


def test_turns_keep_the_route_of_the_first(model):
    cache = DynamicCache()
    names = [model.experts[index] for index in model.route(PROMPT).experts]
    first = model.generate(input_ids=PROMPT, past_key_values=cache, **GREEDY)
    both = torch.cat([first, PROMPT[:, :2]], dim=1)
    turn = {"input_ids": both, "attention_mask": torch.ones_like(both), **GREEDY}  # what was written may be padding
    second = model.generate(past_key_values=cache, **turn)
    with model.pinned(names):
        assert torch.equal(second, model.generate(**turn))


def test_labels_keep_the_answer_from_the_router(model):
    labels = PROMPT.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        model(input_ids=PROMPT, labels=labels)
    expected = model.route(PROMPT[:, :4]).logits
    torch.testing.assert_close(model.last_routing.logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_strange_prompts_fall_back_in_flight_too(model):
    model.set_fallback("svd", rank=4)
    energies = -model.moa_router(model.features(PROMPT)).logsumexp(dim=-1)
    low, middle = (energies.sort().values[:2] + 1e-3).tolist()
    model.moa_config.router.abstention = Abstention("energy", 0.1, low, middle)
    with passes(model) as seen:
        got = model(input_ids=PROMPT).logits
    assert len(seen) == 1
    places = energies.argsort().tolist()
    assert model.last_routing.fallback[places].tolist() == [EXPERT, MERGED, BASE]
    for place, alone in zip(places[1:], (model.using(FALLBACK), model.using_base()), strict=True):
        with alone:
            expected = model(input_ids=PROMPT[place : place + 1]).logits[0]
        torch.testing.assert_close(got[place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_finds_the_choice_again(model, reentrant):
    gradients = []
    for checkpointed in (False, True):
        one = copy.deepcopy(model).train()
        one.set_requires_grad(["cats", "dogs"])
        if checkpointed:
            one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            one.get_base_model().enable_input_require_grads()
        with passes(one, "layers.2.mlp") as seen:
            one(input_ids=PROMPT, labels=PROMPT.where(PROMPT > 4, -100)).loss.backward()
        assert len(seen) == 1 + checkpointed  # the second is the recompute
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


def test_a_router_that_learns_reads_before_and_gets_its_gradients(model):
    model.moa_router.requires_grad_(True)
    model.moa_config.routing = "soft"
    with passes(model) as seen:
        model.train()(input_ids=PROMPT, labels=PROMPT.where(PROMPT > 4, -100)).loss.backward()
    assert len(seen) == 2
    assert model.moa_router.head.weight.grad.abs().sum() > 0


def test_experts_that_change_what_the_router_reads_need_a_pass_before(base_model, late, make_adapter, tmp_path):
    early = make_adapter(tmp_path / "early", seed=5, layers_to_transform=[1])
    model = routed(MoaModel.from_adapters(base_model, {**late, "early": early}, router_layer=2))
    assert not model.routes_in_flight
    with passes(model) as seen, torch.no_grad():
        model(input_ids=PROMPT)
    assert len(seen) == 2
    model.remove_expert("early")
    assert model.routes_in_flight


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_mask_of_another_shape_is_refused_before_anything_runs(model, in_flight, monkeypatch):
    if not in_flight:
        monkeypatch.setattr("moa.prompt_route.can_route", lambda model: False)
    for run in (model, model.generate):
        with pytest.raises(ValueError, match=r"prompts of shape \[3, 6\] are routed by an attention_mask of that"):
            run(input_ids=PROMPT, attention_mask=torch.ones(3, 7, dtype=torch.long))


def test_an_expert_outside_the_layers_needs_a_pass_before(base_model, late, make_adapter, tmp_path):
    outside = make_adapter(tmp_path / "head", target_modules=["lm_head"])
    model = routed(MoaModel.from_adapters(base_model, {**late, "head": outside}, router_layer=2))
    assert not model.routes_in_flight
