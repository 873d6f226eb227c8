"""A prompt without a single token has nothing to route on: it is refused, before a NaN can choose its expert."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.routing import Routing

PROMPT = torch.tensor([[3, 7, 9, 11, 24, 5], [5, 10, 12, 16, 23, 3]])
EMPTY = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
LEFT = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
ONLY_ANSWER = torch.tensor([[-100, -100, -100, -100, 24, 5], [5, 10, 12, 16, 23, 3]])
ROW = {"input_ids": torch.tensor([[3, 7, 9, 11, 24, 5, 10]]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])}
PACKED_ANSWER = torch.tensor([[-100, -100, 9, 11, 24, 5, 10]])
REFUSED = r"sequence 1 of the batch has no prompt token to route on: give it a prompt"


@pytest.fixture(params=["before", "in flight"])
def model(request, base_folder, make_adapter, tmp_path):
    """A mixture that routes before the forward that answers, or in it."""
    layers = [2, 3] if request.param == "in flight" else None
    adapters = {
        name: make_adapter(tmp_path / name, seed=seed, layers_to_transform=layers)
        for seed, name in enumerate(("cats", "dogs"))
    }
    model = MoaModel.from_adapters(AutoModelForCausalLM.from_pretrained(base_folder), adapters)
    assert model.routes_in_flight == (request.param == "in flight")
    model.set_router(SequenceRouter(32, 2))
    return model


CALLS = {
    "a mask of zeros": lambda model: model(input_ids=PROMPT, attention_mask=EMPTY),
    "nothing but an answer": lambda model: model(input_ids=PROMPT, labels=ONLY_ANSWER),
    "padding and an answer": lambda model: model(input_ids=PROMPT, attention_mask=LEFT, labels=ONLY_ANSWER),
    "a packed answer": lambda model: model(**ROW, labels=PACKED_ANSWER),
    "a generation": lambda model: model.generate(input_ids=PROMPT, attention_mask=EMPTY, max_new_tokens=2),
    "beams": lambda model: model.generate(input_ids=PROMPT, attention_mask=EMPTY, max_new_tokens=2, num_beams=2),
    "a route": lambda model: model.route(PROMPT, EMPTY),
    "features": lambda model: model.features(PROMPT, EMPTY),
}


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
@pytest.mark.parametrize("call", CALLS)
def test_an_empty_prompt_is_refused_and_the_next_batch_is_routed_as_ever(model, call, pooling):
    model.set_router(SequenceRouter(32, 2, pooling=pooling))
    expected = model.route(PROMPT).weights
    with torch.no_grad():
        with pytest.raises(ValueError, match=REFUSED):
            CALLS[call](model)
        assert not model.route_state.pinned and not model.route_state.off
        model(input_ids=PROMPT)
    assert torch.equal(model.route_state.weights, expected)


@pytest.mark.parametrize("shape", [(2, 0), (0, 6)])
@pytest.mark.parametrize("call", ["__call__", "route", "features", "generate"])
def test_a_batch_without_prompts_or_tokens_is_refused(model, call, shape):
    with pytest.raises(ValueError, match=rf"no prompt to route on in input_ids of shape \[{shape[0]}, {shape[1]}\]"):
        getattr(model, call)(input_ids=torch.empty(shape, dtype=torch.long))


@pytest.mark.parametrize("call", ["__call__", "route", "features", "generate"])
def test_a_prompt_that_is_no_row_of_a_batch_is_refused(model, call):
    with pytest.raises(ValueError, match=r"rows of input_ids \[batch, tokens\], got the shape \[6\]"):
        getattr(model, call)(input_ids=PROMPT[0])


def test_an_empty_prompt_is_refused_by_a_router_that_learns(model):
    model.train().moa_router.requires_grad_(True)
    with pytest.raises(ValueError, match=REFUSED):
        model(input_ids=PROMPT, attention_mask=EMPTY)


@torch.no_grad()
def test_an_empty_prompt_whose_expert_is_chosen_needs_no_token(model):
    chosen = Routing(torch.eye(2))
    with model.pinned(chosen):
        got = model(input_ids=PROMPT, attention_mask=EMPTY).logits
        expected = model(input_ids=PROMPT).logits
    torch.testing.assert_close(got[0], expected[0])
    assert torch.isfinite(got).all()
