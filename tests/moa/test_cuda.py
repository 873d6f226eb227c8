"""What only a GPU can show: kernels, graphs and devices. Everything else about a mixture is tested on the CPU."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StaticCache
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moa.attention import TORCH_VARLEN, Machine, set_attention
from moa.model import MoaModel
from moa.prefix import prompt_states
from moa.router import SequenceRouter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NAMES = ["cats", "dogs", "films", "cats"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 would hide mistakes of a thousandth."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def base(base_folder):
    def base(dtype):
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype).cuda().eval()

    return base


@pytest.fixture
def ids():
    torch.manual_seed(0)
    return torch.randint(3, 25, (4, 12), device="cuda")


@torch.no_grad()
def run(model, ids, **options):
    return model(input_ids=ids, **options).logits.float()


def close(got, expected, dtype):
    assert (got - expected).norm() <= {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype] * expected.norm()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_batch_gives_what_each_adapter_alone_gives(base, adapters, ids, dtype, autocast):
    model = MoaModel.from_adapters(base(dtype), adapters, autocast_adapter_dtype=autocast)
    with model.pinned(NAMES):
        mixed = run(model, ids)
    for row, name in enumerate(NAMES):
        alone = PeftModel.from_pretrained(base(dtype), adapters[name], autocast_adapter_dtype=autocast)
        close(mixed[row : row + 1], run(alone, ids[row : row + 1]), dtype)


@pytest.mark.parametrize("few", [False, True])
def test_a_decode_step_recorded_as_a_graph_gives_what_the_step_gives(base, adapters, ids, few, monkeypatch):
    if few:
        monkeypatch.setattr("moa.blocks.GROUPED_FROM", 0)
    model = MoaModel.from_adapters(base(torch.float32), adapters)
    with model.pinned(NAMES), model.route_state.set(steady=object()), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(input_ids=ids, past_key_values=cache)
        token = ids[:, -1:].clone()
        eager = [model(input_ids=token, past_key_values=cache).logits.clone() for _ in range(3)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=token, past_key_values=cache).logits
        for layer in cache.layers:
            layer.cumulative_length.fill_(ids.shape[1])
        for expected in eager:
            graph.replay()
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_pinned_decode_step_never_waits_for_the_gpu(base, adapters, ids):
    model = MoaModel.from_adapters(base(torch.bfloat16), adapters)
    with model.pinned(NAMES), model.route_state.set(steady=object()), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        for _ in range(2):
            model(input_ids=ids[:, :1], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(input_ids=ids[:, :1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_step_gives_what_the_step_gives(base, adapters, ids):
    model = MoaModel.from_adapters(base(torch.float32), adapters)
    compiled = torch.compile(model, fullgraph=True)
    for names in (NAMES, NAMES[::-1]):
        with model.pinned(names):
            close(run(compiled, ids, use_cache=False), run(model, ids, use_cache=False), torch.float32)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_routed_generation_goes_on_as_its_experts_would(base, adapters, ids, cache):
    model = MoaModel.from_adapters(base(torch.float32), adapters)
    model.set_router(SequenceRouter(model.config.hidden_size, len(adapters)))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        chosen = model.route(ids).weights.argmax(dim=-1).tolist()
        told = model.generate(input_ids=ids, cache_implementation=cache, **options)
        for row, expert in enumerate(chosen):
            with model.using(model.experts[expert]):
                options["attention_mask"] = torch.ones_like(ids[row : row + 1])
                alone = model.generate(input_ids=ids[row : row + 1], **options)
            torch.testing.assert_close(told[row, : alone.shape[1]], alone[0])


def test_states_that_a_router_reads_are_those_of_the_cpu(base, ids):
    model = base(torch.float32)
    (there,) = prompt_states(model, [2], ids, torch.ones_like(ids))
    (here,) = prompt_states(model.cpu(), [2], ids.cpu(), torch.ones_like(ids).cpu())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and Machine.here("cuda").runs_torch_varlen), reason="needs torch's varlen kernel"
)
def test_a_packed_row_through_torchs_kernel_is_its_sequences_and_has_their_gradients(base, adapters):
    rows = [torch.randint(3, 25, (length,)).tolist() for length in (7, 2, 11, 5)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in collate([{"input_ids": row} for row in rows]).items()
    }

    def gradients(attention, dtype):
        model = MoaModel.from_adapters(base(dtype), adapters)
        set_attention(model.get_base_model(), attention, packing=True)
        factors = {name: p.requires_grad_() for name, p in model.named_parameters() if ".lora_" in name}
        with model.pinned(NAMES):
            model(**packed, use_cache=False).loss.backward()
        return {name: p.grad.float() for name, p in factors.items() if p.grad is not None}

    exact, eager = gradients("eager", torch.float32), gradients("eager", torch.bfloat16)
    kernel = gradients(TORCH_VARLEN, torch.bfloat16)
    assert kernel.keys() == exact.keys()
    for name, gradient in exact.items():  # as near as bf16 allows, which is what it costs eager
        assert (kernel[name] - gradient).norm() <= 2 * (eager[name] - gradient).norm() + 1e-3 * gradient.norm()


def test_experts_on_a_gpu_merge_into_the_same_adapter_as_on_the_cpu(base, adapters):
    model = MoaModel.from_adapters(base(torch.float32), adapters)
    on_gpu = model.merge_adapters("ties", into="merged").modules
    on_cpu = MoaModel.from_adapters(base(torch.float32).cpu(), adapters).merge_adapters("ties").modules
    for name, update in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].delta().cpu(), update.delta(), rtol=1e-4, atol=1e-5)
    with model.using("merged"):
        assert run(model, torch.tensor([[3, 4, 5]], device="cuda")).isfinite().all()
