"""Arrow routing against PEFT's own."""

import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from transformers import AutoModelForCausalLM

from moa.adapters import read_adapter
from moa.arrow import ArrowRouter
from moa.merging.cli import main
from moa.model import MoaModel

IDS = torch.arange(3, 27).view(4, 6)


@pytest.fixture
def equal(make_adapter, tmp_path):
    """Three adapters of one rank on one set of layers, which is all that PEFT's Arrow takes."""
    return {name: str(make_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate(("a1", "a2", "a3"))}


@pytest.fixture
def mixture(base_folder, equal):
    return MoaModel.from_adapters(str(base_folder), equal)


@pytest.mark.parametrize(("top_k", "temperature"), [(2, 1.0), (3, 0.3)])
def test_it_equals_pefts_arrow(mixture, base_folder, equal, top_k, temperature):
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    stock = create_arrow_model(AutoModelForCausalLM.from_pretrained(base_folder), list(equal.values()), config).eval()
    for module in stock.modules():  # its power iteration, taken to its limit
        if "arrow_router" in getattr(module, "lora_arrow", {}):
            arrow = module.lora_arrow["arrow_router"]
            exact = arrow.top_right_singular_vec_from_BA
            arrow.top_right_singular_vec_from_BA = lambda A, B, exact=exact: exact(A, B, iters=2000)
    mixture.route_state.layer_router = ArrowRouter(
        mixture.get_base_model(), mixture.experts, top_k=top_k, temperature=temperature
    )
    with torch.no_grad():
        torch.testing.assert_close(mixture(IDS).logits, stock(IDS).logits, rtol=1e-3, atol=1e-3)


def test_tokens_mix_as_many_experts_as_the_mixture_says_before_and_after_saving(mixture, tmp_path):
    mixture.set_granularity("token")
    mixture.set_routing("top_k", 1)
    expected = ArrowRouter(mixture.get_base_model(), mixture.experts, top_k=1)
    with torch.no_grad():
        with mixture.route_state.set(layer_router=expected):
            logits = mixture(IDS).logits
        assert torch.equal(mixture(IDS).logits, logits)
        mixture.save_pretrained(tmp_path / "saved")
        torch.testing.assert_close(MoaModel.from_pretrained(None, tmp_path / "saved")(IDS).logits, logits)


def test_a_cache_changes_nothing(mixture):
    mixture.route_state.layer_router = ArrowRouter(mixture.get_base_model(), mixture.experts)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert mixture.generate(input_ids=IDS, **options).equal(
        mixture.generate(input_ids=IDS, use_cache=False, **options)
    )


def test_experts_of_unequal_ranks_and_layers_are_chosen_where_they_are(base_folder, adapters):
    model = MoaModel.from_adapters(str(base_folder), adapters)
    router = ArrowRouter(model.get_base_model(), model.experts, top_k=3)
    model.route_state.layer_router = router
    assert torch.isfinite(model(IDS).logits).all()
    place = next(index for index, name in enumerate(model.route_state.layers) if name.endswith("v_proj"))
    weights = router(place, torch.randn(2, 5, 32))
    assert weights[..., 0].eq(1).all() and weights[..., 1:].eq(0).all()  # cats alone adapts v_proj
    layer = model.get_base_model().get_submodule(model.route_state.layers[0])
    x = torch.randn(1, 4, 32)
    read = []
    for name in model.experts:
        delta = layer.lora_B[name].weight @ layer.lora_A[name].weight
        read.append((x @ torch.linalg.svd(delta.detach())[2][0]).abs())
    torch.testing.assert_close(router(0, x), torch.stack(read, dim=-1).softmax(dim=-1), rtol=1e-4, atol=1e-5)


def test_experts_less_the_mean_of_general_adapters_are_merges_which_it_routes(
    base_folder, equal, make_adapter, tmp_path
):
    general = [str(make_adapter(tmp_path / name, seed=seed)) for seed, name in enumerate(("g1", "g2"), 10)]
    for name, path in equal.items():
        words = [path, *general, "--method", "concatenation", "--weights", "1", "-0.5", "-0.5"]
        main([*words, "--output", str(tmp_path / f"{name}-less")])
    model = MoaModel.from_adapters(str(base_folder), {name: tmp_path / f"{name}-less" for name in equal})
    router = ArrowRouter(model.get_base_model(), model.experts, top_k=3)
    module = "model.layers.2.self_attn.q_proj"
    updates = [read_adapter(path).modules[module] for path in (*equal.values(), *general)]
    *experts, first, second = (update.B @ update.A for update in updates)
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    directions = [torch.linalg.svd(expert - (first + second) / 2)[2][0] for expert in experts]
    expected = torch.stack([(x @ direction).abs() for direction in directions], dim=-1).softmax(dim=-1)
    got = router(model.route_state.layers.index(module), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"top_k": 0}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(mixture, options):
    with pytest.raises(ValueError, match="Arrow needs top_k of 1 or more and a positive temperature"):
        ArrowRouter(mixture.get_base_model(), mixture.experts, **options)
