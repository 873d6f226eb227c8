"""The gated layer against one adapter at a time through stock PEFT, and against dense products."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.helpers import rescale_adapter_scale
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

import moa.blocks
from moa.config import FALLBACK
from moa.model import MoaModel
from moa.routing import Routing

PROMPT = torch.tensor([[3, 7, 9, 11, 24, 5], [5, 10, 12, 16, 23, 3], [9, 3, 3, 8, 17, 20]])
NAMES = ["films", "cats", "dogs"]


def pinned(weights):
    return Routing(torch.as_tensor(weights, dtype=torch.float32))


def logits(model, ids=PROMPT, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.fixture
def build(base_folder):
    def build(adapters, dtype=torch.float32, adapter_dtype=None):
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
        model = MoaModel.from_adapters(base, adapters)
        for name, parameter in model.named_parameters():
            if adapter_dtype is not None and ".lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        return model

    return build


@pytest.fixture
def model(build, adapters):
    return build(adapters)


@pytest.fixture
def alone(base_folder):
    """Logits of one adapter through stock PEFT."""

    def alone(adapter, ids, dtype=torch.float32, adapter_dtype=None):
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
        stock = PeftModel.from_pretrained(base, adapter).eval()
        for name, parameter in stock.named_parameters():
            if adapter_dtype is not None and ".lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
        return logits(stock, ids)

    return alone


@pytest.fixture
def few_ranks(monkeypatch):
    """Rows read their own expert's factors, however few ranks there are."""
    monkeypatch.setattr(moa.blocks, "GROUPED_FROM", 0)


@pytest.fixture
def own_ranks(few_ranks, monkeypatch):
    """The ways in which rows have read their own expert's factors."""
    taken = []
    for way in ("plus_product", "_grouped"):
        compute = getattr(moa.blocks, way)
        monkeypatch.setattr(
            moa.blocks, way, lambda *given, way=way, compute=compute: taken.append(way) or compute(*given)
        )
    return taken


@pytest.fixture
def many(make_adapter, tmp_path):
    """Adapters of like ranks and unlike targets, so that blocks pay; no layer is adapted by all of them."""
    targets = [["q_proj", "v_proj"], ["v_proj", "o_proj"], ["q_proj", "o_proj", "down_proj"]]
    return {
        name: make_adapter(tmp_path / name, seed=seed, r=7 + seed, target_modules=targets[seed])
        for seed, name in enumerate(["cats", "dogs", "films"])
    }


def close(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("tokens", "way"), [(18, "plus_product"), (1, "_grouped")])
def test_rows_that_read_their_own_factors_get_what_their_adapter_alone_gives(
    build, many, own_ranks, alone, tokens, way
):
    model, ids = build(many), PROMPT.repeat(1, 3)[:, :tokens]
    with model.pinned(NAMES):
        mixed = logits(model, ids)
    assert set(own_ranks) == {way}
    for row, name in enumerate(NAMES):
        close(mixed[row : row + 1], alone(many[name], ids[row : row + 1]))


def test_one_expert_for_a_whole_batch_reads_its_own_factors(build, many, own_ranks, alone):
    model = build(many)
    with model.pinned(pinned([[0.0, 1.0, 0.0]])):
        close(logits(model), alone(many["dogs"], PROMPT))
    assert own_ranks


def test_a_row_of_zeros_among_hard_rows_runs_the_base_model(build, many, own_ranks, base_model):
    model = build(many)
    for ids in (PROMPT, PROMPT[:, :1]):
        with model.pinned(pinned([[0, 0, 1], [0, 0, 0], [0, 1, 0]])):
            mixed = logits(model, ids)
        assert own_ranks
        torch.testing.assert_close(mixed[1:2], logits(base_model, ids[1:2]))


@pytest.fixture
def folded(base_folder):
    """Logits of a base model whose weights hold the experts' updates, each times its weight, as PEFT computes them."""

    def folded(adapters, weights, ids):
        base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
        for weight, adapter in zip(weights, adapters.values(), strict=True):
            trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter)
            for name, module in trained.get_base_model().named_modules():
                if hasattr(module, "get_delta_weight"):
                    base.get_submodule(name).weight.data += weight * module.get_delta_weight("default")
        return logits(base, ids)

    return folded


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_rows_that_mix_choose_and_fall_back_in_one_batch_get_what_each_gets_alone(
    build, many, folded, few, order, request
):
    if few:
        request.getfixturevalue("few_ranks")
    model, rows = build(many), torch.tensor([[0.25, 0.5, -0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[order]
    for ids in (PROMPT.repeat(1, 3), PROMPT[:, :1]):
        with model.pinned(pinned(rows)):
            mixed = logits(model, ids)
        for row, weights in enumerate(rows.tolist()):
            close(mixed[row : row + 1], folded(many, weights, ids[row : row + 1]))
            with model.pinned(pinned([weights])):
                close(mixed[row : row + 1], logits(model, ids[row : row + 1]))


def test_hard_weights_of_each_layer_equal_the_product_over_all_factors(build, many, own_ranks, monkeypatch):
    chosen = torch.randint(0, 3, (3, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for enough in (0, 10**6):
        monkeypatch.setattr(moa.blocks, "GROUPED_FROM", enough)
        model = build(many)
        with model.route_state.gated(torch.eye(3)[chosen]):
            results.append([logits(model, PROMPT[:, :1]), logits(model, PROMPT.repeat(1, 3))])
    assert set(own_ranks) == {"_grouped", "plus_product"}
    for own, whole in zip(*results, strict=True):
        close(own, whole)


@pytest.mark.parametrize(("enough", "ways"), [(9, {"plus_product"}), (4, {"plus_product", "_grouped"}), (18, set())])
def test_single_tokens_read_their_own_factors_from_twice_the_total_rank_on(
    build, many, own_ranks, monkeypatch, enough, ways
):
    monkeypatch.setattr(moa.blocks, "GROUPED_FROM", enough)
    model = build(many)
    with model.pinned(NAMES):
        logits(model, PROMPT.repeat(1, 3))
        logits(model, PROMPT[:, :1])
    assert set(own_ranks) == ways


def test_rows_are_sorted_by_expert_where_a_grouped_product_asks_alone(build, many, own_ranks):
    model = build(many)
    with model.pinned(NAMES):
        (choice,) = model.route_state._choices
        logits(model, PROMPT.repeat(1, 3))
        assert own_ranks and "groups" not in vars(choice)
        with torch.inference_mode():
            model(input_ids=PROMPT[:, :1])
        assert "_grouped" in own_ranks and "groups" in vars(choice)
        model.requires_grad_(True)  # what was sorted in inference mode serves a forward with gradients
        model(input_ids=PROMPT[:, :1], use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("tokens", [18, 1])
def test_gradients_of_factors_through_own_blocks_equal_those_through_all(build, many, monkeypatch, own_ranks, tokens):
    found = []
    for enough in (0, 10**6):
        monkeypatch.setattr(moa.blocks, "GROUPED_FROM", enough)
        model = build(many)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        with model.pinned(NAMES):
            model(input_ids=PROMPT.repeat(1, 3)[:, :tokens]).logits.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if ".lora_" in name}
        found.append({name: torch.zeros(()) if grad is None else grad for name, grad in grads.items()})
    assert own_ranks
    assert sum(grad.abs().sum() > 0 for grad in found[0].values()) > 20
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name].expand_as(grad), rtol=1e-4, atol=1e-6)


def test_very_unequal_ranks_are_not_filled_up(make_adapter, build, tmp_path, own_ranks):
    ranks = {"a": 1, "b": 1, "c": 1, "d": 24}
    model = build({name: make_adapter(tmp_path / name, r=r) for name, r in ranks.items()})
    with model.pinned(["a", "b", "d"]):
        logits(model)
    assert not own_ranks


def test_weights_of_each_layer_and_token_equal_each_layers_own_mixture(model, base_model, adapters):
    layers = model.route_state.layers
    weights = torch.rand(3, len(layers), PROMPT.shape[1], 3, generator=torch.Generator().manual_seed(1))
    gated = {}
    for place, name in enumerate(layers):
        module = model.get_base_model().get_submodule(name)

        def dense(module, inputs, output, place=place):
            for column, expert in enumerate(model.experts):
                if expert in module.lora_A:
                    delta = module.scaling[expert] * module.lora_B[expert].weight @ module.lora_A[expert].weight
                    output = output + weights[:, place, :, column, None] * (inputs[0] @ delta.T)
            return output

        gated[name] = (module, dense)
    with model.route_state.gated(weights):
        got = logits(model)
    with model.using_base():
        hooks = [module.register_forward_hook(dense) for module, dense in gated.values()]
        expected = logits(model)
    assert hooks
    close(got, expected)


def test_weights_of_each_token_for_all_layers_split_a_row_between_two_adapters(model, adapters, alone):
    switch = torch.zeros(1, 1, 6, 3)
    switch[..., :3, 0] = switch[..., 3:, 1] = 1
    with model.route_state.gated(switch):
        got = logits(model, PROMPT[:1])
    close(got[:, :3], alone(adapters["cats"], PROMPT[:1])[:, :3])
    assert not torch.allclose(got[:, 3:], alone(adapters["dogs"], PROMPT[:1])[:, 3:])  # it read the other's keys


def test_the_column_after_the_experts_is_the_fallback_adapter(model, build, adapters, own_ranks):
    with pytest.raises(ValueError, match="have 4 columns, the mixture 3 experts"), model.pinned(pinned(torch.eye(4))):
        pass
    model.set_fallback("average")
    with model.using(FALLBACK):
        fallback = logits(model)
    with model.pinned(NAMES):
        named = logits(model)
    with model.pinned(pinned([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1]])):
        mixed = logits(model)
    close(mixed[[0, 2]], fallback[[0, 2]])
    close(mixed[1], named[1])
    with model.pinned(NAMES):
        torch.testing.assert_close(logits(model), named)


def test_a_layer_router_weighs_each_token_by_its_own_input_with_a_cache_or_without(model, tmp_path):
    torch.manual_seed(0)
    heads = {}

    def router(place, x):
        head = heads.setdefault((place, x.shape[-1]), torch.randn(x.shape[-1], 3))
        return (x @ head).softmax(dim=-1)

    model.route_state.layer_router = router
    plain = model.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False), plain)
    routed = logits(model)
    with model.pinned(NAMES):
        assert not torch.allclose(logits(model), routed)
    torch.testing.assert_close(logits(model), routed)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([[1.0, float("nan"), 0.0]]), "row 0 hold NaN or infinite"),
        (torch.tensor([[1.0, 0.0, 0.0], [0.0, float("inf"), 0.0]]), "row 1 hold NaN or infinite"),
        (torch.ones(1, 2), "have 2 columns, the mixture 3 experts"),
        (torch.ones(3), r"weights are numbers .* got torch.float32 \[3\]"),
        (torch.ones(1, 3, dtype=torch.long), "got torch.int64"),
        (torch.ones(0, 3), r"\[0, 3\]"),
        (torch.ones(1, 2, 3), "are for 2 layers, and experts adapt 20"),
        (torch.ones(1, 2, 6, 3), "are for 2 layers, and experts adapt 20"),
    ],
)
def test_weights_that_cannot_be_are_refused_when_they_are_set(model, weights, message):
    with pytest.raises(ValueError, match=message), model.route_state.gated(weights):
        pass
    assert model.route_state.weights is None


def test_weights_of_tokens_serve_their_own_batch_only(model):
    with (
        model.route_state.gated(torch.ones(1, 1, 4, 3)),
        pytest.raises(ValueError, match="is for 4 tokens a row.* 6"),
    ):
        logits(model)


KINDS = {
    "dora": {"use_dora": True, "r": 4},
    "biased": {"lora_bias": True, "r": 2},
    "rs": {"use_rslora": True, "r": 3, "target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture
def kinds(make_adapter, tmp_path):
    return {name: make_adapter(tmp_path / name, seed=seed, **c) for seed, (name, c) in enumerate(KINDS.items())}


@pytest.mark.parametrize("few", [False, True])
def test_dora_bias_and_rslora_experts_share_a_batch(build, kinds, alone, few, request):
    if few:
        request.getfixturevalue("own_ranks")
    model = build(kinds)
    with model.pinned(["biased", "dora", "rs"]):
        mixed = logits(model)
        generated = model.generate(input_ids=PROMPT, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(input_ids=PROMPT, max_new_tokens=4, do_sample=False), generated)
    for row, name in enumerate(["biased", "dora", "rs"]):
        close(mixed[row : row + 1], alone(kinds[name], PROMPT[row : row + 1]))


def test_dora_over_a_base_with_biases_equals_peft(base, tmp_path):
    from peft import get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    base = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(base.model.layers[0].self_attn.q_proj.bias)
    expected = {}
    for name, options in {"a": {"use_dora": True}, "b": {"use_dora": True, "r": 3, "lora_alpha": 12}}.items():
        trained = get_peft_model(deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 2, **options}))
        for key, parameter in trained.named_parameters():
            if ".lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3, mean=float("magnitude" in key))
        trained.save_pretrained(tmp_path / name)
        expected[name] = logits(trained.eval())
    model = MoaModel.from_adapters(base, {name: tmp_path / name for name in "ab"}, check_base=False)
    with model.pinned(["a", "b", "a"]):
        mixed = logits(model)
    close(mixed, torch.stack([expected["a"][0], expected["b"][1], expected["a"][2]]))


def test_a_bias_is_mixed_by_its_weight(make_adapter, build, tmp_path):
    adapters = {
        name: make_adapter(tmp_path / name, seed=seed, lora_bias=True, target_modules=["down_proj"])
        for seed, name in enumerate("ab")
    }
    model = build(adapters)
    model.merge_adapters("average", into="merged")
    with model.using("merged"):
        expected = logits(model)
    with model.pinned(pinned([[0.5, 0.5]])):
        close(logits(model), expected)


@pytest.mark.parametrize("weights", [[0.5, 0.5, 0.0], [0.5, 0.0, 0.0], [1.0, 0.0, 0.3]])
def test_mixing_a_dora_expert_is_refused(build, kinds, weights):
    model = build(kinds)
    with pytest.raises(ValueError, match="expert 'dora' is a DoRA adapter.*routing='hard'"):
        model.route_state.weights = torch.tensor([[0.0, 1.0, 0.0], weights])
    with pytest.raises(ValueError, match="expert 'dora' is a DoRA adapter"):
        model.route_state.layer_router = lambda place, x: None
    with model.pinned(pinned([[0.0, 0.5, 0.5]])):
        logits(model)


def test_the_fallback_of_dora_experts_is_saved_as_what_it_is(build, kinds, base_folder, tmp_path):
    model = build({name: kinds[name] for name in ("dora", "rs")})
    model.set_fallback("average")
    with model.using(FALLBACK):
        expected = logits(model)
    model.save_pretrained(tmp_path / "moa")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "moa").eval()
    close(logits(stock), expected)
    reloaded = MoaModel.from_pretrained(base_folder, tmp_path / "moa")
    for weights in (torch.eye(3), torch.eye(3)[[2, 0, 1]]):
        with model.pinned(pinned(weights)), reloaded.pinned(pinned(weights)):
            torch.testing.assert_close(logits(model), logits(reloaded))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_experts_keep_a_dtype_other_than_the_bases(build, many, alone, dtype, adapter_dtype, few, request):
    if few:
        request.getfixturevalue("own_ranks")
    model = build(many, dtype, adapter_dtype)
    with model.pinned(NAMES):
        mixed = logits(model)
    assert mixed.dtype == dtype
    for row, name in enumerate(NAMES):
        close(mixed[row : row + 1], alone(many[name], PROMPT[row : row + 1], dtype, adapter_dtype), 3e-2)


@pytest.fixture
def shallow(build, many):
    """One layer, which compiles four times as fast as four."""
    model = build(many)
    decoder = model.get_base_model().model
    decoder.layers = decoder.layers[:1]
    return model


def test_layers_of_one_kind_have_one_class_which_a_compiled_layer_asks_for(build, many):
    model = build(many)
    layers = [model.get_base_model().get_submodule(name) for name in model.route_state.layers]
    assert len(layers) > 4 and len({type(layer) for layer in layers}) == 1


def test_pinning_looks_at_its_own_gated_layers_alone_whatever_came_or_was_copied(
    model, make_adapter, tmp_path, monkeypatch
):
    before = len(model.gated_layers)
    model.add_expert("more", make_adapter(tmp_path / "more", target_modules=["gate_proj"]))
    for one in (model, deepcopy(model)):
        layers = [one.get_base_model().get_submodule(name) for name in one.route_state.layers]
        assert len(layers) == before + 4 and all(a is b for a, b in zip(one.gated_layers, layers, strict=True))
    walked, original = [], torch.nn.Module.named_modules

    def counted(self, *given, **options):
        for found in original(self, *given, **options):
            walked.append(found)
            yield found

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    with model.pinned(["more", *NAMES]):
        pass
    assert len(walked) < 20 < len(list(original(model)))  # up to the first parameter, which tells the device
    assert all(layer.stacks for layer in model.gated_layers) and not any(layer.stacks for layer in layers)


ROUTINGS = [[0, 1, 2], [2, 2, 2], [1, 0, 0], [0, 0, 1], [2, 1, 0]]


@pytest.mark.parametrize("few", [False, True])
def test_a_compiled_forward_is_one_graph_for_any_routing(few, request):
    if few:
        request.getfixturevalue("few_ranks")
    torch._dynamo.reset()
    model, counter = request.getfixturevalue("shallow"), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for routing in ROUTINGS:
        with model.pinned(Routing(torch.eye(3)[routing])):
            with torch.no_grad():
                got = compiled(input_ids=PROMPT, use_cache=False).logits
            close(got, logits(model))
    assert counter.frame_count == 1
    if not few:
        soft = torch.rand(3, 3).softmax(dim=-1)
        with model.pinned(Routing(soft)), torch.no_grad():
            compiled(input_ids=PROMPT, use_cache=False)
        assert counter.frame_count == 1


def test_a_compiled_forward_sees_an_expert_that_was_trained_before_the_routing_was_pinned(shallow):
    torch._dynamo.reset()
    model = shallow
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = []
    for _ in range(2):
        with model.pinned(NAMES), torch.no_grad():
            found.append(compiled(input_ids=PROMPT, use_cache=False).logits)
            close(found[-1], logits(model))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.mul_(2)
    assert not torch.allclose(*found)


def test_checkpointing_gives_the_same_gradients_of_weights_and_factors(build, many):
    found = []
    for checkpointing in (False, True):
        model = build(many).train()
        weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.get_base_model().is_gradient_checkpointing
        with model.pinned(Routing(weights)):
            loss = model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss
        loss.backward()  # after the block, as trainers do: the layers run once more here
        found.append([weights.grad, *(p.grad for n, p in model.named_parameters() if ".lora_" in n)])
    assert sum(grad.abs().sum() > 0 for grad in found[0]) > 40
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_two_forwards_may_come_before_one_backward(build, many):
    found = []
    for checkpointing in (False, True):
        model = build(many).train()
        weights = [torch.rand(3, 3, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(2)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses = []
        for one in weights:
            with model.pinned(Routing(one)):
                losses.append(model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss)
        with torch.no_grad(), model.using_base():
            model(input_ids=PROMPT)
        sum(losses).backward()
        found.append([*(one.grad for one in weights), *(p.grad for n, p in model.named_parameters() if ".lora_" in n)])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_each_row_drops_inputs_with_the_chance_of_its_own_expert_in_training_alone(build, make_adapter, tmp_path):
    chances = {"never": 0.0, "often": 0.25}
    paths = {
        n: make_adapter(tmp_path / n, seed=3, lora_dropout=p, init_lora_weights=False) for n, p in chances.items()
    }
    model = build(paths)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    torch.manual_seed(0)
    x = torch.randn(32).expand(2, 20000, 32)
    with torch.no_grad(), model.pinned(list(chances)):
        expected = layer(x)
        dropped = layer.train()(x)
    assert torch.equal(dropped[0], expected[0])
    torch.testing.assert_close(dropped[1].mean(dim=0), expected[1].mean(dim=0), atol=0.05, rtol=0.02)
    delta = (layer.scaling["often"] * layer.lora_B["often"].weight @ layer.lora_A["often"].weight).detach()
    variance = (delta * x[1, 0]).square().sum(dim=1) * 0.25 / 0.75
    torch.testing.assert_close(dropped[1].var(dim=0), variance, atol=0.0, rtol=0.1)


@pytest.mark.parametrize(("autocast", "kept"), [(True, torch.float32), (False, torch.bfloat16)])
def test_adapters_keep_the_bases_dtype_where_peft_is_told_not_to_widen_them(
    base_folder, adapters, tmp_path, autocast, kept
):
    def base():
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)

    model = MoaModel.from_adapters(base(), adapters, autocast_adapter_dtype=autocast)
    model.save_pretrained(tmp_path / "moa")
    again = MoaModel.from_pretrained(base(), tmp_path / "moa", autocast_adapter_dtype=autocast)
    for mixture in (model, again):
        factors = [p for name, p in mixture.named_parameters() if ".lora_" in name]
        assert {factor.dtype for factor in factors} == {kept}
        with mixture.pinned(NAMES):
            mixed = logits(mixture).float()
        for row, name in enumerate(NAMES):
            alone = PeftModel.from_pretrained(base(), adapters[name], autocast_adapter_dtype=autocast).eval()
            expected = logits(alone, PROMPT[row : row + 1]).float()
            assert (mixed[row : row + 1] - expected).norm() < 3e-2 * expected.norm()
    model.add_expert("birds", adapters["cats"])
    model.merge_adapters("svd", into="merged")
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {kept}


def test_layers_of_equal_ranks_and_other_experts_have_gates_of_their_own(build, make_adapter, tmp_path, alone):
    targets = {"cats": ["q_proj", "k_proj"], "dogs": ["k_proj", "v_proj"], "films": ["q_proj", "v_proj"]}
    adapters = {name: make_adapter(tmp_path / name, seed=len(name), target_modules=t) for name, t in targets.items()}
    model = build(adapters)
    with model.pinned(NAMES):
        mixed = logits(model)
    for row, name in enumerate(NAMES):
        close(mixed[row : row + 1], alone(adapters[name], PROMPT[row : row + 1]))


def test_weights_that_are_changed_in_place_are_seen(build, adapters):
    model, weights = build(adapters), torch.full((1, 3), 1 / 3)
    with model.pinned(Routing(weights)):
        logits(model)
        weights.copy_(torch.tensor([[0.5, 0.25, 0.25]]))
        changed = logits(model)
    with model.pinned(pinned([[0.5, 0.25, 0.25]])):
        close(changed, logits(model))


def test_an_expert_that_is_changed_in_place_is_seen_where_rows_read_their_own_factors(build, many, few_ranks):
    model, weights = build(many), torch.tensor([[1.0, 0, 0]])
    with model.pinned(Routing(weights)):
        logits(model)
        weights.copy_(torch.tensor([[0, 0, 1.0]]))
        changed = logits(model)
    with model.pinned([list(many)[2]] * 3):
        close(changed, logits(model))


def test_what_a_hook_saw_of_the_base_layer_stays_as_it_saw_it(build, adapters):
    model, seen = build(adapters), []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with model.pinned(NAMES):
        logits(model)
    ((x, output),) = seen
    close(output, torch.nn.functional.linear(x, layer.weight, layer.bias))


GIVES_BACK = {
    "itself": lambda x: x,
    "a view": lambda x: x.view(-1, x.shape[-1]).view(x.shape),
    "detached": lambda x: x.detach(),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gives_back", GIVES_BACK)
@pytest.mark.parametrize("few", [False, True])
def test_a_base_layer_that_gives_back_what_it_reads_leaves_it(build, many, gives_back, few, compiled, request):
    if few:
        request.getfixturevalue("few_ranks")
    torch._dynamo.reset()
    model = build(many)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.base_layer.forward = GIVES_BACK[gives_back]
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    x = torch.randn(3, 18, 32, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    update = layer.scaling["cats"] * layer.lora_B["cats"].weight @ layer.lora_A["cats"].weight
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), model.pinned(["cats", "cats", "dogs"]):
            got = run(x)
        assert torch.equal(x, before)
        close(got[:2].clone(), (x + x @ update.T)[:2].detach())


def test_what_inference_mode_left_behind_can_be_trained_through(build, adapters):
    model, weights = build(adapters), torch.full((3, 3), 1 / 3)
    route = Routing(weights)
    for _ in range(2):
        with model.pinned(route):
            with torch.inference_mode():
                model(input_ids=PROMPT)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".lora_A" in name)
            model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
        model.requires_grad_(False)
        route = Routing(weights.clone().requires_grad_())
    with torch.inference_mode(), model.pinned(NAMES):
        model(input_ids=PROMPT)
    with model.pinned(route):
        model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    assert route.weights.grad.abs().sum() > 0


def test_dropout_takes_adapters_in_half_precision(build, make_adapter, tmp_path):
    adapters = {n: make_adapter(tmp_path / n, seed=len(n), lora_dropout=0.5) for n in ("cats", "films")}
    model = build(adapters, torch.bfloat16, torch.bfloat16).train()
    with model.pinned(["cats", "films", "cats"]):
        assert logits(model).dtype == torch.bfloat16


def test_constants_made_inside_a_transform_do_not_outlive_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moa.constants import constant

    asked = (4.0, 2.0, 4.0, 1.0), torch.device("cpu"), torch.float64
    with FakeTensorMode():
        constant(*asked)
    torch.vmap(lambda x: x + constant(*asked)[0])(torch.zeros(2))
    assert type(constant(*asked)) is torch.Tensor and constant(*asked).tolist() == [4, 2, 4, 1]
    assert constant(*asked) is constant(*asked)
    assert constant(*asked, times=(2, 0, 1, 1)).tolist() == [4, 4, 4, 1]


def test_factors_that_are_kept_lie_row_by_row_in_memory(build, adapters):
    model = build(adapters)
    with model.pinned(NAMES):
        kept = [layer.current_stack(len(adapters)) for layer in model.gated_layers]
    assert all(stack.B.is_contiguous() for stack in kept)


def test_gates_are_kept_for_one_route_and_go_with_it(build, adapters):
    model = build(adapters)
    state = model.route_state
    with model.pinned(NAMES):
        logits(model)
        kept = dict(state._gates)
        logits(model)
        assert kept and all(state._gates[alike] is gate for alike, gate in kept.items())
    with model.pinned(NAMES[::-1]):
        assert not state._gates


@pytest.mark.parametrize("first", [False, True])
def test_a_scale_that_pefts_own_context_sets_is_seen_and_gone_after_it(build, adapters, first):
    model = build(adapters)
    with model.using("cats", scale=0.5):
        half = logits(model)
        if first:
            with model.pinned(["cats"] * 3):
                logits(model)
    with model.pinned(["cats"] * 3):
        before = logits(model)
        with rescale_adapter_scale(model, 0.5):
            close(logits(model), half)
        close(logits(model), before)
    with model.using("cats"):
        close(before, logits(model))


def test_what_changes_in_place_in_an_adapter_is_seen(build, make_adapter, tmp_path):
    options = {"lora_bias": True}, {"use_dora": True}
    adapters = {n: make_adapter(tmp_path / n, seed=1, **o) for n, o in zip(("biased", "dora"), options, strict=True)}
    model = build(adapters)
    layer = model.get_base_model().model.layers[3].self_attn.v_proj
    changed = layer.lora_B["biased"].bias, layer.lora_magnitude_vector["dora"].weight, layer.base_layer.weight
    with model.pinned(["biased", "dora", "dora"]):
        before = logits(model)
        for parameter in changed:
            with torch.no_grad():
                parameter.mul_(1.5)
            after = logits(model)
            assert not torch.allclose(after, before)
            before = after
    with model.using("dora"):
        close(before[1:2], logits(model, PROMPT[1:2]))


def test_an_adapter_that_takes_the_name_and_the_memory_of_one_that_has_gone_is_another(build, make_adapter, tmp_path):
    folders = [make_adapter(tmp_path / f"{seed}", seed=seed, r=2) for seed in (4, 5)]
    model = build({"cats": folders[0], "dogs": folders[1]})
    model.set_adapter("dogs", inference_mode=True)  # PEFT warns where the active adapter goes
    for folder in folders[::-1] * 2:
        model.delete_adapter("cats")
        model.load_adapter(str(folder), "cats")
        with model.pinned(["cats"] * 3):
            got = logits(model)
        with model.using("cats"):
            close(got, logits(model))


def test_factors_that_are_replaced_twice_are_seen(build, adapters):
    model = build(adapters)
    with model.pinned(["cats"] * 3):
        logits(model)
        for layer in model.gated_layers:
            if "cats" in layer.lora_B:
                factor = layer.lora_B["cats"].weight
                for _ in range(2):  # what was freed the first time may be what is given out the second time
                    factor.data = factor.data * 2
        got = logits(model)
    with model.using("cats"):
        close(got, logits(model))


def test_a_mixture_that_is_loaded_in_inference_mode_runs(build, adapters, alone):
    with torch.inference_mode():
        model = build(adapters)
        with model.pinned(NAMES):
            inside = model(input_ids=PROMPT).logits.clone()
    with model.pinned(NAMES):
        close(logits(model), inside)
    for row, name in enumerate(NAMES):
        close(inside[row : row + 1], alone(adapters[name], PROMPT[row : row + 1]))
