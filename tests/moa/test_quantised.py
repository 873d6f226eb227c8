"""A 4-bit base model: the gated layer adds to what the base layer gives, whatever that is made of."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from moa.model import MoaModel
from moa.router import SequenceRouter

pytest.importorskip("bitsandbytes")

TOKENS = torch.tensor([[3, 4, 5, 6], [9, 10, 11, 12], [15, 16, 17, 18]])
NAMES = ["films", "cats", "dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model whose widths are whole blocks of 64, as bitsandbytes needs on a CPU, and three adapters."""
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name, rank in (("cats", 4), ("dogs", 2), ("films", 8)):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        targets = ["q_proj", "down_proj"] if name == "dogs" else ["q_proj", "v_proj"]
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets))
        for parameter_name, parameter in adapted.named_parameters():
            if ".lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder / name)
    return folder


@pytest.fixture
def quantised(folder):
    def make():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        return base.eval()

    return make


@pytest.fixture
def adapters(folder):
    return {name: folder / name for name in ("cats", "dogs", "films")}


@pytest.fixture
def model(quantised, adapters):
    return MoaModel.from_adapters(quantised(), adapters)


def test_the_base_is_quantised_and_stays_so(model):
    kinds = {type(layer.get_base_layer()).__name__ for layer in model.modules() if hasattr(layer, "get_base_layer")}
    assert kinds == {"Linear4bit"}


@torch.no_grad()
def test_each_row_of_a_mixed_batch_gets_what_its_adapter_alone_would_give(model, quantised, adapters):
    with model.pinned(NAMES):
        mixed = model(input_ids=TOKENS).logits
    for row, name in enumerate(NAMES):
        alone = PeftModel.from_pretrained(quantised(), adapters[name]).eval()
        torch.testing.assert_close(mixed[row : row + 1], alone(input_ids=TOKENS[row : row + 1]).logits)


@torch.no_grad()
def test_a_generation_is_that_of_each_adapter_alone(model, quantised, adapters):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with model.pinned(NAMES):
        mixed = model.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **options)
    for row, name in enumerate(NAMES):
        alone = PeftModel.from_pretrained(quantised(), adapters[name]).eval()
        one = TOKENS[row : row + 1]
        expected = alone.generate(input_ids=one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(mixed[row : row + 1], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_router_and_the_experts(model, checkpointing):
    torch.manual_seed(0)
    model.set_router(SequenceRouter(64, 3))
    torch.nn.init.normal_(model.moa_router.head.weight, std=0.1)
    model.moa_router.requires_grad_(True)
    model.set_requires_grad(["cats"])
    model.moa_config.routing = "soft"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, 11, 12], [-100, -100, 17, 18]])
    model(input_ids=TOKENS, labels=labels).loss.backward()
    given = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.abs().sum() > 0}
    assert "moa_router.head.weight" in given
    assert any(".cats." in name for name in given) and not any(".dogs." in name for name in given)
