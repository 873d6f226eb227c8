"""The fingerprint of a base model follows what it computes, not what it is called."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from moa import MoaModel
from moa.fingerprint import fingerprint


def test_a_copy_under_another_name_has_the_same_fingerprint(base_folder, base_model, tmp_path):
    shutil.copytree(base_folder, tmp_path / "copy")
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")) == fingerprint(base_model)


def test_adapters_in_the_model_do_not_change_its_fingerprint(base_model, adapters):
    before = fingerprint(base_model)
    model = MoaModel.from_adapters(base_model, adapters)
    assert fingerprint(model.get_base_model()) == before
    model.merge_adapters("svd", into="merged")
    assert fingerprint(model.get_base_model()) == before


def test_another_training_dtype_or_setting_has_another_fingerprint(base_model):
    seen = {fingerprint(base_model)}
    parameters = list(base_model.parameters())
    for parameter in parameters:
        with torch.no_grad():
            parameter.add_(0.01)
        seen.add(fingerprint(base_model))
    assert len(seen) == 1 + len(parameters)
    base_model.config.rms_norm_eps *= 2
    seen.add(fingerprint(base_model))
    seen.add(fingerprint(base_model.to(torch.bfloat16)))
    assert len(seen) == 3 + len(parameters)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_the_sample_reaches_all_over_a_tensor(base_model, size):
    base_model.register_buffer("extra", torch.zeros(size))
    before = fingerprint(base_model)
    base_model.extra[-(size // 64 + 1) :] = 1.0  # the last step of the sample
    assert fingerprint(base_model) != before
