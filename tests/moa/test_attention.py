"""Which attention is chosen on machines that this one is not, and what an explicit choice gets."""

import copy
import logging

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from moa import attention
from moa.attention import Machine, attention_of, check_attention, resolve, set_attention
from moa.base_model import load_base_model
from moa.env import environment


def machine(capability, *packages, kernels=False):
    return Machine(capability, frozenset(packages), kernels=kernels, torch_flash=True)


@pytest.fixture
def pretend(monkeypatch):
    """Let `Machine.here` find another machine."""
    return lambda found: monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device: found))


@pytest.mark.parametrize(
    ("found", "plain", "packed"),
    [
        (Machine(), "sdpa", "sdpa"),
        (machine((7, 5), 2), "sdpa", "sdpa"),
        (machine((8, 0)), "sdpa", "torch_varlen"),
        (Machine((8, 0)), "sdpa", "sdpa"),
        (machine((8, 6), 2, 3, 4), "flash_attention_2", "flash_attention_2"),
        (machine((9, 0), 2), "flash_attention_2", "flash_attention_2"),
        (machine((9, 0), 2, 3), "flash_attention_3", "flash_attention_3"),
        (machine((9, 0), 2, 3, 4), "flash_attention_4", "flash_attention_4"),
        (machine((10, 0), 2, 4), "flash_attention_4", "flash_attention_4"),
        (machine((12, 0), 3), "sdpa", "torch_varlen"),
        (machine((8, 0), kernels=True), "kernels-community/flash-attn2", "kernels-community/flash-attn2"),
        (machine((8, 0), 2, kernels=True), "flash_attention_2", "flash_attention_2"),
        (machine((7, 5), kernels=True), "sdpa", "sdpa"),
    ],
)
def test_auto_takes_the_best_that_machine_and_packages_allow(found, plain, packed):
    for dtype in (torch.bfloat16, torch.float16):
        asked = {"device": "cuda", "dtype": dtype, "machine": found}
        assert (resolve(**asked), resolve(**asked, packing=True)) == (plain, packed)
    assert resolve(device="cuda", dtype=torch.float32, packing=True, machine=found) == "sdpa"


@pytest.mark.parametrize("built_with_flash", [False, True])
def test_this_machine_is_looked_at_by_the_device(monkeypatch, built_with_flash):
    assert Machine.here("cpu") == Machine()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built_with_flash)
    assert Machine.here("cuda") == Machine((9, 0), torch_flash=built_with_flash)
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm calls its devices cuda too
    assert Machine.here("cuda") == Machine()


def test_an_explicit_choice_wins():
    best = machine((9, 0), 2, 3, 4)
    for name in ("eager", "sdpa", "flex_attention", "flash_attention_2", "torch_varlen", "owner/kernel"):
        assert resolve(name, device="cuda", dtype=torch.bfloat16, machine=best) == name


@pytest.mark.parametrize(
    ("requested", "device", "found", "said"),
    [
        ("flash_atention_2", "cpu", Machine(), "no attention is called 'flash_atention_2'; did you mean 'flash_att"),
        ("flash", "cpu", Machine(), "choose one of auto, eager, .*sdpa.*, or a kernel of the Hub as owner/name"),
        ("flash_attention_2", "cpu", Machine(), "cannot run here .it needs a GPU, and this is a CPU.: choose another"),
        ("torch_varlen", "cpu", Machine(), "it needs a GPU"),
        ("torch_varlen", "cuda", machine((7, 5)), "compute capability 8.0 or more"),
        ("torch_varlen", "cuda", Machine((9, 0)), "a torch that was built with FlashAttention"),
        ("flash_attention_2", "cuda", machine((9, 0), 4), "the package flash-attn is not installed"),
        ("flash_attention_4", "cuda", machine((9, 0), 2), "the package flash-attn-4 is not installed"),
    ],
)
def test_an_explicit_choice_that_cannot_run_is_one_sentence(requested, device, found, said):
    with pytest.raises(ValueError, match=said):
        check_attention(requested, device, found)


def test_what_fails_to_load_is_passed_over_aloud_until_one_does(base, pretend, caplog):
    pretend(machine((9, 0), 2, 4, kernels=True))
    model = copy.deepcopy(base).bfloat16()
    with caplog.at_level(logging.WARNING, "moa.attention"):
        assert set_attention(model, packing=True) == attention_of(model) == "torch_varlen"
    passed = [record.getMessage().split(" is passed over: ")[0] for record in caplog.records]
    assert passed == ["attention flash_attention_4", "attention flash_attention_2"] + [
        f"attention kernels-community/{name}" for name in ("flash-attn4", "vllm-flash-attn3", "flash-attn2")
    ]


def test_a_model_for_which_nothing_better_can_be_had_keeps_what_transformers_gave_it(pretend, caplog):
    pretend(machine((8, 0)))
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, head_dim=8
    )
    model = Gemma2ForCausalLM(config).bfloat16()
    before = attention_of(model)
    assert set_attention(model, packing=True) == before
    assert "Gemma2ForCausalLM caps its attention scores (attn_logit_softcapping=50.0)" in caplog.text


def test_what_transformers_refuses_is_one_sentence_and_leaves_the_model_as_it_was(base):
    model = copy.deepcopy(base)
    before = attention_of(model)
    with pytest.raises(ValueError, match="'kernels-community/flash-attn2' cannot run here .*kernels.*: choose anoth"):
        set_attention(model, "kernels-community/flash-attn2")
    assert attention_of(model) == before


def test_a_base_model_is_loaded_with_what_was_asked_for(base_folder):
    assert attention_of(load_base_model(str(base_folder))) == "sdpa"
    assert attention_of(load_base_model(str(base_folder), attn_implementation="eager")) == "eager"


def test_an_attention_that_does_not_exist_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="no attention is called 'egaer'; did you mean 'eager'"):
        load_base_model("no-such-model", attn_implementation="egaer")


def test_a_bug_report_shows_what_auto_takes(monkeypatch):
    assert (environment()["attention"], environment()["attention, packed"]) == ("sdpa", "sdpa")
    monkeypatch.setattr(attention, "default_device", lambda: "cuda")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device: machine((8, 0))))
    assert environment()["attention, packed"] == "torch_varlen"
