"""Adapters that step aside while others are loaded, against PEFT's own loading of one after the other."""

import pytest
import torch
from peft import PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import moa.assembly
from moa.assembly import assemble
from moa.peft_loading import load_adapters

PROMPT = torch.tensor([[3, 7, 9, 11, 24, 5]])
OPTIONS = {"check_base": True, "autocast_adapter_dtype": True}


@pytest.fixture
def kinds(adapters, make_adapter, tmp_path):
    """Ranks, scalings and layers that differ, DoRA, a bias, a dropout."""
    more = {"dora": {"use_dora": True}, "biased": {"lora_bias": True, "r": 2}, "dropped": {"lora_dropout": 0.25}}
    targets = {"target_modules": ["q_proj", "gate_proj"]}
    return adapters | {
        name: make_adapter(tmp_path / name, seed=7, **targets, **options) for name, options in more.items()
    }


def built(base_folder, adapters, dtype=torch.float32, **options):
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
    return assemble(PeftModelForCausalLM, base, adapters, **{**OPTIONS, **options})


def one_after_the_other(model, folders, **options):
    for name, folder in folders.items():
        model.load_adapter(folder, name, **options)


def plain_fields(layer):
    names = [name for name in layer.other_param_names if isinstance(getattr(layer, name), dict)]
    return {name: getattr(layer, name) for name in names} | {"active": layer.active_adapters}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widened", [True, False])
def test_adapters_that_are_loaded_together_are_what_peft_makes_of_one_after_the_other(
    base_folder, kinds, monkeypatch, dtype, widened
):
    got = built(base_folder, kinds, dtype, autocast_adapter_dtype=widened)
    monkeypatch.setattr(moa.assembly, "load_adapters", one_after_the_other)
    expected = built(base_folder, kinds, dtype, autocast_adapter_dtype=widened)
    assert got.active_adapters == expected.active_adapters and list(got.peft_config) == list(expected.peft_config)
    modules = [{name: one.training for name, one in model.named_modules()} for model in (got, expected)]
    assert list(modules[0].items()) == list(modules[1].items())
    for (name, ours), (same, theirs) in zip(got.named_parameters(), expected.named_parameters(), strict=True):
        assert name == same and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(got.modules(), expected.modules(), strict=True):
        if isinstance(ours, LoraLayer):
            assert (
                plain_fields(ours) == plain_fields(theirs) and ours.lora_variant.keys() == theirs.lora_variant.keys()
            )
    for name in kinds:
        got.set_adapter(name)
        expected.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(got(input_ids=PROMPT).logits, expected(input_ids=PROMPT).logits)


def test_an_adapter_that_cannot_be_loaded_leaves_those_before_it_in_their_places(base_folder, adapters, tmp_path):
    model = built(base_folder, {"cats": adapters["cats"]})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".cats." in name}
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_adapters(model, {"dogs": adapters["dogs"], "none": tmp_path})
    after = model.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert any(".dogs." in name for name in after)


def test_each_adapter_meets_none_of_those_before_it(base_folder, adapters, monkeypatch):
    held = []
    original = PeftModelForCausalLM.load_adapter

    def watched(self, *given, **options):
        layers = [layer for layer in self.modules() if isinstance(layer, LoraLayer)]
        held.append({name for layer in layers for name in (*layer.lora_A, *layer.lora_dropout)})
        return original(self, *given, **options)

    monkeypatch.setattr(PeftModelForCausalLM, "load_adapter", watched)
    built(base_folder, adapters)
    assert held == [{"cats"}, set(), set()]
