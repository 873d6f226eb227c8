"""Pushed to a Hub and loaded back, over HTTP."""

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.adapters import read_adapter
from moa.base_weights import open_base
from moa.card import fused_card, mixture_card
from moa.config import Fallback, MoaConfig, RouterConfig
from moa.model import MoaModel
from moa.push import main
from moa.router import SequenceRouter

IDS = torch.tensor([[3, 5, 9, 12], [4, 6, 10, 13]])


@pytest.fixture
def model(base_folder, adapters):
    model = MoaModel.from_adapters(str(base_folder), adapters)
    torch.manual_seed(1)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight)
    model.set_router(router)
    model.moa_config.scores["router accuracy"] = 0.987
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_a_pushed_mixture_comes_back_whole(model, hub, tmp_path):
    address = model.push_to_hub("tester/mixture", private=True)
    assert address.startswith(f"{hub.url}/tester/mixture/commit/")
    loaded = MoaModel.from_pretrained(model.moa_config.base_model, "tester/mixture", cache_dir=tmp_path)
    torch.testing.assert_close(loaded.route(IDS).logits, model.route(IDS).logits)
    torch.testing.assert_close(logits(loaded), logits(model))


def test_stock_peft_reads_a_pushed_expert_and_the_root(model, base_folder, tmp_path):
    model.push_to_hub("tester/three-readers")
    for name, options in (("default", {}), ("dogs", {"subfolder": "dogs"})):
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        stock = PeftModel.from_pretrained(base, "tester/three-readers", cache_dir=tmp_path, **options).eval()
        with model.using(name):
            torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_the_card_lists_experts_method_weights_and_scores(model, tmp_path):
    model.push_to_hub("tester/card")
    card = ModelCard.load("tester/card")
    assert card.data.library_name == "peft"
    assert {"lora", "mixture-of-loras", "moa-peft"} <= set(card.data.tags)
    for piece in ("| cats | 4 |", "| dogs | 2 |", "`svd`", "cats 0.333", "| router accuracy | 0.987 |"):
        assert piece in card.text
    assert "[None]" not in card.content


def test_the_card_shows_the_largest_rank_of_an_expert(base_folder, make_adapter, tmp_path):
    wide = make_adapter(tmp_path / "wide", r=4, rank_pattern={"v_proj": 7})
    MoaModel.from_adapters(str(base_folder), {"wide": wide}).save_pretrained(tmp_path / "mixture")
    assert "| wide | 7 |" in (tmp_path / "mixture" / "README.md").read_text()


def card_of(base, form=None):
    config = MoaConfig(
        base,
        ["cats"],
        router=RouterConfig(layer=1),
        fallback=Fallback("svd", {"cats": 1.0}),
        sha256={"cats/adapter_model.safetensors": "0" * 64},
    )
    return ModelCard(fused_card(config, {"cats": 4}, form) if form else mixture_card(config, {"cats": 4}))


@pytest.mark.parametrize("form", [None, "adapter", "model"])
def test_a_card_tells_no_path_of_this_machine(base_folder, form):
    card = card_of(str(base_folder), form)
    assert card.data.base_model is None and "tiny-llama" in card.text
    assert str(base_folder.parent) not in card.content


@pytest.mark.parametrize(
    "base, named, loaded",
    [
        ("owner/model", "owner/model", 'AutoModelForCausalLM.from_pretrained("owner/model")'),
        ("smollm2-135m", None, 'load_base_model("smollm2-135m")'),
        ("/models/tiny", None, 'AutoModelForCausalLM.from_pretrained("FOLDER_OF_tiny")'),
    ],
)
def test_a_card_loads_the_base_as_another_machine_can(base, named, loaded):
    card = card_of(base)
    assert card.data.base_model == named
    assert f"base = {loaded}" in card.text and "AutoPeft" not in card.text


def test_a_relative_folder_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card_of("models/tiny").data.base_model is None


def test_the_command_pushes_a_new_merge_with_its_options(model, tmp_path, base_folder):
    model.save_pretrained(tmp_path / "mixture")
    merge = ["--method", "svd", "--weights", "1", "-1e-1", "0.5", "--scale", "0.8", "--rank", "3"]
    main([str(tmp_path / "mixture"), "tester/command", "--fused", "adapter", *merge])
    model.set_fallback("svd", weights=[1.0, -0.1, 0.5], scale=0.8, rank=3)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    stock = PeftModel.from_pretrained(base, "tester/command", cache_dir=tmp_path / "hub").eval()
    with model.using("default"):
        torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--metod", "svd"], "unknown option --metod; did you mean '--method'"),
        (["--fuse", "adapter"], "unknown option --fuse; did you mean '--fused'"),
        (["--scale", "2"], "--scale belongs to a new merge: name its --method too"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(refusal, hub, words, said):
    assert said in refusal(main, ["outputs/moa", "tester/nothing", *words])
    assert hub.log == []


def test_the_fused_adapter_is_pushed_alone(model, base_folder, tmp_path):
    model.set_fallback("ties", weights=[1.0, 1.0, 0.5])
    model.push_to_hub("tester/fused-adapter", fused="adapter")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    stock = PeftModel.from_pretrained(base, "tester/fused-adapter", cache_dir=tmp_path).eval()
    with model.using("default"):
        torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
    card = ModelCard.load("tester/fused-adapter")
    assert "`ties`" in card.text and "| films | 8 | 0.5 |" in card.text
    with pytest.raises(ValueError, match="no saved mixture"):
        MoaModel.from_pretrained(base, "tester/fused-adapter", cache_dir=tmp_path)


def test_the_fused_model_needs_no_peft(model, tmp_path):
    model.push_to_hub("tester/fused-model", fused="model")
    fused = AutoModelForCausalLM.from_pretrained("tester/fused-model", cache_dir=tmp_path).eval()
    with model.using("default"):
        torch.testing.assert_close(logits(fused), logits(model), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained("tester/fused-model", cache_dir=tmp_path)("the cat")["input_ids"]


def test_an_expert_can_be_loaded_from_the_hub(model, base_folder):
    model.push_to_hub("tester/source", fused="adapter")
    mixture = MoaModel.from_adapters(str(base_folder), {"fused": "tester/source"})
    with mixture.using("fused"), model.using("default"):
        torch.testing.assert_close(logits(mixture), logits(model), rtol=1e-5, atol=1e-5)


def test_an_unknown_form_is_refused_before_anything_is_sent(model, hub):
    with pytest.raises(ValueError, match="fused='modle' does not exist"):
        model.push_to_hub("tester/nothing", fused="modle")
    assert hub.log == []


DOORS = {
    "adapter": lambda: read_adapter("nobody/nothing"),
    "base model": lambda: open_base("nobody/nothing"),
    "mixture": lambda: MoaModel.from_pretrained(None, "nobody/nothing"),
}


@pytest.mark.parametrize("what", DOORS)
@pytest.mark.parametrize(("error", "said"), [(OSError(), "OSError"), (OSError("\nno route\nto host"), "no route")])
def test_a_download_that_fails_is_the_same_sentence_at_every_door(what, error, said, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    sentence = rf"there is no {what} folder nobody/nothing here, .* from the Hub either \({said}\): check the name"
    with pytest.raises(FileNotFoundError, match=sentence):
        DOORS[what]()


def test_an_interrupted_download_is_one_sentence_and_the_next_try_goes_on(model, hub, tmp_path):
    model.push_to_hub("tester/shaky")
    hub.fail(r"/resolve/.*/moa_router", status=403, times=20)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        MoaModel.from_pretrained(model.moa_config.base_model, "tester/shaky", cache_dir=tmp_path)
    for fault in hub._faults:
        fault[2] = 0
    assert MoaModel.from_pretrained(None, "tester/shaky", cache_dir=tmp_path).experts == model.experts
