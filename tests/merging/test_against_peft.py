"""What is written loads in stock PEFT with the right logits; PEFT's own merges, where it is right, equal ours."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moa.adapters import from_model
from moa.merging import merge, methods

WEIGHTS = [0.7, 0.5]


@pytest.fixture(scope="module")
def model(base):
    """Two adapters: one plain, one with rsLoRA, other layers and patterns of rank and alpha."""
    torch.manual_seed(1)
    one = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    two = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 3},
        init_lora_weights=False,
    )
    model = get_peft_model(copy.deepcopy(base), one, adapter_name="one")
    model.add_adapter("two", two)
    return model.eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model.save_pretrained(folder)
    return [folder / "one", folder / "two"]


@pytest.fixture
def tokens():
    return torch.arange(12).view(2, 6)


def logits_with(base, updates, tokens):
    """The base model with the dense updates added to its weights."""
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for module, update in updates.items():
            changed.get_submodule(module).weight += update.to(torch.float32).delta()
        return changed(tokens).logits


@pytest.mark.parametrize("method", [m.name for m in methods().values() if not m.needs and m.name != "factor_sum"])
def test_stock_peft_loads_a_merge_with_the_logits_of_its_updates(method, base, saved, tokens, tmp_path):
    result = merge(saved, method, weights=WEIGHTS, output=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not in the).*")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    with torch.no_grad():
        got = loaded(tokens).logits
    expected = logits_with(base, result.modules, tokens)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base(tokens).logits).abs().max() > 1e-3


def test_a_live_model_and_its_saved_adapters_merge_to_the_same_bits(model, saved):
    live = merge([from_model(model, name) for name in ("one", "two")], "svd", weights=WEIGHTS)
    disk = merge(saved, "svd", weights=WEIGHTS)
    for module, update in disk.modules.items():
        assert torch.equal(update.B, live.modules[module].B)
        assert torch.equal(update.A, live.modules[module].A)


def plain_pair(base):
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="one")
    model.add_adapter("two", copy.deepcopy(config))
    return model


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [("concatenation", "cat", {}), ("factor_sum", "linear", {}), ("svd", "svd", {"svd_rank": 3})],
)
@pytest.mark.parametrize("weights", [[0.7, 0.5], [0.7, -0.5]])
def test_peft_where_it_is_right_gives_the_same_update(ours, theirs, options, weights, base):
    model = plain_pair(base)
    result = merge([from_model(model, name) for name in ("one", "two")], ours, weights=weights)
    model.add_weighted_adapter(["one", "two"], weights, "merged", combination_type=theirs, **options)
    reference = from_model(model, "merged").modules
    for module, update in result.modules.items():
        torch.testing.assert_close(update.delta(), reference[module].delta(), rtol=1e-4, atol=1e-5)
