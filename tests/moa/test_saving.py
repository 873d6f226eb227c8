"""One folder with three readers; what was changed afterwards is found."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moa.model import MoaModel
from moa.router import SequenceRouter

IDS = torch.tensor([[3, 5, 9, 12], [4, 6, 10, 13]])


@pytest.fixture
def model(base_folder, adapters):
    model = MoaModel.from_adapters(str(base_folder), adapters, routing="top_k")
    torch.manual_seed(1)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight)
    router.standardise(torch.randn(50, 32))
    model.set_router(router)
    model.moa_config.scores["router accuracy"] = 0.5
    return model


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_a_saved_mixture_comes_back_the_same(model, saved):
    loaded = MoaModel.from_pretrained(None, saved)
    assert loaded.moa_config == model.moa_config
    torch.testing.assert_close(loaded.route(IDS).logits, model.route(IDS).logits)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_stock_peft_reads_every_expert_and_the_root(model, saved, base_folder):
    for name in [*model.experts, "default"]:
        stock = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base_folder), saved if name == "default" else saved / name
        ).eval()
        with model.using(name):
            torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_stock_peft_reads_an_expert_as_a_subfolder(saved, base_folder, adapters):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    by_subfolder = PeftModel.from_pretrained(base, saved, subfolder="cats").eval()
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapters["cats"]).eval()
    torch.testing.assert_close(logits(by_subfolder), logits(original))


def test_the_root_is_the_merge_that_the_config_names(model, saved):
    assert model.moa_config.fallback.method == "svd"
    assert model.moa_config.fallback.weights == pytest.approx({"cats": 1 / 3, "dogs": 1 / 3, "films": 1 / 3})
    card = (saved / "README.md").read_text()
    assert "method `svd`, weights cats 0.333, dogs 0.333, films 0.333" in card
    assert "| router accuracy | 0.500 |" in card


def test_another_fallback_replaces_the_first(model):
    model.set_fallback("svd")
    before = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    model.set_fallback("average", weights=[1, 0, 0])
    assert model.moa_config.fallback.weights["cats"] == 1
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def test_saving_twice_writes_the_same_bytes(model, saved, tmp_path):
    model.save_pretrained(tmp_path / "again")
    for file in sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file()):
        assert (saved / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_saving_over_a_mixture_replaces_it(model, saved):
    model.moa_config.scores["router accuracy"] = 0.75
    model.save_pretrained(saved)
    assert MoaModel.from_pretrained(None, saved).moa_config.scores == {"router accuracy": 0.75}


def test_a_folder_with_another_adapter_is_not_overwritten(model, adapters, tmp_path):
    shutil.copytree(adapters["cats"], tmp_path / "mine")
    with pytest.raises(ValueError, match="holds another adapter, give a new folder"):
        model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "moa_config.json").exists()


def test_a_failed_save_leaves_nothing_behind(model, tmp_path, monkeypatch):
    monkeypatch.setattr("moa.saving.mixture_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "mixture")
    assert list(tmp_path.glob("*mixture*")) == []


def test_an_adapter_that_was_changed_afterwards_is_refused(saved):
    file = saved / "dogs" / "adapter_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"dogs.adapter_model.safetensors was changed after the mixture was saved"):
        MoaModel.from_pretrained(None, saved)


@pytest.mark.parametrize("gone", ["cats/adapter_model.safetensors", "moa_router.safetensors"])
def test_an_incomplete_folder_is_refused(saved, gone):
    (saved / gone).unlink()
    with pytest.raises(ValueError, match="incomplete"):
        MoaModel.from_pretrained(None, saved)


def test_a_plain_adapter_is_no_mixture(adapters):
    with pytest.raises(ValueError, match="no saved mixture"):
        MoaModel.from_pretrained(None, adapters["cats"])


def test_an_unknown_key_in_the_config_is_named(saved):
    config = json.loads((saved / "moa_config.json").read_text())
    (saved / "moa_config.json").write_text(json.dumps({**config, "routingg": "hard"}))
    with pytest.raises(ValueError, match="unknown key 'routingg'.*did you mean 'routing'"):
        MoaModel.from_pretrained(None, saved)


def test_a_repository_that_cannot_be_reached_is_one_sentence():
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository that could be downloaded"):
        MoaModel.from_pretrained(None, "nobody/nothing")


def test_a_mixture_without_a_router_can_be_saved_and_loaded(base_folder, adapters, tmp_path):
    MoaModel.from_adapters(str(base_folder), adapters).save_pretrained(tmp_path / "bare")
    loaded = MoaModel.from_pretrained(None, tmp_path / "bare")
    assert loaded.moa_router is None
    with loaded.pinned(["cats", "dogs"]):
        assert logits(loaded).isfinite().all()
