"""The mixture against one adapter at a time, through stock PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.model import MoaModel
from moa.prefix import default_layer
from moa.router import SequenceRouter
from moa.routing import Routing

PROMPTS = ["the red cat sat .", "one dog ran", "review : the film good ? answer :"]


@pytest.fixture
def model(base_folder, adapters):
    return MoaModel.from_adapters(AutoModelForCausalLM.from_pretrained(base_folder), adapters)


@pytest.fixture
def tokens(base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left").data


@pytest.fixture
def router(model):
    """A router with random weights, scaled so that it does not choose one expert for everything."""
    torch.manual_seed(0)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight, std=3.0)
    return router


@pytest.fixture
def routed(model, router):
    model.set_router(router)
    return model


def stock(base_folder, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter).eval()


def logits(model, tokens, row=slice(None)):
    with torch.no_grad():
        return model(**{name: value[row] for name, value in tokens.items()}).logits


def test_each_sequence_of_a_mixed_batch_gets_what_its_adapter_alone_would_give(model, tokens, base_folder, adapters):
    names = ["films", "cats", "dogs"]
    with model.pinned(names):
        mixed = logits(model, tokens)
    for row, name in enumerate(names):
        alone = logits(stock(base_folder, adapters[name]), tokens, slice(row, row + 1))
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_equal_weights_are_the_average_of_the_updates(model, tokens):
    model.merge_adapters("average", into="merged")
    with model.pinned(Routing(torch.full((1, 3), 1 / 3))):
        mixed = logits(model, tokens)
    with model.using("merged"):
        torch.testing.assert_close(mixed, logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_one_adapter_alone_and_the_base_alone_equal_stock_peft(model, tokens, base_folder, adapters):
    with model.using("dogs"):
        torch.testing.assert_close(logits(model, tokens), logits(stock(base_folder, adapters["dogs"]), tokens))
    with model.using_base():
        base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
        torch.testing.assert_close(logits(model, tokens), logits(base, tokens))


def test_a_scale_multiplies_the_update_and_is_gone_after_the_block(model, tokens):
    model.merge_adapters("concatenation", adapters=["cats"], weights=[0.5], into="weaker")
    with model.using("weaker"):
        half = logits(model, tokens)
    with model.using("cats", scale=0.5):
        torch.testing.assert_close(logits(model, tokens), half, rtol=1e-4, atol=1e-4)
    with model.using("weaker"):
        torch.testing.assert_close(logits(model, tokens), half)


def test_a_forward_routes_on_the_base_models_hidden_states(routed, tokens):
    with routed.using_base():
        base = routed.get_base_model()
        hidden = base(**tokens, output_hidden_states=True).hidden_states[routed.moa_config.router.layer]
    mask = tokens["attention_mask"].bool()
    pooled = torch.stack([row[keep].mean(dim=0) for row, keep in zip(hidden, mask, strict=True)])
    expected = routed.moa_router(pooled).argmax(dim=-1).tolist()
    assert routed.route(**tokens).experts == expected
    automatic = logits(routed, tokens)
    with routed.pinned([routed.experts[index] for index in expected]):
        torch.testing.assert_close(automatic, logits(routed, tokens))


def test_the_answer_does_not_reach_the_router(routed, tokens):
    prompt_mask = torch.zeros_like(tokens["input_ids"], dtype=torch.bool)
    prompt_mask[:, -3:-1] = True
    other = {**tokens, "input_ids": tokens["input_ids"].clone()}
    other["input_ids"][:, -1] = 5
    first = routed.route(**tokens, prompt_mask=prompt_mask)
    torch.testing.assert_close(routed.route(**other, prompt_mask=prompt_mask).logits, first.logits)


def test_padding_on_either_side_gives_the_same_route(routed, base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    left, right = (
        routed.route(**tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side).data)
        for side in ("left", "right")
    )
    torch.testing.assert_close(left.logits, right.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["hard", "top_k", "soft"])
def test_generation_with_a_cache_equals_generation_without(routed, tokens, mode):
    routed.moa_config.routing = mode
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = routed.generate(**tokens, **options)
    assert torch.equal(cached, routed.generate(**tokens, **options, use_cache=False))


def test_a_generation_keeps_the_prompts_route_to_the_end(routed, tokens, base_folder, adapters):
    options = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    generated = routed.generate(**tokens, **options)
    for row, expert in enumerate(routed.route(**tokens).experts):
        alone = stock(base_folder, adapters[routed.experts[expert]])
        one = {name: value[row : row + 1] for name, value in tokens.items()}
        assert torch.equal(generated[row : row + 1], alone.generate(**one, **options))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_follow_their_prompts_route(routed, tokens, options, base_folder, adapters):
    generated = routed.generate(**tokens, max_new_tokens=5, do_sample=False, **options)
    per_prompt = options.get("num_return_sequences", 1)
    for row, expert in enumerate(routed.route(**tokens).experts):
        alone = stock(base_folder, adapters[routed.experts[expert]])
        one = {name: value[row : row + 1] for name, value in tokens.items()}
        expected = alone.generate(**one, max_new_tokens=5, do_sample=False, **options)
        got = generated[row * per_prompt : (row + 1) * per_prompt]
        assert torch.equal(got[:, : expected.shape[1]], expected)


def test_gradients_reach_only_the_pinned_expert(model, tokens):
    model.requires_grad_(True)
    with model.pinned(["cats", "cats", "cats"]):
        model(**tokens).logits.sum().backward()
    moved = {
        name
        for name in model.experts
        for parameter, value in model.named_parameters()
        if f".lora_B.{name}." in parameter and value.grad is not None and value.grad.abs().sum() > 0
    }
    assert moved == {"cats"}


def test_a_trained_expert_is_seen_by_the_next_forward(model, tokens):
    with model.pinned(["cats"] * 3):
        before = logits(model, tokens)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B.cats." in name:
                    parameter.mul_(2)
        assert not torch.allclose(before, logits(model, tokens))


def test_without_a_router_the_model_says_what_to_do(model, tokens):
    with pytest.raises(ValueError, match="no router: fit one"):
        model(**tokens)


def test_a_continuation_of_a_cache_that_no_route_filled_is_refused(routed, tokens):
    with routed.using("cats"):
        out = routed(**tokens, use_cache=True)
    with pytest.raises(ValueError, match="routes on the whole prompt"):
        routed(input_ids=tokens["input_ids"][:, -1:], past_key_values=out.past_key_values)


def test_weights_for_another_batch_are_refused(model, tokens):
    with (
        model.pinned(["cats", "dogs"]),
        pytest.raises(ValueError, match="is for 2 sequences, this batch has 3"),
    ):
        model(**tokens)


def test_an_unknown_expert_is_refused_by_name(model, tokens):
    with pytest.raises(ValueError, match="no expert is called 'birds'"), model.pinned(["birds"]):
        pass
    with pytest.raises(ValueError, match="no adapter is called 'birds'"), model.using("birds"):
        pass


def test_a_router_for_another_number_of_experts_is_refused(model):
    with pytest.raises(ValueError, match="4 outputs, the mixture 3 experts"):
        model.set_router(SequenceRouter(32, 4))


@pytest.mark.parametrize(
    "name",
    ["a.b", "a/b", "a b", "default", "type", "half", "0", "layers", "mlp", "q_proj", "model", "weight", "lora_A"],
)
def test_a_name_that_peft_cannot_hold_is_refused(base_model, adapters, name):
    with pytest.raises(ValueError, match="name|called"):
        MoaModel.from_adapters(base_model, {name: adapters["cats"]})


@pytest.mark.parametrize("name", ["3", "q_proj", "base_layer", "default"])
def test_a_merge_cannot_take_a_name_that_peft_would_mix_up(model, name):
    with pytest.raises(ValueError, match="name"):
        model.merge_adapters("average", into=name)
    assert name not in model.peft_config


def test_an_adapter_with_factors_that_are_not_finite_is_refused(base_model, adapters, tmp_path):
    shutil.copytree(adapters["cats"], tmp_path / "diverged")
    file = tmp_path / "diverged" / "adapter_model.safetensors"
    factors = load_file(file)
    factors[next(iter(factors))][0, 0] = float("inf")
    save_file(factors, file)
    with pytest.raises(ValueError, match="NaN or infinite"):
        MoaModel.from_adapters(base_model, {"diverged": tmp_path / "diverged"})


def test_a_base_that_holds_adapters_already_is_refused(base_model, adapters):
    MoaModel.from_adapters(base_model, adapters)
    with pytest.raises(ValueError, match="holds adapters already: load a fresh one"):
        MoaModel.from_adapters(base_model, adapters)


def test_a_base_that_is_partly_on_the_disk_is_refused(base_folder, adapters, tmp_path):
    inside = ("embed_tokens", "norm", "rotary_emb", *(f"layers.{layer}" for layer in (0, 2, 3)))
    places = {"model.layers.1": "disk", "lm_head": "cpu", **{f"model.{name}": "cpu" for name in inside}}
    base = AutoModelForCausalLM.from_pretrained(base_folder, device_map=places, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"such as 'model\.layers\.1\..*', are not in memory"):
        MoaModel.from_adapters(base, adapters)


def test_a_path_names_the_base_model_too(base_folder, adapters):
    assert MoaModel.from_adapters(Path(base_folder), adapters).experts == ("cats", "dogs", "films")


def test_with_adapters_disabled_the_base_model_answers(model, routed, tokens, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    expected = logits(base, tokens)
    with model.pinned(["cats", "dogs", "films"]), model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), expected)
    with routed.disable_adapter():
        torch.testing.assert_close(logits(routed, tokens), expected)
        generated = routed.generate(**tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, base.generate(**tokens, max_new_tokens=4, do_sample=False))


def test_disabled_adapters_need_no_router(model, tokens, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, tokens), logits(base, tokens))


def test_adapters_merged_into_the_base_are_not_added_twice(model, tokens):
    model.merge_adapter()
    with (
        model.pinned(["cats", "dogs", "films"]),
        pytest.raises(ValueError, match="merged cats into the base weights.*unmerge_adapter"),
    ):
        model(**tokens)


def test_adapter_names_pin_one_expert_a_sequence(model, tokens, base_folder, adapters):
    names = ["films", "cats", "dogs"]
    with torch.no_grad():
        mixed = model(**tokens, adapter_names=names).logits
    generated = model.generate(**tokens, adapter_names=names, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    for row, name in enumerate(names):
        alone = stock(base_folder, adapters[name])
        one = {key: value[row : row + 1] for key, value in tokens.items()}
        torch.testing.assert_close(mixed[row : row + 1], logits(alone, one), rtol=1e-4, atol=1e-4)
        expected = alone.generate(**one, min_new_tokens=4, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated[row : row + 1], expected)


def test_the_base_cannot_be_one_of_the_adapter_names(model, tokens):
    with pytest.raises(ValueError, match="cannot hold '__base__'.*using_base"):
        model(**tokens, adapter_names=["cats", "__base__", "dogs"])


def test_adapter_names_are_for_inference(model, tokens):
    with pytest.raises(ValueError, match="for inference"):
        model.train()(**tokens, adapter_names=["cats", "dogs", "films"])


@pytest.mark.parametrize("names", [[], "cats", ""])
def test_experts_are_pinned_by_a_list_of_names(model, names):
    with pytest.raises(ValueError, match="list with one name a sequence"), model.pinned(names):
        pass


def test_one_name_is_for_one_sequence_and_one_row_of_weights_for_all(model, tokens):
    with model.pinned(["cats"]), pytest.raises(ValueError, match="is for 1 sequence, this batch has 3"):
        model(**tokens)
    with model.using("cats"):
        expected = logits(model, tokens)
    with model.pinned(Routing(torch.tensor([[1.0, 0.0, 0.0]]))):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_beams_follow_a_pinned_name(model, tokens, base_folder, adapters):
    options = {"num_beams": 3, "min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False}
    one = {key: value[:1] for key, value in tokens.items()}
    with model.pinned(["dogs"]):
        generated = model.generate(**one, **options)
    assert torch.equal(generated, stock(base_folder, adapters["dogs"]).generate(**one, **options))


def test_a_shallow_model_has_a_layer_to_read(base):
    assert default_layer(base) == 1


def other_base(adapter, path):
    """A copy of an adapter whose config names another base model."""
    shutil.copytree(adapter, path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/model"}))
    return path


def test_adapters_of_two_bases_that_were_accepted_can_be_merged(base_model, adapters, tmp_path):
    experts = {"cats": adapters["cats"], "foreign": other_base(adapters["dogs"], tmp_path / "foreign")}
    mixture = MoaModel.from_adapters(base_model, experts, check_base=False)
    assert mixture.set_fallback("average").report.weights == pytest.approx({"cats": 0.5, "foreign": 0.5})


def test_an_unknown_method_leaves_the_fallback_there(model):
    model.set_fallback("average")
    with pytest.raises(ValueError, match="svdd"):
        model.set_fallback("svdd")
    assert "default" in model.peft_config


def test_an_adapter_of_another_base_model_is_refused(base_model, make_adapter, tmp_path):
    path = other_base(make_adapter(tmp_path / "own"), tmp_path / "foreign")
    with pytest.raises(ValueError, match="was trained on 'other/model'"):
        MoaModel.from_adapters(base_model, {"foreign": path})
    assert MoaModel.from_adapters(base_model, {"foreign": path}, check_base=False).experts == ("foreign",)


def test_a_mixed_batch_in_bf16_equals_each_adapter_alone_to_the_bit(base_folder, adapters, tokens):
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    model = MoaModel.from_adapters(base, adapters)
    with model.pinned(["films", "cats", "dogs"]):
        mixed = logits(model, tokens)
    for row, name in enumerate(["films", "cats", "dogs"]):
        with model.using(name):
            assert torch.equal(mixed[row], logits(model, tokens)[row])


@pytest.mark.parametrize(
    ("names", "repeats", "complaint"),
    [
        (("layers.3", "layers.7"), 1, r"adapts 'model.layers.7.*', which this model does not have"),
        (("q_proj", "other_proj"), 1, r"adapts 'model.layers.0.self_attn.other_proj'"),
        (("", ""), 2, r"for another base model.*reads 64 and writes 32 numbers, this model's 32 and 32"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_model_is_refused_before_it_is_loaded(
    base_model, adapters, tmp_path, names, repeats, complaint
):
    folder = shutil.copytree(adapters["cats"], tmp_path / "other")
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {
        key.replace(*names): torch.cat([tensor] * repeats, dim=1) if ".lora_A." in key else tensor
        for key, tensor in tensors.items()
    }
    save_file(changed, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(*names))
    before = set(base_model.state_dict())
    with pytest.raises(ValueError, match=complaint):
        MoaModel.from_adapters(base_model, {"dogs": adapters["dogs"], "other": folder})
    assert set(base_model.state_dict()) == before
    model = MoaModel.from_adapters(base_model, {"dogs": adapters["dogs"]})
    with pytest.raises(ValueError, match=complaint):
        model.add_expert("other", folder)
    assert list(model.peft_config) == ["dogs"]
