"""Adapters of stock PEFT in, adapters for stock PEFT out, and everything else refused by name."""

import copy
import hashlib
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from moa.adapters import (
    AdapterError,
    add_to_model,
    check_name,
    file_sha256,
    from_model,
    read_adapter,
    write_adapter,
)
from moa.low_rank import LowRank
from moa.peft_checks import all_finite

Q = "model.layers.0.self_attn.q_proj"


PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "plain": PLAIN,
    "rslora": {**PLAIN, "use_rslora": True},
    "patterns": {
        **PLAIN,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
        "alpha_pattern": {r".*\.0\..*q_proj": 3},
    },
    "some layers": {**PLAIN, "layers_to_transform": [1], "layers_pattern": "layers"},
    "regex": {**PLAIN, "target_modules": r".*\.0\..*(q|o)_proj"},
    "all linear": {**PLAIN, "target_modules": "all-linear"},
    "head": {**PLAIN, "target_modules": ["lm_head"]},
}


def peft_model(base, config):
    torch.manual_seed(1)
    config = {"init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**config)).eval()


@pytest.fixture(scope="module")
def plain_folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "plain"
    peft_model(base, PLAIN).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain_folder, tmp_path):
    """A copy of a plain adapter to damage."""
    return shutil.copytree(plain_folder, tmp_path / "plain")


def set_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def set_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_read_has_the_updates_that_peft_applies(kind, dtype, base, tmp_path):
    model = peft_model(base, KINDS[kind]).to(dtype)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    adapter = read_adapter(tmp_path / "a", dtype=torch.float64)
    layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert list(adapter.modules) == sorted(layers)
    assert adapter.dtype == dtype
    for name, layer in layers.items():
        lora_B, lora_A = (f["default"].weight.double() for f in (layer.lora_B, layer.lora_A))
        expected = lora_B @ lora_A * layer.scaling["default"]
        torch.testing.assert_close(adapter.modules[name].delta(), expected)
        assert adapter.shapes[name] == (*expected.shape[:1], lora_A.shape[0], expected.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_model_gives_the_same_updates_as_its_folder(kind, base, tmp_path):
    model = peft_model(base, KINDS[kind])
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    live, stored = from_model(model, "default"), read_adapter(tmp_path / "a")
    assert set(live.modules) == set(stored.modules)
    assert live.shapes == stored.shapes
    for name, update in stored.modules.items():
        assert torch.equal(live.modules[name].B, update.B) and torch.equal(live.modules[name].A, update.A)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_loads_what_is_written_with_the_same_logits(kind, base, tmp_path):
    model, tokens = peft_model(base, KINDS[kind]), torch.arange(10)[None]
    modules = from_model(model, "default").modules
    write_adapter(tmp_path / "out", modules, base_model="tiny", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    layers = {n: m for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(modules)
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


def test_conv1d_layers_are_read_and_written(tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)).eval()
    config = {"r": 2, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    model, tokens = peft_model(base, config), torch.arange(8)[None]
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.shapes["transformer.h.0.attn.c_attn"] == (48, 2, 16)
    write_adapter(tmp_path / "b", adapter.modules, base_model=None, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    add_to_model(model, "again", adapter.modules)
    model.set_adapter("again")
    with torch.no_grad():
        expected = peft_model(base, config)(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_reading_is_lazy_and_names_the_adapter_after_its_folder(folder):
    adapter = read_adapter(folder)
    assert (adapter.name, read_adapter(folder, "other").name) == ("plain", "other")
    assert adapter.modules[Q] is not adapter.modules[Q]
    assert "nothing" not in adapter.modules
    assert adapter.sha256 == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert adapter.sha256 == file_sha256(folder / "adapter_model.safetensors")


# Refusals ----------------------------------------------------------------------------------------------------


def refusal(folder, error=AdapterError):
    with pytest.raises(error) as caught:
        list(read_adapter(folder).modules.values())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA adapter, and only LORA adapters can be read"),
        ({"peft_type": "ADALORA"}, "is a ADALORA adapter"),
        ({"use_dora": True}, "the config says use_dora=True and the weights hold 0 tensors that belong to it"),
        ({"lora_bias": True}, "the config says lora_bias=True and the weights hold 0 tensors"),
        ({"bias": "some"}, "bias in the config must be none, all or lora_only, got 'some'"),
        ({"modules_to_save": ["lm_head"]}, "the config says modules_to_save=['lm_head'] and the weights hold 0"),
        ({"trainable_token_indices": [1]}, "the config says trainable_token_indices=[1] and the weights hold 0"),
        ({"layer_replication": [[0, 2]]}, "because of layer_replication"),
        ({"target_parameters": ["experts.w"]}, "because of target_parameters"),
        ({"alora_invocation_tokens": [5]}, "because of alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "initialised by 'olora'"),
        ({"init_lora_weights": "loftq"}, "initialised by 'loftq', which replaces the base weights by quantised ones"),
        ({"r": 8}, "the config says rank 8 for"),
        ({"rank_pattern": {"q_proj": 3}}, f"the config says rank 3 for '{Q}' and the tensors have rank 4"),
        ({"r": None}, "r in the config must be a number, got None"),
        ({"lora_alpha": "8"}, "lora_alpha in the config must be a number, got '8'"),
        ({"target_modules": ["q_proj"]}, "target_modules and exclude_modules leave out"),
        ({"target_modules": r".*q_proj"}, "target_modules and exclude_modules leave out"),
        ({"exclude_modules": ["v_proj"]}, "target_modules and exclude_modules leave out"),
        ({"exclude_modules": r".*v_proj"}, "target_modules and exclude_modules leave out"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_or_contradicts_itself_is_refused(changes, message, folder):
    set_config(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if f"{Q}.lora_B" not in k}, f"'{Q}' has no lora_B"),
        (lambda t: {k: v for k, v in t.items() if f"{Q}.lora_A" not in k}, f"'{Q}' has no lora_A"),
        (lambda t: {**t, "base_model.model.score.weight": torch.ones(2)}, "'base_model.model.score.weight': not a"),
        (lambda t: {**t, f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(2)}, "use_dora=False and"),
        (lambda t: {**t, "base_model.model.e.lora_embedding_A": torch.ones(2, 2)}, "'e' has no lora_B"),
        (
            lambda t: {**t, f"base_model.model.{Q}.lora_B.bias": torch.ones(2)},
            "lora_bias=False and the weights hold 1",
        ),
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(2)}, "after the vocabulary was resized"),
        (
            lambda t: {**t, "base_model.model.e.token_adapter.trainable_tokens_delta": torch.ones(1, 2)},
            "trainable_token_indices=None and the weights hold 1",
        ),
        (lambda t: {**t, f"base_model.model.{Q}.base_layer.bias": torch.ones(2)}, "a weight of the base model itself"),
        (
            lambda t: {**t, f"base_model.model.{Q}.base_layer.weight": torch.ones(2)},
            "a weight of the base model itself",
        ),
        (lambda t: {**t, "base_model.model.lm_head.base_layer.weight": torch.ones(2)}, "a weight of the base"),
        (lambda t: {k: v[:2] if f"{Q}.lora_A" in k else v for k, v in t.items()}, "do not fit"),
        (lambda t: {k: v[..., None] if "lora_A" in k else v for k, v in t.items()}, "do not fit"),
        (
            lambda t: {k: (v[:, :2, None] if "lora_B" in k else v[..., None]).clone() for k, v in t.items()},
            "without groups",
        ),
        (lambda t: {k: v * float("nan") if Q in k else v for k, v in t.items()}, f"'{Q}' hold NaN or infinite"),
        (lambda t: {k: v / 0 if Q in k else v for k, v in t.items()}, "hold NaN or infinite values"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "stores factors as I8"),
        (lambda t: {}, "holds no LoRA factors"),
    ],
)
def test_tensors_that_are_no_pairs_of_finite_factors_are_refused(change, message, folder):
    set_tensors(folder, change)
    assert message in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 500, -7])
def test_a_file_cut_short_is_refused(kept, folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "is damaged or incomplete" in refusal(folder)


def test_a_pickle_is_never_opened(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "as a pickle (adapter_model.bin)" in refusal(folder)


def test_what_is_no_adapter_is_refused_with_the_way_out(folder, tmp_path):
    assert "did you mean one of its folders: plain" in refusal(tmp_path)
    assert "is a file: give the folder" in refusal(folder / "adapter_config.json")
    assert "there is no adapter folder" in refusal(tmp_path / "nowhere", FileNotFoundError)
    (folder / "adapter_model.safetensors").unlink()
    assert "the copy or download is incomplete" in refusal(folder)


def test_a_repository_that_cannot_be_downloaded_says_so(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refusal("user/adapter", FileNotFoundError)
    assert "no adapter folder user/adapter here" in message and "(no connection)" in message


def test_a_target_that_the_file_holds_nothing_for_is_warned_of(folder):
    set_config(folder, target_modules=["q_proj", "v_proj", "query_key_value"])
    with pytest.warns(UserWarning, match="query_key_value and the weights hold nothing for it"):
        read_adapter(folder)


@pytest.mark.parametrize("excluded", [["o_proj", "lm_head"], r".*\.(o_proj|lm_head)"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"], r".*(q|o)_proj"])
def test_a_target_that_the_config_excludes_is_not_missed(targets, excluded, base, tmp_path, recwarn):
    model = peft_model(base, {**PLAIN, "target_modules": targets, "exclude_modules": excluded})
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    stored = read_adapter(tmp_path / "a")
    assert stored.shapes == from_model(model, "default").shapes
    assert not any("o_proj" in module for module in stored.modules)
    by_suffix_and_pattern = isinstance(targets, list) and isinstance(excluded, str)  # nobody can tell from names
    assert by_suffix_and_pattern or not [w for w in recwarn if "hold nothing for it" in str(w.message)]


def test_the_copy_of_the_head_that_peft_stores_beside_a_lora_on_it_is_not_read(base, tmp_path):
    model = peft_model(base, {**PLAIN, "target_modules": ["q_proj", "lm_head"]})
    model.save_pretrained(tmp_path / "a")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    set_tensors(tmp_path / "a", lambda t: {k: v.double() if "base_layer" in k else v for k, v in t.items()})
    with pytest.warns(UserWarning, match="lm_head.base_layer.weight' is not read.*if you trained"):
        stored = read_adapter(tmp_path / "a")
    assert stored.dtype == torch.float32
    assert "lm_head" in stored.modules
    for name, update in from_model(model, "default").modules.items():
        assert torch.equal(stored.modules[name].delta(), update.delta())


def test_a_config_entry_from_the_future_is_reported(folder):
    set_config(folder, use_new_variant=True)
    with pytest.warns(UserWarning, match="not known here: use_new_variant"):
        read_adapter(folder)


def test_a_model_without_that_adapter_or_on_a_changed_base_is_refused(base):
    model = peft_model(base, {**PLAIN, "init_lora_weights": "pissa"})
    with pytest.raises(AdapterError, match="no adapter 'x': it has default"):
        from_model(model, "x")
    with pytest.raises(AdapterError, match="initialised by 'pissa', which changes the base weights"):
        from_model(model, "default")


def test_an_adapter_whose_name_is_part_of_another_ones_keys_is_read_whole(base):
    """PEFT saves an adapter by leaving out every key with another adapter's name between dots."""
    model = peft_model(base, PLAIN)
    model.add_adapter("0", LoraConfig(**PLAIN, init_lora_weights=False))
    assert set(from_model(model, "default").modules) == set(from_model(model, "0").modules)
    assert len(from_model(model, "default").modules) == 4


# Writing -----------------------------------------------------------------------------------------------------


def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(6, 6, bias=False)

    class Outer(Inner):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner.proj(self.proj(x))

    draw = lambda r: LowRank(torch.randn(6, r), torch.randn(r, 6))
    modules = {"proj": draw(2), "inner.proj": draw(4)}
    write_adapter(tmp_path / "a", modules, base_model=None, task_type=None, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(Outer(), tmp_path / "a")
    live = from_model(loaded, "default")
    stored = read_adapter(tmp_path / "a")
    for name, update in modules.items():
        assert live.shapes[name].r == update.rank
        torch.testing.assert_close(live.modules[name].delta(), update.delta())
        torch.testing.assert_close(stored.modules[name].delta(), update.delta())


def test_writing_is_all_or_nothing(tmp_path):
    good = LowRank(torch.ones(3, 1), torch.ones(1, 3))

    def interrupted():
        yield "a", good
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "out", interrupted(), base_model=None, dtype=torch.float32)
    with pytest.raises(AdapterError, match="hold NaN or values beyond the range"):
        bad = LowRank(good.B * 1e6, good.A)
        write_adapter(tmp_path / "out", {"a": bad}, base_model=None, dtype=torch.float16)
    with pytest.raises(AdapterError, match="at least one module"):
        write_adapter(tmp_path / "out", {}, base_model=None, dtype=torch.float32)
    with pytest.raises(AdapterError, match="given twice"):
        write_adapter(tmp_path / "out", [("a", good), ("a", good)], base_model=None, dtype=torch.float32)
    with pytest.raises(TypeError):
        write_adapter(tmp_path / "out", {"a": good}, base_model=None, dtype=torch.float32, extra_files={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_extra_files_are_written(tmp_path):
    good = LowRank(torch.ones(3, 1), torch.ones(1, 3))
    files = {"note.txt": "text", "data": b"\x00"}
    options = {"base_model": "m", "base_revision": "abc", "dtype": torch.float32}
    out = write_adapter(tmp_path / "deep" / "out", {"a": good}, extra_files=files, **options)
    assert (out / "note.txt").read_text() == "text" and (out / "data").read_bytes() == b"\x00"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("m", "abc")
    with pytest.raises(AdapterError, match="exists already: choose another output folder"):
        write_adapter(out, {"a": good}, **options)


# Into a live model -------------------------------------------------------------------------------------------


def test_an_adapter_added_to_a_model_changes_nothing_but_is_there(base, plain_folder):
    model = peft_model(base, {**PLAIN, "target_modules": ["q_proj"]})
    model.train()
    tokens, modules = torch.arange(10)[None], read_adapter(plain_folder).modules
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    before, random_state = model(tokens).logits, torch.get_rng_state()
    add_to_model(model, "added", modules)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model(tokens).logits, before)
    assert model.active_adapters == ["default"] and model.training
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert not any(p.is_meta for p in model.parameters())
    model.set_adapter("added")
    expected = PeftModel.from_pretrained(copy.deepcopy(base), plain_folder)(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_added_adapter_has_the_dtype_of_the_others_and_can_be_saved(base, plain_folder, tmp_path):
    model = peft_model(base, PLAIN).to(torch.bfloat16)
    add_to_model(model, "added", read_adapter(plain_folder).modules)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path, selected_adapters=["added"])
    assert read_adapter(tmp_path / "added").dtype == torch.bfloat16


def test_an_adapter_for_another_model_or_under_a_taken_name_is_refused(base):
    model = peft_model(base, PLAIN)
    good = LowRank(torch.ones(32, 1), torch.ones(1, 32))
    with pytest.raises(AdapterError, match="already has an adapter 'default'"):
        add_to_model(model, "default", {Q: good})
    with pytest.raises(AdapterError, match="adapter name 'a.b' is not usable"):
        add_to_model(model, "a.b", {Q: good})
    with pytest.raises(AdapterError, match="changes 'nowhere', and the model has no such layer"):
        add_to_model(model, "new", {"nowhere": good})
    with pytest.raises(AdapterError, match=r"shape \[8, 32\] for .* whose shape in the model is \[32, 32\]"):
        add_to_model(model, "new", {Q: LowRank(torch.ones(8, 1), torch.ones(1, 32))})
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a b", "../x", "é"])
def test_a_name_that_peft_cannot_take_is_refused(name):
    with pytest.raises(AdapterError, match="use letters, digits, _ and - only"):
        check_name(name, "task")


def test_a_name_of_letters_digits_and_dashes_is_taken():
    assert check_name("sst-2_v1") == "sst-2_v1"


def test_updates_of_a_live_model_are_copies_also_where_nothing_scales_them(base):
    model = peft_model(base, {**PLAIN, "lora_alpha": PLAIN["r"]})
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    for update in from_model(model, "default").modules.values():
        update.A.mul_(2.0)
        update.B.mul_(2.0)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_finite_numbers_whose_sum_is_not_are_finite(dtype):
    largest = torch.finfo(dtype).max
    assert all_finite(torch.full((300,), largest, dtype=dtype)) and all_finite(torch.zeros(0, dtype=dtype))
    for spoilt in ([largest, float("nan")], [float("inf"), -float("inf")], [1.0, -float("inf")]):
        assert not all_finite(torch.tensor(spoilt, dtype=dtype))
