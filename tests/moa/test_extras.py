"""What an adapter holds beside plain factors is read as PEFT applies it, written so that PEFT reads it, or refused."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from moa.adapters import EMBEDDING, AdapterError, Extras, Kind, Tokens, add_to_model, from_model, read_adapter
from moa.adapters import write_adapter as write
from moa.assembly import check_gated
from moa.base_weights import open_base
from moa.low_rank import LowRank

Q = "model.layers.0.self_attn.q_proj"
SETTINGS = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True}
KINDS = {
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "some biases": {"bias": "lora_only"},
    "a head": {"modules_to_save": ["lm_head"]},
    "blocks": {"modules_to_save": ["mlp", "norm"]},
    "tokens": {"trainable_token_indices": [7, 3]},
    "tokens of both ends": {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2, 0]}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA on an embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
}
TIED = {
    "tokens": {"trainable_token_indices": [7, 3]},
    "head and embedding kept one": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "the embedding alone": {"modules_to_save": ["embed_tokens"]},
    "LoRA on both, kept one": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


def llama(cls=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return cls(LlamaConfig(**{**sizes, **heads, **changes})).eval()


@pytest.fixture(scope="module")
def base():
    return llama()


def trained(base, folder=None, **config):
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**{**SETTINGS, **config})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        if folder:
            model.save_pretrained(folder)
    return model


def rewrite(adapter, folder):
    return write(
        folder,
        adapter.modules,
        base_model=None,
        dtype=torch.float32,
        kinds=adapter.kinds,
        extras=adapter.extras,
        task_type=adapter.config.get("task_type"),
    )


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40).view(4, 10)).logits


@pytest.mark.filterwarnings("ignore:.*is not read. PEFT stores the base model's own")
@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_loads_what_is_written_with_the_same_logits(kind, base, tmp_path):
    model = trained(base, tmp_path / "a", **KINDS[kind])
    for number, adapter in enumerate((read_adapter(tmp_path / "a"), from_model(model, "default"))):
        assert bool(adapter.extras) == (kind != "embedding")
        rewrite(adapter, tmp_path / f"out{number}")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"out{number}").eval()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    first, second = (load_file(tmp_path / f"out{i}" / "adapter_model.safetensors") for i in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:.*is not read. PEFT stores the base model's own")
@pytest.mark.parametrize("kind", TIED)
def test_a_base_model_whose_head_is_its_embedding_keeps_what_was_trained(kind, tmp_path):
    base = llama(tie_word_embeddings=True)
    model = trained(base, tmp_path / "a", **TIED[kind])
    rewrite(read_adapter(tmp_path / "a"), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_classifier_carries_its_head(tmp_path):
    base = llama(LlamaForSequenceClassification, num_labels=3, pad_token_id=0)
    model = trained(base, tmp_path / "a", task_type="SEQ_CLS")
    adapter = read_adapter(tmp_path / "a")
    assert list(adapter.extras.saved) == ["score.weight"]
    rewrite(adapter, tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_extras_are_what_peft_applies(base, tmp_path):
    """Values by their definitions, from the tensors of the live model."""
    model = trained(base, tmp_path / "a", lora_bias=True)
    layer = model.get_base_model().get_submodule(Q)
    expected = layer.lora_B["default"].bias * (5 / 3**0.5)
    torch.testing.assert_close(read_adapter(tmp_path / "a").extras.lora_bias[Q], expected)
    model = trained(base, tmp_path / "b", trainable_token_indices=[7, 3])
    weight = model.get_base_model().get_input_embeddings().token_adapter.get_merged_weights(["default"])
    tokens = read_adapter(tmp_path / "b").extras.tokens["model.embed_tokens"]
    assert tokens.indices.tolist() == [7, 3] and torch.equal(tokens.rows, weight[[7, 3]])
    model = trained(base, tmp_path / "c", use_dora=True)
    layer = model.get_base_model().get_submodule(Q)
    assert torch.equal(read_adapter(tmp_path / "c").extras.magnitude[Q], layer.lora_magnitude_vector["default"].weight)
    trained(base, tmp_path / "d", bias="lora_only", modules_to_save=["norm"])
    names = read_adapter(tmp_path / "d").extras.names
    assert names == {
        "trained biases": [f"{Q}.bias", "model.layers.0.self_attn.v_proj.bias"],
        "modules_to_save": [
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
            "model.norm.weight",
        ],
    }


@pytest.mark.filterwarnings("ignore:.*is not read. PEFT stores the base model's own")
def test_an_embeddings_update_is_that_of_its_transpose(base, tmp_path):
    model = trained(base, tmp_path / "a", target_modules=["embed_tokens"])
    adapter = read_adapter(tmp_path / "a")
    delta = model.get_base_model().model.embed_tokens.get_delta_weight("default")
    torch.testing.assert_close(adapter.modules["model.embed_tokens"].delta().T, delta)
    assert adapter.kinds == {"model.embed_tokens": EMBEDDING}
    assert adapter.shapes["model.embed_tokens"] == (16, 3, 40)


def test_a_convolutions_update_is_flattened(tmp_path):
    base = nn.Sequential(nn.Conv2d(3, 6, (3, 2), padding=1))
    model = trained(base, tmp_path / "a", target_modules=["0"])
    adapter = read_adapter(tmp_path / "a")
    delta = model.get_base_model()[0].get_delta_weight("default")
    torch.testing.assert_close(adapter.modules["0"].delta().view(6, 3, 3, 2), delta)
    assert adapter.kinds == {"0": Kind("convolution", (3, 3, 2))}


def test_nothing_is_read_before_it_is_asked_for(base, tmp_path):
    trained(base, tmp_path / "a", modules_to_save=["lm_head"], use_dora=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v * float("nan") if "lm_head" in k or "magnitude" in k else v for k, v in tensors.items()}, file)
    adapter = read_adapter(tmp_path / "a")
    for read in (lambda: adapter.extras.saved["lm_head.weight"], lambda: adapter.extras.magnitude[Q]):
        with pytest.raises(AdapterError, match="hold NaN or infinite values"):
            read()
    with pytest.raises(KeyError):
        adapter.extras.saved["score.weight"]


# Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector", "use_dora=True and the weights hold 1 tensors .* 2 layers"),
        ({"lora_bias": True}, "lora_B.bias", "lora_bias=True and the weights hold 1 tensors"),
    ],
)
def test_a_file_that_lost_a_part_is_refused(config, change, message, base, tmp_path):
    trained(base, tmp_path / "a", **config)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if change in key)]
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1], "names another number of tokens than the 2"),
        ({"wte": [1, 2]}, "does not say which tokens 'model.embed_tokens' has"),
    ],
)
def test_token_indices_that_do_not_fit_their_rows_are_refused(indices, message, base, tmp_path):
    trained(base, tmp_path / "a", trainable_token_indices=[7, 3])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": indices}))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:.*is not read. PEFT stores the base model's own")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bias": "all"}, "changes more than linear layers by bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"changes more than linear layers by modules_to_save=\['lm_head'\]"),
        ({"trainable_token_indices": [1]}, r"changes more than linear layers by trainable_token_indices=\[1\]"),
        (
            {"target_modules": ["embed_tokens"]},
            "adapts the embedding 'model.embed_tokens', and a mixture gates linear",
        ),
    ],
)
def test_a_mixture_refuses_what_its_gated_layer_cannot_run(config, message, base, tmp_path):
    model = trained(base, tmp_path / "a", **config)
    for adapter in (read_adapter(tmp_path / "a"), from_model(model, "default")):
        with pytest.raises(AdapterError, match=message):
            check_gated(adapter)


def test_what_peft_cannot_store_is_not_written(tmp_path):
    update = LowRank(torch.ones(3, 1), torch.ones(1, 3))
    one = torch.ones(3)
    for extras, kinds, message in (
        (Extras(magnitude={"a": one}), {}, "needs one for every layer, and 'b' has none"),
        (Extras(magnitude={"a": one, "b": one}, lora_bias={"a": one}), {}, "do not go together: PEFT counts the bias"),
        (Extras(lora_bias={"a": one}), {"b": EMBEDDING}, "PEFT has no lora_bias for embeddings"),
        (Extras(saved={"a.weight": one}), {}, "'a' is trained as a whole .* and also by a LoRA"),
        (Extras(tokens={"a": Tokens(torch.tensor([0]), one[None])}), {}, "'a' is trained for some tokens"),
        (Extras(saved={"c.weight": one * float("inf")}), {}, "the values of 'c.weight' hold NaN"),
    ):
        with pytest.raises(AdapterError, match=message):
            write(
                tmp_path / "out",
                {"a": update, "b": update},
                base_model=None,
                dtype=torch.float32,
                kinds=kinds,
                extras=extras,
            )
    assert list(tmp_path.iterdir()) == []


def test_trained_biases_are_not_added_to_a_model_that_shares_them(base, tmp_path):
    model = trained(base, tmp_path / "a", bias="all")
    adapter = read_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match="changes the base model's own .* which all adapters of a live model share"):
        add_to_model(model, "new", adapter.modules, extras=adapter.extras)


# The base model's weights ------------------------------------------------------------------------------------


@pytest.fixture
def folder(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_folder_in_one_file_or_in_shards_gives_the_models_tensors(base, tmp_path):
    base.save_pretrained(tmp_path / "one")
    base.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for source in (base, tmp_path / "one", str(tmp_path / "shards")):
        weights = open_base(source)
        for name, value in base.state_dict().items():
            assert torch.equal(weights.tensor(name), value)


def test_a_model_that_peft_has_wrapped_gives_its_base_weights(base):
    model = trained(base, modules_to_save=["mlp"], trainable_token_indices=[3], use_dora=True)
    weights = open_base(model)
    for name, value in base.state_dict().items():
        assert torch.equal(weights.tensor(name), value)


def test_a_weight_is_the_matrix_that_an_update_is_added_to(base):
    weights = open_base(base)
    assert torch.equal(weights.weight("model.embed_tokens", (16, 40), EMBEDDING), base.model.embed_tokens.weight.T)
    assert torch.equal(weights.weight("lm_head", (40, 16)), base.lm_head.weight)
    with pytest.raises(AdapterError, match=r"'lm_head' is \[40, 16\] in the base model .* a matrix of \[41, 16\]"):
        weights.weight("lm_head", (41, 16))


def test_layers_that_are_stored_transposed_are_turned(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    base.save_pretrained(tmp_path / "base")
    for weights in (open_base(base), open_base(tmp_path / "base")):
        square, wide = "transformer.h.0.attn.c_proj", "transformer.h.0.attn.c_attn"
        assert torch.equal(weights.weight(square, (16, 16)), base.get_submodule(square).weight.T)
        assert torch.equal(weights.weight(wide, (48, 16)), base.get_submodule(wide).weight.T)
        assert torch.equal(weights.weight("lm_head", (32, 16)), base.lm_head.weight)  # tied: the file has none


def test_tensors_that_transformers_stores_under_other_names_are_found(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path)
    assert "vit.layers.0.attention.q_proj.weight" not in load_file(tmp_path / "model.safetensors")
    weights = open_base(tmp_path)
    for name, value in ViTForImageClassification.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(weights.tensor(name), value)
    with pytest.raises(AdapterError, match="has no 'vit.layers.2.attention.q_proj.weight'"):
        weights.tensor("vit.layers.2.attention.q_proj.weight")


def test_what_is_no_base_model_is_refused_with_the_way_out(base, folder, tmp_path):
    merged = trained(base)
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights of this model: call unmerge_adapter"):
        open_base(merged)
    with pytest.raises(AdapterError, match="has changed the base weights .* pass a fresh base model"):
        open_base(trained(base, init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="has changed the base weights"):
        open_base(trained(base, bias="all"))
    with pytest.raises(TypeError, match="base must be a folder, a Hub name or a model, got int"):
        open_base(3)
    with pytest.raises(FileNotFoundError, match="there is no base model folder .*nowhere: check the path"):
        open_base(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="has no 'score.weight': pass as base the model"):
        open_base(folder).tensor("score.weight")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterError, match="is damaged or incomplete"):
        open_base(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        AdapterError, match=r"holds no model.safetensors .*\(a pickle such as pytorch_model.bin is never"
    ):
        open_base(folder)


def test_quantised_weights_are_refused(base, folder):
    file = folder / "model.safetensors"
    save_file({k: v.to(torch.uint8) if "q_proj.weight" in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match=f"stores '{Q}.weight' as torch.uint8, which looks quantised"):
        open_base(folder).tensor(f"{Q}.weight")


def test_a_base_model_on_the_hub_is_downloaded_without_its_pickles(folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(shutil.copytree(folder, tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_base("user/model").name == "user/model"
    assert not any(pattern.endswith(".bin") for pattern in asked["user/model"])
