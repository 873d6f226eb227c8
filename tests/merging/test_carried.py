"""Whatever adapters hold merges to the weighted sum of what stock PEFT makes of them, or is refused by name."""

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moa.adapters import AdapterError, Extras, add_to_model, from_model, read_adapter
from moa.base_weights import open_base
from moa.low_rank import LowRank
from moa.merging import find_method, merge, merge_recipe, read_recipe
from moa.merging.cli import main
from moa.merging.dora import row_norms

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
ONE = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 5}
TWO = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 2}
EMBEDDED = {"target_modules": ["q_proj", "embed_tokens"]}
PAIRS = {
    "DoRA twice": ({**ONE, "use_dora": True}, {**TWO, "use_dora": True}),
    "DoRA and LoRA": ({**ONE, "use_dora": True}, TWO),
    "LoRA on embeddings": (EMBEDDED, {**EMBEDDED, "r": 2, "use_rslora": True}),
    "LoRA on an embedding and the head": (EMBEDDED, {**TWO, "target_modules": ["embed_tokens", "lm_head"]}),
    "DoRA on an embedding": ({**EMBEDDED, "use_dora": True}, EMBEDDED),
    "lora_bias once": ({**ONE, "target_modules": ["q_proj"], "lora_bias": True}, ONE),
    "lora_bias twice": (
        {**ONE, "lora_bias": True},
        {"target_modules": ["q_proj", "k_proj"], "use_rslora": True, "lora_bias": True},
    ),
    "bias of all and of some": ({**ONE, "bias": "all"}, {**TWO, "target_modules": ["k_proj"], "bias": "lora_only"}),
    "bias of some": ({**ONE, "bias": "lora_only"}, TWO),
    "whole modules": (
        {**ONE, "modules_to_save": ["lm_head"]},
        {**ONE, "modules_to_save": ["lm_head", "mlp", "norm"]},
    ),
    "a whole module once": ({**ONE, "modules_to_save": ["embed_tokens"]}, TWO),
    "tokens": (
        {**ONE, "trainable_token_indices": [3, 5, 39]},
        {**TWO, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7]}},
    ),
    "DoRA, tokens and a whole module": (
        {**ONE, "use_dora": True, "trainable_token_indices": [0, 2]},
        {**TWO, "modules_to_save": ["lm_head"]},
    ),
}
WEIGHTS = [0.7, -0.4]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama with biases, in memory and in a folder."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, attention_bias=True, **SIZES)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def trained(base, folder, seed, **config):
    """A PEFT model of which everything that its config trains has moved, saved as PEFT does."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 3, **config})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(folder, save_embedding_layers=False)
    return model


def weights_of(model):
    """Every weight of the base model as PEFT itself changes it."""
    return {name: value.double() for name, value in copy.deepcopy(model).merge_and_unload().state_dict().items()}


def dense_sum(base, models, weights):
    """W0 + sum_i w_i (W_i - W0), from PEFT's own weights."""
    origin = {name: value.double() for name, value in base.state_dict().items()}
    changed = [weights_of(model) for model in models]
    return {
        name: value + sum(w * (theirs[name] - value) for w, theirs in zip(weights, changed, strict=True))
        for name, value in origin.items()
    }


def assert_loads_as(expected, base, folder, inputs):
    """Stock PEFT loads the folder into a model with exactly these weights, and computes what they compute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not in the).*")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    got = weights_of(loaded)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    dense = copy.deepcopy(base)
    dense.load_state_dict(expected)
    with torch.no_grad():
        torch.testing.assert_close(output(loaded, inputs), output(dense, inputs), rtol=1e-5, atol=1e-6)
        assert (output(dense, inputs) - output(base, inputs)).abs().max() > 1e-3
    return loaded


def output(model, inputs):
    result = model(inputs)
    return getattr(result, "logits", result)


@pytest.fixture
def folders(base, tmp_path):
    def make(one, two):
        return [
            trained(base, tmp_path / name, seed, **c) for seed, (name, c) in enumerate({"a": one, "b": two}.items())
        ]

    return make


@pytest.mark.parametrize("pair", PAIRS)
def test_a_linear_merge_is_the_weighted_sum_of_the_changes_that_peft_makes(pair, base, folders, tmp_path):
    models = folders(*PAIRS[pair])
    method = "weighted_sum" if "whole" in pair else "concatenation"
    result = merge([tmp_path / "a", tmp_path / "b"], method, weights=WEIGHTS, base=base, output=tmp_path / "out")
    expected = dense_sum(base, models, WEIGHTS)
    loaded = assert_loads_as(expected, base, tmp_path / "out", torch.arange(40).view(4, 10))
    assert {m.scaling["default"] for m in loaded.modules() if hasattr(m, "lora_A")} == {1.0}
    again = merge([tmp_path / "out"], method, weights=[1.0], base=base)
    assert again.report.carried.keys() == result.report.carried.keys()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_folder_a_live_model_and_a_peft_model_as_base_give_the_same_bits(pair, base, folders, tmp_path):
    models = folders(*PAIRS[pair])
    sources = [tmp_path / "a", tmp_path / "b"]
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    live = [from_model(model, "default") for model in models]
    results = [
        merge(sources, "svd", base=base.name_or_path),
        merge(sources, "svd", base=base),
        merge(sources, "svd", base=wrapped),
        merge(live, "svd", base=base),
    ]
    first = results[0]
    for other in results[1:]:
        assert other.report.carried == first.report.carried and other.kinds == first.kinds
        for module, update in first.modules.items():
            assert torch.equal(update.B, other.modules[module].B) and torch.equal(update.A, other.modules[module].A)
        for what in ("magnitude", "lora_bias", "base_bias", "saved"):
            for name, value in getattr(first.extras, what).items():
                assert torch.equal(value, getattr(other.extras, what)[name])
        for name, tokens in first.extras.tokens.items():
            assert torch.equal(tokens.rows, other.extras.tokens[name].rows)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.startswith("bias")])
def test_a_merge_added_to_a_live_model_computes_what_its_folder_does(pair, base, folders, tmp_path):
    folders(*PAIRS[pair])
    result = merge([tmp_path / "a", tmp_path / "b"], weights=WEIGHTS, base=base, output=tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    tokens = torch.arange(40).view(4, 10)
    with torch.no_grad():
        before = model(tokens).logits
        add_to_model(model, "merged", result.modules, kinds=result.kinds, extras=result.extras)
        assert torch.equal(model(tokens).logits, before)
        assert not any(p.requires_grad for n, p in model.named_parameters() if "merged" in n)
        model.set_adapter("merged")
        torch.testing.assert_close(model(tokens).logits, loaded(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", ["DoRA twice", "lora_bias twice", "bias of some", "whole modules", "tokens"])
def test_one_adapter_of_weight_one_gives_itself_back(pair, base, tmp_path):
    live = from_model(trained(base, tmp_path / "a", 0, **PAIRS[pair][0]), "default")
    result = merge([tmp_path / "a"], weights=[1.0], base=base)
    for what in ("magnitude", "lora_bias", "base_bias", "saved"):
        for key, value in getattr(live.extras, what).items():
            torch.testing.assert_close(getattr(result.extras, what)[key], value, rtol=1e-5, atol=1e-6)
    for module, update in live.modules.items():
        torch.testing.assert_close(result.modules[module].delta(), update.delta(), rtol=1e-5, atol=1e-6)


def test_a_head_that_the_base_model_ties_is_compared_with_its_embedding(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "tie_word_embeddings": True, **SIZES}
    base = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    model = trained(base, tmp_path / "a", 0, **ONE, modules_to_save=["lm_head"])
    result = merge([tmp_path / "a"], weights=[0.5], base=tmp_path / "base", check_base=False)
    embedding = base.model.embed_tokens.weight
    expected = embedding + 0.5 * (model.base_model.model.lm_head.modules_to_save["default"].weight - embedding)
    torch.testing.assert_close(result.extras.saved["lm_head.weight"], expected.detach())


def test_layers_of_gpt2_merge_in_their_own_orientation_also_when_square(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=False)
    ).eval()
    base.save_pretrained(tmp_path / "base")
    config = {"target_modules": ["attn.c_proj", "c_attn", "lm_head"], "use_dora": True, "fan_in_fan_out": True}
    models = [trained(base, tmp_path / name, seed, **config) for seed, name in enumerate("ab")]
    expected = dense_sum(base, models, WEIGHTS)
    # the file calls its layers "h.0", as the oldest ones on the Hub do
    file = tmp_path / "base" / "model.safetensors"
    save_file({key.removeprefix("transformer."): value for key, value in load_file(file).items()}, file)
    for number, given in enumerate((base, tmp_path / "base")):
        out = tmp_path / f"out{number}"
        merge(
            [tmp_path / "a", tmp_path / "b"],
            "concatenation",
            weights=WEIGHTS,
            base=given,
            output=out,
            check_base=False,
        )
        assert_loads_as(expected, base, out, torch.arange(8)[None])


class Pictures(nn.Module):
    """Convolutions in one and two dimensions, the second of them narrow."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.narrow = nn.Conv2d(6, 4, 1)
        self.line = nn.Conv1d(4, 5, 3)

    def forward(self, x):
        return self.line(self.narrow(torch.relu(self.wide(x))).flatten(2))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_merge_as_the_matrices_they_are(dora, tmp_path):
    torch.manual_seed(0)
    base = Pictures().eval()
    configs = [
        {"target_modules": ["wide", "narrow", "line"], "use_dora": dora},
        {"target_modules": ["wide", "line"], "r": 2, "lora_bias": not dora},
    ]
    models = [trained(base, tmp_path / name, i, **c) for i, (name, c) in enumerate(zip("ab", configs, strict=True))]
    result = merge(
        [tmp_path / "a", tmp_path / "b"], "concatenation", weights=WEIGHTS, base=base, output=tmp_path / "out"
    )
    assert result.modules["wide"].shape == (6, 18)
    image = torch.randn(2, 3, 8, 8)
    loaded = assert_loads_as(dense_sum(base, models, WEIGHTS), base, tmp_path / "out", image)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["wide"])).eval()
    add_to_model(model, "merged", result.modules, kinds=result.kinds, extras=result.extras)
    model.set_adapter("merged")
    torch.testing.assert_close(model(image), loaded(image), rtol=1e-5, atol=1e-6)


# DoRA --------------------------------------------------------------------------------------------------------


def test_row_norms_are_those_of_the_dense_matrix():
    torch.manual_seed(0)
    W0, update = torch.randn(7, 5), LowRank(torch.randn(7, 2), torch.randn(2, 5))
    expected = (W0.double() + update.B.double() @ update.A.double()).norm(dim=1)
    torch.testing.assert_close(row_norms(W0, update, rows_at_once=3), expected, rtol=1e-12, atol=0)


def test_dora_whose_gains_are_one_merges_as_the_lora_that_it_is(base, folders, tmp_path):
    """m = ||W0 + B A||_row makes a DoRA adapter equal to the LoRA of its factors."""
    folders({**ONE, "use_dora": True}, ONE)
    plain = from_model(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b"), "default").modules
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    for module, update in plain.items():
        dense = base.get_submodule(module).weight.double() + update.delta().double()
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = dense.norm(dim=1).float()
    save_file(tensors, file)
    for method in ("concatenation", "ties"):
        as_dora = merge([tmp_path / "a", tmp_path / "b"], method, weights=[1.0, 0.5], base=base)
        as_lora = merge([tmp_path / "b", tmp_path / "b"], method, weights=[1.0, 0.5])
        for module, update in as_lora.modules.items():
            torch.testing.assert_close(as_dora.modules[module].delta(), update.delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["average", "svd", "ties", "slerp"])
def test_every_method_makes_a_dora_adapter_of_what_it_makes_of_the_gained_updates(method, base, folders, tmp_path):
    """W_M = diag(h) W0 + M, with M the method's merge of diag(g_i) B_i A_i and h of the weighted gains."""
    models = folders({**ONE, "use_dora": True}, {**ONE, "r": 2})
    merge([tmp_path / "a", tmp_path / "b"], method, weights=[0.6, 0.3], base=base, output=tmp_path / "out")
    merged = weights_of(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out"))
    dora, plain = (from_model(model, "default", dtype=torch.float64) for model in models)
    share = 0.6 / 0.9 if find_method(method).degree == 0 else 0.6
    for module, update in dora.modules.items():
        W0 = base.get_submodule(module).weight.detach().double()
        g = dora.extras.magnitude[module].detach() / (W0 + update.delta()).norm(dim=1)
        gained = replace(dora, modules={module: LowRank(g[:, None] * update.B, update.A)}, extras=Extras())
        other = replace(plain, modules={module: plain.modules[module]})
        expected = merge([gained, other], method, weights=[0.6, 0.3], dtype="float64").modules[module].delta()
        got = merged[f"{module}.weight"] - (1 + share * (g - 1))[:, None] * W0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_and_restored_norms_hold_for_the_whole_change_of_a_layer(base, folders, tmp_path):
    models = folders({**ONE, "use_dora": True}, {**ONE, "use_dora": True, "modules_to_save": ["lm_head"]})
    merge(
        [tmp_path / "a", tmp_path / "b"],
        "concatenation",
        weights=WEIGHTS,
        scale=0.5,
        base=base,
        output=tmp_path / "out",
    )
    expected = dense_sum(base, models, [0.5 * w for w in WEIGHTS])
    assert_loads_as(expected, base, tmp_path / "out", torch.arange(10)[None])


def test_factors_in_bfloat16_keep_magnitudes_and_biases_in_float32(base, folders, tmp_path):
    """The error of the result is that of its factors: a magnitude in bfloat16 would add 0.4 % of the base weight."""
    for pair in ("DoRA twice", "lora_bias twice"):
        models = folders(*PAIRS[pair])
        sources, out = [tmp_path / "a", tmp_path / "b"], tmp_path / pair.replace(" ", "_")
        result = merge(sources, "concatenation", weights=WEIGHTS, base=base, dtype="bfloat16", output=out)
        stored = {str(t.dtype) for t in load_file(out / "adapter_model.safetensors").values()}
        assert stored == {"torch.bfloat16", "torch.float32"}
        got, expected = (
            weights_of(PeftModel.from_pretrained(copy.deepcopy(base), out)),
            dense_sum(base, models, WEIGHTS),
        )
        for module in result.modules:
            W0, W = base.get_submodule(module).weight.double(), expected[f"{module}.weight"]
            assert (got[f"{module}.weight"] - W).norm() < 0.01 * (W - W0).norm()
            bias = f"{module}.bias"
            if bias in expected:
                torch.testing.assert_close(got[bias], expected[bias], rtol=1e-5, atol=1e-6)


def test_weights_that_take_the_base_models_rows_away_are_refused(base, folders, tmp_path):
    folders({**ONE, "use_dora": True}, ONE)
    adapter = read_adapter(tmp_path / "a")
    module = next(iter(adapter.modules))
    W0 = base.get_submodule(module).weight
    g = adapter.extras.magnitude[module].double() / row_norms(W0, adapter.modules[module])
    with pytest.raises(AdapterError, match=f"1 rows of '{module}' lose the base model's part"):
        merge([adapter], "concatenation", weights=[float(1 / (1 - g[0]))], base=base)


# Initialisations that change the base ------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_took_part_of_the_base_is_merged_on_the_stock_base(init, dora, base, tmp_path):
    config = {**ONE, "init_lora_weights": init, "use_rslora": True, "use_dora": dora}
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, **config)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "after")
    other = trained(base, tmp_path / "other", 4, **TWO)
    expected = dense_sum(base, [model, other], WEIGHTS)
    result = merge(
        [tmp_path / "after", tmp_path / "other"],
        "concatenation",
        weights=WEIGHTS,
        base=base,
        initial={"after": tmp_path / "before"},
        output=tmp_path / "out",
    )
    assert_loads_as(expected, base, tmp_path / "out", torch.arange(10)[None])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert result.report.sources[0].initial_sha256 and result.report.sources[1].initial_sha256 is None
    again = merge_recipe(read_recipe(tmp_path / "out"), beside=tmp_path / "out", base=base, output=tmp_path / "again")
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in (tmp_path / "out", again.path)]
    assert weights[0] == weights[1]
    with pytest.raises(AdapterError, match=f"initialised by '{init}', which changes the base weights"):
        merge([tmp_path / "after", tmp_path / "other"])


def test_an_initial_adapter_that_is_not_it_is_refused(base, folders, tmp_path):
    folders(ONE, TWO)
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(AdapterError, match="holds the weights of .* itself: give the adapter as it was before"):
        merge([a, b], initial={"a": a})
    with pytest.raises(AdapterError, match=r"has r=2 and .* has 3|has lora_alpha"):
        merge([a, b], initial={str(a): b})
    with pytest.raises(ValueError, match="initial names 'x', and 0 folders to merge are called so"):
        merge([a, b], initial={"x": b})
    (tmp_path / "deep").mkdir()
    a.rename(tmp_path / "deep" / "b")
    with pytest.raises(ValueError, match="initial names 'b', and 2 folders to merge are called so"):
        merge([tmp_path / "deep" / "b", b], initial={"b": b})


# What cannot be merged ---------------------------------------------------------------------------------------


def refusal(sources, words, **options):
    with pytest.raises((AdapterError, ValueError)) as caught:
        merge(sources, **options)
    message = str(caught.value)
    assert "\n" not in message and re.search(words, message), message


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (
            {**ONE, "lora_bias": True},
            {**TWO, "use_dora": True},
            "do not go together: PEFT counts the bias into the row",
        ),
        ({**ONE, "lora_bias": True}, EMBEDDED, "PEFT has no lora_bias for embeddings"),
        (
            {**ONE, "modules_to_save": ["mlp"]},
            TWO,
            r"'model.layers.0.mlp.down_proj' is trained as a whole .* by a LoRA",
        ),
        (
            {**ONE, "modules_to_save": ["embed_tokens"]},
            {**ONE, "trainable_token_indices": [1]},
            "'model.embed_tokens' is trained as a whole .* for some tokens",
        ),
        ({**ONE, "trainable_token_indices": [1]}, EMBEDDED, "trained for some tokens .* and also by a LoRA"),
    ],
)
def test_what_peft_cannot_hold_in_one_adapter_is_refused(one, two, message, base, folders, tmp_path):
    folders(one, two)
    refusal([tmp_path / "a", tmp_path / "b"], message, base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.startswith(("lora_bias", "LoRA"))])
def test_what_needs_the_base_model_says_so(pair, folders, tmp_path):
    folders(*PAIRS[pair])
    refusal([tmp_path / "a", tmp_path / "b"], r"adapter '.' holds .*, whose merge depends on .* pass base=")


def test_a_bias_of_lora_b_needs_no_base_model(folders, tmp_path):
    folders(*PAIRS["lora_bias twice"])
    result = merge([tmp_path / "a", tmp_path / "b"])
    assert list(result.report.carried) == ["lora_bias"] and result.report.base_weights is None


def test_whole_modules_for_other_labels_are_refused_by_name(base, folders, tmp_path):
    folders(*[{**ONE, "modules_to_save": ["lm_head"]}] * 2)
    file = tmp_path / "b" / "adapter_model.safetensors"
    key = "base_model.model.lm_head.weight"
    save_file({**load_file(file), key: torch.randn(3, 16)}, file)
    message = r"'lm_head.weight' is \[40, 16\] in adapter 'a' and \[3, 16\] in 'b': they have other labels"
    refusal([tmp_path / "a", tmp_path / "b"], message, base=base)
    refusal(
        [tmp_path / "b"], r"'lm_head.weight' is \[3, 16\] in adapter 'b' and \[40, 16\] in the base model", base=base
    )


def test_a_head_that_the_base_model_lacks_or_a_token_beyond_its_vocabulary_is_refused(base, folders, tmp_path):
    folders({**ONE, "modules_to_save": ["lm_head"]}, {**ONE, "trainable_token_indices": [39]})
    headless = copy.deepcopy(base).model
    refusal([tmp_path / "a"], "has no 'lm_head.weight': pass as base the model", base=headless, check_base=False)
    smaller = copy.deepcopy(base)
    smaller.resize_token_embeddings(39)
    refusal([tmp_path / "b"], "trained token 39 of 'model.embed_tokens' .* has 39 tokens of 16", base=smaller)


def test_another_base_model_than_the_adapters_is_refused(base, folders, tmp_path):
    folders(*PAIRS["DoRA and LoRA"])
    other = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=24, **SIZES))
    other.save_pretrained(tmp_path / "other")
    sources = [tmp_path / "a", tmp_path / "b"]
    refusal(sources, "was trained on .* and base is .*: pass its own base model", base=tmp_path / "other")
    refusal(sources, r"is \[32, 24\] in the base model .* \[16, 24\]", base=tmp_path / "other", check_base=False)


def test_weights_without_a_sum_are_refused_where_a_method_divides_by_it(base, folders, tmp_path):
    folders(*PAIRS["whole modules"])
    refusal([tmp_path / "a", tmp_path / "b"], "add up to zero", method="model_stock", weights=[1, -1], base=base)


def test_convolutions_of_other_kernels_are_refused(tmp_path):
    for name, layer in {"a": nn.Conv1d(2, 4, 3), "b": nn.Conv1d(3, 4, 2)}.items():
        trained(nn.Sequential(layer), tmp_path / name, 0, target_modules=["0"])
    refusal([tmp_path / "a", tmp_path / "b"], r"layer '0' is convolution \[2, 3\] .* \[3, 2\] for 'b'")


def test_the_report_says_what_was_carried_and_against_which_base(base, folders, tmp_path):
    folders(*PAIRS["DoRA, tokens and a whole module"])
    report = merge([tmp_path / "a", tmp_path / "b"], base=base.name_or_path, output=tmp_path / "out").report
    stored = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert (
        stored["carried"]
        == report.carried
        == {
            "DoRA magnitudes": sorted(report.layers),
            "modules_to_save": ["lm_head.weight"],
            "trainable tokens": ["model.embed_tokens"],
        }
    )
    assert (tmp_path / "out" / stored["base_weights"]).resolve() == Path(base.name_or_path).resolve()
    assert any("trainable tokens (1)" in line for line in report._lines())


@pytest.mark.parametrize("place", ["nowhere", "./no/where", "/no/where/at/all"])
def test_a_base_folder_that_is_not_there_is_refused_also_where_none_is_needed(place, folders, tmp_path):
    folders(ONE, TWO)
    with pytest.raises(FileNotFoundError, match=f"there is no base model folder {place}: check the path"):
        merge([tmp_path / "a"], base=place, check_base=False, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_not_needed_is_said_to_be_so(base, folders, tmp_path, caplog):
    folders(ONE, {**ONE, "use_dora": True})
    for name, told in (("a", True), ("b", False)):
        caplog.clear()
        main([str(tmp_path / name), "--base", base.name_or_path, "--output", str(tmp_path / f"out-{name}")])
        assert ("the base model was not needed, and not read" in caplog.text) == told


def test_an_opened_base_can_be_given_again(base, folders, tmp_path):
    folders(*PAIRS["DoRA and LoRA"])
    merge([tmp_path / "a", tmp_path / "b"], base=open_base(base))
