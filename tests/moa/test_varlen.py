"""`torch_varlen` without its CUDA kernel: a plain attention, one sequence after the other, stands in for it."""

import copy
import inspect

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import moa.varlen
from moa.model import MoaModel
from moa.varlen import check_model

CLOSE = {"atol": 2e-6, "rtol": 1e-5}
SIZE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}


class Kernel:
    """What the kernel computes, as torch and FlashAttention document it; keeps how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        called = inspect.signature(varlen_attn).bind(*args, **kwargs)
        called.apply_defaults()
        self.calls.append(called.arguments)
        asked = called.arguments
        (left, right), scale = asked["window_size"], asked["scale"]
        out = []
        ends = zip(asked["cu_seq_q"][1:], asked["cu_seq_k"][1:], strict=True)
        begins = zip(asked["cu_seq_q"], asked["cu_seq_k"], strict=True)
        for (q0, k0), (q1, k1) in zip(begins, ends, strict=False):
            q, k, v = asked["query"][q0:q1], asked["key"][k0:k1], asked["value"][k0:k1]
            behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
            seen = ((left < 0) | (behind <= left)) & ((right < 0) | (-behind <= right))
            out.append(
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1) for x in (q, k, v)), seen, scale=scale, enable_gqa=asked["enable_gqa"]
                ).transpose(0, 1)
            )
        return torch.cat(out)


@pytest.fixture
def kernel(monkeypatch):
    stand_in = Kernel()
    monkeypatch.setattr(moa.varlen, "varlen_attn", stand_in)
    return stand_in


@pytest.fixture(params=["llama", "sliding window"])
def models(request):
    """One model twice: with transformers' eager attention, and with ours."""
    torch.manual_seed(0)
    if request.param == "llama":
        eager = LlamaForCausalLM(LlamaConfig(**SIZE, initializer_range=0.2))
    else:
        eager = MistralForCausalLM(MistralConfig(**SIZE, initializer_range=0.2, sliding_window=4))
    eager.set_attn_implementation("eager")
    ours = copy.deepcopy(eager.eval())
    ours.set_attn_implementation("torch_varlen")
    return eager, ours


@pytest.fixture
def rows():
    torch.manual_seed(1)
    return [torch.randint(3, 64, (length,)).tolist() for length in (7, 2, 11)]


def packed(rows):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": row} for row in rows])
    return {name: value for name, value in batch.items() if name != "labels"}


def padded(rows, side):
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    ids = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [[0] * len(pad) + [1] * len(row) for row, pad in zip(rows, pads, strict=True)]
    mask = mask if side == "left" else [line[::-1] for line in mask]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def alone(model, rows):
    """The reference: each sequence by itself."""
    return torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows])


@torch.no_grad()
@pytest.mark.parametrize("told", [True, False], ids=["told where sequences are", "positions alone"])
def test_a_packed_row_is_its_sequences_one_at_a_time(models, kernel, rows, told):
    eager, ours = models
    batch = packed(rows)
    if not told:
        batch = {name: batch[name] for name in ("input_ids", "position_ids")}
    got = ours(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(got, alone(eager, rows), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_sequences_one_at_a_time(models, kernel, rows, side):
    eager, ours = models
    batch = padded(rows, side)
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    got = ours(**batch, position_ids=positions).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(got, alone(eager, rows), **CLOSE)


@pytest.mark.parametrize("asked", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation_gives_the_same_tokens_with_padding_and_without(models, kernel, rows, asked):
    eager, ours = models
    for given in (rows, rows[:1], [rows[0], rows[0][::-1]]):
        batch = padded(given, "left")
        answers = [model.generate(**batch, max_new_tokens=6, do_sample=False, **asked) for model in (eager, ours)]
        assert torch.equal(*answers)


@torch.no_grad()
def test_a_second_turn_over_a_cache_is_aligned_to_the_last_token(models, kernel, rows):
    eager, ours = models
    turn = torch.tensor([rows[0] + rows[2]])
    cache = ours(input_ids=turn[:, :7], use_cache=True).past_key_values
    got = ours(input_ids=turn[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(got, eager(input_ids=turn).logits[:, 7:], **CLOSE)


def test_gradients_of_a_packed_row_are_those_of_its_sequences(models, kernel, rows):
    eager, ours = models
    ours(**packed(rows), use_cache=False).logits.square().sum().backward()
    alone(eager, rows).square().sum().backward()
    for (name, got), expected in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-3, rtol=1e-3, msg=lambda said, name=name: name)


@torch.no_grad()
def test_a_packed_row_of_a_mixture_runs_each_sequence_through_its_own_adapter(
    base_folder, adapters, kernel, rows, base_model
):
    base_model.set_attn_implementation("torch_varlen")
    mixture = MoaModel.from_adapters(base_model, adapters)
    rows = [[token % 20 + 3 for token in row] for row in rows]
    with mixture.pinned(list(adapters)):
        got = mixture(**packed(rows)).logits[0]
    for row, path, logits in zip(rows, adapters.values(), got.split([len(row) for row in rows]), strict=True):
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), path).eval()
        torch.testing.assert_close(logits, alone(stock, [row]), atol=2e-5, rtol=1e-5)
    assert kernel.calls


@torch.no_grad()
def test_the_kernel_is_told_where_each_sequence_begins_and_how_long_the_longest_is(models, kernel, rows):
    eager, ours = models
    ours(**packed(rows), use_cache=False)
    called = kernel.calls[0]
    for side in "qk":
        assert called[f"cu_seq_{side}"].tolist() == [0, 7, 9, 20] and called[f"cu_seq_{side}"].dtype == torch.int32
        assert called[f"max_{side}"] == 11
    assert called["query"].shape == (20, 4, 8) and called["key"].shape == called["value"].shape == (20, 2, 8)
    assert called["enable_gqa"] and called["scale"] == pytest.approx(8**-0.5)
    assert called["window_size"] == ((3, 0) if hasattr(eager.config, "sliding_window") else (-1, 0))
    assert len(kernel.calls) == 2  # once a layer


@torch.no_grad()
def test_the_kernel_never_gets_float32_where_the_model_computes_in_half(models, kernel, rows):
    ours = models[1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours.float()(**packed(rows), use_cache=False)
    assert {called[name].dtype for called in kernel.calls for name in ("query", "key", "value")} == {torch.bfloat16}


def test_torchs_own_operator_takes_the_call_forwards_and_backwards(models, rows):
    layer = models[1].bfloat16().model.layers[0].self_attn
    states = [torch.empty(1, heads, 20, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    told = {name: value for name, value in packed(rows).items() if "_q" in name or "_k" in name}
    out, _ = moa.varlen.varlen_attention(layer, *(x.requires_grad_() for x in states), None, **told)
    out.sum().backward()
    assert out.shape == (1, 20, 4, 8) and all(x.grad.shape == x.shape for x in states)


@torch.no_grad()
def test_without_its_kernel_the_name_does_not_answer_wrongly(models, rows):
    with pytest.raises(NotImplementedError):
        models[1](**packed(rows), use_cache=False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attention_dropout": 0.1}, "drops attention weights in training .attention_dropout=0.1."),
        ({"attention_chunk_size": 8}, "attends in chunks"),
        ({"head_dim": 12}, "has heads of width 12: torch's kernel takes multiples of 8 up to 256"),
        ({"head_dim": 320}, "has heads of width 320"),
    ],
)
def test_a_model_that_the_kernel_does_not_compute_is_refused(changed, said):
    with pytest.raises(ValueError, match=f"LlamaForCausalLM {said}"):
        check_model(LlamaForCausalLM(LlamaConfig(**{**SIZE, "num_hidden_layers": 1}, **changed)))


def test_what_only_the_call_can_say_is_refused_there(models, kernel):
    layer = models[1].model.layers[0].self_attn
    states = torch.randn(1, 4, 3, 8)
    for asked in ({"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(ValueError, match="no dropout, capped scores or sinks"):
            moa.varlen.varlen_attention(layer, states, states, states, None, **asked)
