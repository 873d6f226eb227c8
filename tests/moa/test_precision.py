"""Which floats a base model computes in."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from moa.base_model import load_base_model
from moa.precision import computes_slowly, dtype_of

HASWELL = {"architecture": "x86_64", "avx2": True, "f16c": True, "avx512_bf16": False, "avx512_fp16": False}
SAPPHIRE_RAPIDS = HASWELL | {"avx512_bf16": True, "amx_bf16": True, "avx512_fp16": True}
GRAVITON_2 = {"architecture": "aarch64", "neon": True, "fp16_arith": True, "bf16": False}


@pytest.mark.parametrize(
    "capabilities, slow",
    [
        (HASWELL, {torch.bfloat16, torch.float16}),
        (SAPPHIRE_RAPIDS, set()),
        (GRAVITON_2, {torch.bfloat16}),
        ({"architecture": "s390x"}, set()),
        ({}, set()),
    ],
)
def test_a_type_is_slow_where_the_cpu_is_known_to_lack_its_instructions(capabilities, slow):
    types = (torch.bfloat16, torch.float16, torch.float32)
    assert {dtype for dtype in types if computes_slowly(dtype, capabilities)} == slow


@pytest.fixture
def in_bfloat16(base_folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(base_folder).bfloat16().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("slow, computes_in", [(True, torch.float32), (False, torch.bfloat16)])
def test_auto_widens_a_checkpoint_exactly_where_its_own_type_is_slow(in_bfloat16, monkeypatch, slow, computes_in):
    monkeypatch.setattr("moa.precision.computes_slowly", lambda dtype: slow)
    model = load_base_model(in_bfloat16)
    assert model.dtype == computes_in
    stored = AutoModelForCausalLM.from_pretrained(in_bfloat16, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor.bfloat16(), stored[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("asked, got", [("bfloat16", "bfloat16"), ("float32", "float32"), (None, "bfloat16")])
def test_an_explicit_choice_wins(in_bfloat16, monkeypatch, asked, got):
    monkeypatch.setattr("moa.precision.computes_slowly", lambda dtype: True)
    assert dtype_of(load_base_model(in_bfloat16, dtype=asked)) == got


def test_a_dtype_that_does_not_exist_is_refused_before_a_model_is_looked_for():
    with pytest.raises(ValueError, match="no dtype is called 'bflota16': choose one of .*; did you mean 'bfloat16'"):
        load_base_model("no-such-model", dtype="bflota16")
