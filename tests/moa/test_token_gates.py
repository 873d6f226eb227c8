"""Token gates: what they mix, that a cache changes nothing, that they learn, and that they are saved."""

import json

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainingArguments, default_data_collator

from moa.model import MoaModel
from moa.routing import Routing
from moa.training.moa_trainer import MoaTrainer

PROMPT = torch.tensor([[3, 7, 9, 11, 24, 5], [5, 10, 12, 16, 23, 3], [9, 3, 3, 8, 17, 20]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
GREEDY = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}


@pytest.fixture
def model(base_model, adapters):
    model = MoaModel.from_adapters(base_model, adapters)
    model.set_granularity("token", by="gates")
    return model


@pytest.fixture
def opinionated(model):
    torch.manual_seed(0)
    for gate in model.moa_gates.gates:
        torch.nn.init.normal_(gate.weight, std=0.5)
    return model


@torch.no_grad()
def test_gates_at_first_mix_the_experts_of_each_layer_alike(model):
    got = model(input_ids=PROMPT).logits
    layers = [model.get_base_model().get_submodule(name) for name in model.route_state.layers]
    adapts = torch.tensor([[float(name in layer.lora_A) for name in model.experts] for layer in layers])
    alike = (adapts / adapts.sum(dim=1, keepdim=True))[None]
    with model.pinned(Routing(alike)):
        torch.testing.assert_close(got, model(input_ids=PROMPT).logits)


@torch.no_grad()
def test_a_gate_is_a_softmax_of_what_its_layer_reads_over_the_experts_that_adapt_it(opinionated):
    x = torch.randn(2, 3, 32) * 100
    place = opinionated.route_state.layers.index("model.layers.1.self_attn.k_proj")  # films alone adapts it
    assert torch.equal(opinionated.moa_gates(place, x), torch.tensor([0.0, 0.0, 1.0]).expand(2, 3, 3))
    place = opinionated.route_state.layers.index("model.layers.1.self_attn.q_proj")  # all do
    gate = opinionated.moa_gates.gates[place]
    read = (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, keepdim=True, correction=0)
    torch.testing.assert_close(opinionated.moa_gates(place, x), F.softmax(read @ gate.weight.T, dim=-1))


def test_a_cache_changes_no_token(opinionated):
    inputs = {"input_ids": PROMPT, "attention_mask": LEFT, **GREEDY}
    assert torch.equal(opinionated.generate(**inputs), opinionated.generate(**inputs, use_cache=False))


def rows():
    return Dataset.from_dict({"input_ids": PROMPT.tolist() * 4, "labels": PROMPT.where(PROMPT > 8, -100).tolist() * 4})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_learn_from_the_language_model_loss_and_nothing_else_moves(model, tmp_path, checkpointing):
    model.moa_gates.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path,
        num_train_epochs=8,
        learning_rate=0.05,
        logging_strategy="epoch",
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    trainer = MoaTrainer(model=model, args=arguments, train_dataset=rows(), data_collator=default_data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("moa_gates.") for name in moved)


def test_checkpointing_gives_the_same_gradients_whatever_ran_between_forward_and_backward(opinionated):
    found = []
    opinionated.train().moa_gates.requires_grad_(True)
    for checkpointing in (False, True):
        opinionated.zero_grad()
        if checkpointing:
            opinionated.gradient_checkpointing_enable()
            assert opinionated.get_base_model().is_gradient_checkpointing
        loss = opinionated(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss
        with torch.no_grad(), opinionated.pinned(["cats", "dogs", "films"]):
            opinionated(input_ids=PROMPT)
        opinionated.set_granularity("sequence")
        loss.backward()
        opinionated.set_granularity("token", by="gates")
        found.append({name: gate.grad for name, gate in opinionated.moa_gates.named_parameters()})
    assert sum(grad.abs().sum() > 0 for grad in found[0].values()) == 2 * 4  # four layers have several experts
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad)


def test_a_saved_mixture_mixes_tokens_as_before(opinionated, base_folder, tmp_path):
    opinionated.save_pretrained(tmp_path / "saved")
    loaded = MoaModel.from_pretrained(str(base_folder), tmp_path / "saved")
    assert loaded.moa_config.token_router == "gates"
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=PROMPT).logits, opinionated(input_ids=PROMPT).logits)
    (tmp_path / "saved" / "moa_gates.safetensors").write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"moa_gates.safetensors was changed after the mixture was saved"):
        MoaModel.from_pretrained(str(base_folder), tmp_path / "saved")


def test_gates_know_the_experts_that_there_are(model, adapters):
    with pytest.raises(ValueError, match="token gates are trained for the experts that there are"):
        model.remove_expert("cats")


def test_experts_that_cannot_be_mixed_and_ways_that_do_not_exist_are_refused(
    model, base_folder, make_adapter, tmp_path
):
    dora = make_adapter(tmp_path / "dora", use_dora=True)
    mixture = MoaModel.from_adapters(str(base_folder), {"dora": dora})
    with pytest.raises(ValueError, match="expert 'dora' is a DoRA adapter"):
        mixture.set_granularity("token", by="gates")
    assert mixture.moa_gates is None and mixture.moa_config.granularity == "sequence"
    with pytest.raises(ValueError, match="tokens are not routed by 'xlora': choose one of arrow, gates"):
        model.set_granularity("token", by="xlora")


def test_gates_that_diverged_or_are_gone_are_refused(opinionated, base_folder, tmp_path):
    opinionated.moa_gates.gates[0].weight.data.fill_(torch.nan)
    opinionated.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        MoaModel.from_pretrained(str(base_folder), tmp_path / "saved")
    config = tmp_path / "saved" / "moa_config.json"
    described = json.loads(config.read_text())
    del described["sha256"]["moa_gates.safetensors"]
    config.write_text(json.dumps(described))
    (tmp_path / "saved" / "moa_gates.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold the gates by which"):
        MoaModel.from_pretrained(str(base_folder), tmp_path / "saved")


def test_experts_may_change_once_gates_no_longer_route(model):
    model.set_granularity("sequence")
    model.remove_expert("cats")
    assert model.moa_gates is None
