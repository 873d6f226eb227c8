"""One folder with three readers; what was changed afterwards is found."""

import hashlib
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


def edit(file, **changes):
    """Change values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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
    with pytest.raises(ValueError, match="it holds 'README.md', give a new folder"):
        model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "moa_config.json").exists()


def test_a_folder_with_other_things_is_left_as_it_is(model, tmp_path):
    (tmp_path / "cats" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "cats" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds 'cats', give a new folder"):
        model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cats", "checkpoint-9", "precious.txt"]


def test_what_a_training_left_stays_beside_the_mixture(model, tmp_path):
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "moa_training.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "checkpoint-20").is_dir() and (tmp_path / "runs").is_dir()
    assert (tmp_path / "moa_training.json").read_text() == "{}"
    assert MoaModel.from_pretrained(None, tmp_path).experts == model.experts


def test_saving_over_a_mixture_removes_the_experts_that_are_gone(saved, base_folder, adapters):
    (saved / "dogs" / "notes.txt").write_text("mine")
    fewer = MoaModel.from_adapters(str(base_folder), {"cats": adapters["cats"]})
    fewer.save_pretrained(saved)
    assert not (saved / "films").exists() and not (saved / "moa_router.safetensors").exists()
    assert [file.name for file in (saved / "dogs").iterdir()] == ["notes.txt"]
    assert MoaModel.from_pretrained(None, saved).experts == ("cats",)


def test_a_file_that_the_earlier_mixture_did_not_write_is_not_replaced(model, base_folder, adapters, tmp_path):
    MoaModel.from_adapters(str(base_folder), {"cats": adapters["cats"]}).save_pretrained(tmp_path / "mixture")
    shutil.copytree(adapters["films"], tmp_path / "mixture" / "dogs")
    with pytest.raises(ValueError, match=r"dogs/adapter_config.json there belongs to no earlier mixture"):
        model.save_pretrained(tmp_path / "mixture")
    assert MoaModel.from_pretrained(None, tmp_path / "mixture").experts == ("cats",)


def test_a_mixture_is_not_saved_as_pickles(model, tmp_path):
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(tmp_path / "mixture", safe_serialization=False)
    assert list(tmp_path.glob("*mixture*")) == []


def test_adapters_of_another_base_that_were_accepted_are_saved_and_loaded(base_folder, adapters, tmp_path):
    experts = {name: tmp_path / name for name in ("cats", "dogs")}
    for name, path in experts.items():
        shutil.copytree(adapters[name], path)
    edit(experts["dogs"] / "adapter_config.json", base_model_name_or_path="other/model")
    MoaModel.from_adapters(base_folder, experts, check_base=False).save_pretrained(tmp_path / "mixture")
    loaded = MoaModel.from_pretrained(base_folder, tmp_path / "mixture")
    assert loaded.experts == ("cats", "dogs") and not loaded.moa_config.check_base


def test_a_mixture_on_another_base_is_refused(saved, base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "another")
    edit(tmp_path / "another" / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match="is a mixture on .*tiny-llama.*check_base=False"):
        MoaModel.from_pretrained(tmp_path / "another", saved)
    assert MoaModel.from_pretrained(tmp_path / "another", saved, check_base=False).experts


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


@pytest.mark.parametrize("folder", ["dogs", "."])
def test_a_config_that_was_changed_afterwards_is_refused(saved, folder):
    edit(saved / folder / "adapter_config.json", lora_alpha=64)
    with pytest.raises(ValueError, match=r"adapter_config.json was changed after the mixture was saved"):
        MoaModel.from_pretrained(None, saved)


def test_the_checksums_are_those_of_the_files(model, saved):
    written = json.loads((saved / "moa_config.json").read_text())["sha256"]
    files = [path for path in saved.rglob("*") if path.name.startswith(("adapter_", "moa_router"))]
    assert written == {str(path.relative_to(saved)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(files) == 9
    weights, config = (saved / "dogs" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    expected = " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in (weights, config))
    assert model.moa_config.expert_sha256("dogs") == expected


@pytest.mark.parametrize("file", ["adapter_config.json", "cats/adapter_model.safetensors"])
def test_a_file_without_a_checksum_is_refused(saved, file):
    sha256 = json.loads((saved / "moa_config.json").read_text())["sha256"]
    edit(saved / "moa_config.json", sha256={name: digest for name, digest in sha256.items() if name != file})
    with pytest.raises(ValueError, match=f"has no sha256 of {file}"):
        MoaModel.from_pretrained(None, saved)


@pytest.mark.parametrize(
    "gone", ["cats/adapter_model.safetensors", "cats/adapter_config.json", "moa_router.safetensors"]
)
def test_an_incomplete_folder_is_refused(saved, gone):
    (saved / gone).unlink()
    with pytest.raises(ValueError, match="incomplete"):
        MoaModel.from_pretrained(None, saved)


def test_a_plain_adapter_is_no_mixture(adapters):
    with pytest.raises(ValueError, match="no saved mixture"):
        MoaModel.from_pretrained(None, adapters["cats"])


def test_an_unknown_key_in_the_config_is_named(saved):
    edit(saved / "moa_config.json", routingg="hard")
    with pytest.raises(ValueError, match="unknown key 'routingg'.*did you mean 'routing'"):
        MoaModel.from_pretrained(None, saved)


def test_an_unknown_key_of_the_fallback_is_named(saved):
    edit(saved / "moa_config.json", fallback={"method": "svd", "weights": {}, "scal": 2})
    with pytest.raises(ValueError, match="fallback has the unknown key 'scal'.*did you mean 'scale'"):
        MoaModel.from_pretrained(None, saved)


@pytest.mark.parametrize("content, said", [("[]", "must be a JSON object, got a list"), ("{", "not valid JSON")])
def test_a_config_that_is_no_object_is_refused(saved, content, said):
    (saved / "moa_config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        MoaModel.from_pretrained(None, saved)


def test_a_config_cannot_name_experts_outside_its_folder(saved):
    edit(saved / "moa_config.json", experts=["../cats", "dogs", "films"])
    with pytest.raises(ValueError, match="expert name '../cats' is not usable"):
        MoaModel.from_pretrained(None, saved)


def test_a_router_layer_of_null_is_a_quarter_of_the_depth(saved):
    router = json.loads((saved / "moa_config.json").read_text())["router"]
    edit(saved / "moa_config.json", router={**router, "layer": None})
    loaded = MoaModel.from_pretrained(None, saved)
    assert loaded.moa_config.router.layer == 1
    assert loaded.route(IDS).weights.shape == (2, 3)


def test_a_repository_that_cannot_be_reached_is_one_sentence():
    with pytest.raises(FileNotFoundError, match="there is no mixture folder .* could not be downloaded"):
        MoaModel.from_pretrained(None, "nobody/nothing")


def test_a_mixture_without_a_router_can_be_saved_and_loaded(base_folder, adapters, tmp_path):
    MoaModel.from_adapters(str(base_folder), adapters).save_pretrained(tmp_path / "bare")
    loaded = MoaModel.from_pretrained(None, tmp_path / "bare")
    assert loaded.moa_router is None
    assert "without a router yet" in (tmp_path / "bare" / "README.md").read_text()
    with loaded.pinned(["cats", "dogs"]):
        assert logits(loaded).isfinite().all()


def test_a_mixture_from_before_fallbacks_knew_their_settings_is_read(model, tmp_path, base_folder):
    model.set_fallback("svd")
    model.save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "moa_config.json"
    described = json.loads(config.read_text())
    del described["fallback"]["settings"]
    config.write_text(json.dumps(described))
    assert MoaModel.from_pretrained(str(base_folder), tmp_path / "saved").moa_config.fallback.settings == {}
    described["fallback"]["settings"] = None
    config.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="fallback cannot be read"):
        MoaModel.from_pretrained(str(base_folder), tmp_path / "saved")


def test_a_loaded_base_cannot_be_loaded_otherwise(model, tmp_path, base_model):
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="for a base model that is loaded here"):
        MoaModel.from_pretrained(base_model, tmp_path / "saved", dtype="bfloat16")


def test_the_names_of_modules_are_saved_in_order(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    for config in (tmp_path / "saved").rglob("adapter_config.json"):
        modules = json.loads(config.read_text())["target_modules"]
        assert modules == sorted(modules) and len(modules) > 1
