"""A mixture trained end to end: by hand as the reference, with transformers' Trainer and with TRL's."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig

from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.strangeness import Abstention
from moa.training.moa_trainer import MoaSFTTrainer, MoaTrainer

ROWS = [([3, 4, 5, 6], [7, 8], 0), ([9, 10, 11], [12, 13, 14], 1), ([3, 9, 20, 21], [22], 2), ([15, 16], [17, 18], 0)]


@pytest.fixture
def make_model(base_folder, adapters):
    def make(router=True, experts=(), dtype=torch.float32, **more):
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype)
        model = MoaModel.from_adapters(base, adapters, **more)
        torch.manual_seed(0)
        fitted = SequenceRouter(32, 3)
        torch.nn.init.normal_(fitted.head.weight, std=0.3)
        model.set_router(fitted)
        if router:
            model.moa_router.requires_grad_(True)
        if experts:
            model.set_requires_grad(list(experts))
        return model

    return make


@pytest.fixture
def rows():
    return Dataset.from_list(
        [
            {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer, "task": task}
            for prompt, answer, task in ROWS * 4
        ]
    )


@pytest.fixture
def arguments(tmp_path):
    def make(kind=TrainingArguments, output="out", **more):
        settings = {
            **{"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1},
            **{"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", "seed": 3},
        }
        if kind is SFTConfig:
            settings |= {"bf16": False, "max_length": None, "gradient_checkpointing": False}
        return kind(output_dir=str(tmp_path / output), **(settings | more))

    return make


@pytest.fixture
def trainer(base_folder):
    def make(kind, model, arguments, rows, **more):
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        if kind is MoaTrainer:
            more = {"data_collator": padded} | more
        return kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **more)

    return make


def padded(examples):
    width = max(len(row["input_ids"]) for row in examples)
    short = [width - len(row["input_ids"]) for row in examples]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * n for row, n in zip(examples, short, strict=True)]),
        "labels": torch.tensor([row["labels"] + [-100] * n for row, n in zip(examples, short, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * n for row, n in zip(examples, short, strict=True)]
        ),
    }


def trained(model):
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def by_hand(model, batch, task):
    """The two losses of a hard route, written out: what the router reads from the base model, one expert a row."""
    prompt = batch["labels"].eq(-100) & batch["attention_mask"].bool()
    with model.using_base(), torch.no_grad():
        entering = model.get_base_model()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[1]
    pooled = torch.stack([row[keep].mean(dim=0) for row, keep in zip(entering, prompt, strict=True)])
    logits = model.moa_router(pooled)
    with model.pinned([model.experts[index] for index in logits.argmax(dim=-1)]):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    language = F.cross_entropy(out[:, :-1].reshape(-1, out.shape[-1]), batch["labels"][:, 1:].flatten())
    return language, F.cross_entropy(logits, task)


@pytest.mark.parametrize("kind", [MoaTrainer, MoaSFTTrainer])
def test_the_loss_is_the_answers_and_the_routers(kind, make_model, rows, arguments, trainer):
    model = make_model()
    config = TrainingArguments if kind is MoaTrainer else SFTConfig
    running = trainer(kind, model, arguments(config), rows, routing="hard", router_loss_weight=0.5)
    batch = running.data_collator([rows[index] for index in range(4)])
    language, route = by_hand(model, padded([rows[index] for index in range(4)]), batch["task"])
    model.train()
    loss = running.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, language + 0.5 * route, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [MoaTrainer, MoaSFTTrainer])
def test_the_language_model_loss_alone_trains_the_router_and_nothing_else(kind, make_model, rows, arguments, trainer):
    model = make_model()
    before = {name: one.clone() for name, one in model.named_parameters()}
    config = TrainingArguments if kind is MoaTrainer else SFTConfig
    trainer(kind, model, arguments(config), rows.remove_columns("task")).train()
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed == {"moa_router.head.weight", "moa_router.head.bias"}


def test_a_soft_route_has_the_gradient_that_differences_show(make_model, rows, arguments, trainer):
    model = make_model()
    running = trainer(MoaTrainer, model, arguments(), rows.remove_columns("task"))
    batch = running.data_collator([rows.remove_columns("task")[index] for index in range(4)])
    bias = model.moa_router.head.bias
    model.train()
    running.compute_loss(model, dict(batch)).backward()
    step = 1e-2
    for index in range(3):
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[index] += sign * step
                moved.append(running.compute_loss(model, dict(batch)))
                bias[index] -= sign * step
        torch.testing.assert_close(bias.grad[index], (moved[0] - moved[1]) / (2 * step), rtol=2e-2, atol=2e-4)


def test_evaluation_routes_as_the_mixture_will(make_model, rows, arguments, trainer):
    model = make_model()
    running = trainer(MoaTrainer, model, arguments(), rows, eval_dataset=rows)
    running.evaluate()
    assert set(model.last_routing.weights.flatten().tolist()) == {0.0, 1.0}
    running.train()
    assert ((model.last_routing.weights > 0) & (model.last_routing.weights < 1)).all()
    assert model.moa_config.routing == "hard"


@pytest.mark.parametrize("kind", [MoaTrainer, MoaSFTTrainer])
def test_gradient_checkpointing_changes_nothing(kind, make_model, rows, arguments, trainer):
    results = []
    for checkpointing in (False, True):
        model = make_model(experts=["cats", "films"])
        config = TrainingArguments if kind is MoaTrainer else SFTConfig
        trainer(kind, model, arguments(config, gradient_checkpointing=checkpointing), rows).train()
        results.append(trained(model))
    assert len(results[0]) > 2
    assert all(torch.equal(results[1][name], one) for name, one in results[0].items())


@pytest.mark.parametrize("kind", [MoaTrainer, MoaSFTTrainer])
def test_a_killed_training_resumes_to_the_very_same_weights(
    kind, make_model, rows, arguments, trainer, tmp_path, monkeypatch
):
    config = TrainingArguments if kind is MoaTrainer else SFTConfig
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = make_model(experts=["dogs"])
    trainer(kind, whole, arguments(config, "whole", **saving), rows).train()

    original = kind.training_step

    def killed_at_the_fourth(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", killed_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            trainer(kind, make_model(experts=["dogs"]), arguments(config, "killed", **saving), rows).train()
    assert (tmp_path / "killed" / "checkpoint-2" / "moa_router.safetensors").is_file()
    resumed = make_model(experts=["dogs"])
    trainer(kind, resumed, arguments(config, "killed", **saving), rows).train(resume_from_checkpoint=True)
    assert trained(resumed).keys() == trained(whole).keys()
    assert all(torch.equal(trained(resumed)[name], one) for name, one in trained(whole).items())


def test_a_resumed_training_keeps_the_dtype_of_its_experts(make_model, rows, arguments, trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    half = {"dtype": torch.bfloat16, "autocast_adapter_dtype": False}
    whole, resumed = (make_model(experts=["dogs"], **half) for _ in range(2))
    trainer(MoaTrainer, whole, arguments(**saving), rows).train()
    trainer(MoaTrainer, resumed, arguments(**saving), rows).train(str(tmp_path / "out" / "checkpoint-2"))
    assert {one.dtype for name, one in resumed.named_parameters() if ".lora_" in name} == {torch.bfloat16}
    assert all(torch.equal(trained(resumed)[name], one) for name, one in trained(whole).items())


@pytest.mark.parametrize("kind", [MoaTrainer, MoaSFTTrainer])
def test_accumulated_batches_train_as_one_large_batch_does(kind, make_model, rows, arguments, trainer):
    rows = rows.map(lambda row: {"labels": [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]})  # one token each
    results = []
    for steps in (1, 2):
        model = make_model()
        config = TrainingArguments if kind is MoaTrainer else SFTConfig
        sizes = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer(kind, model, arguments(config, optim="sgd", learning_rate=1.0, **sizes), rows).train()
        results.append(trained(model))
    for name, one in results[0].items():
        torch.testing.assert_close(results[1][name], one, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_a_mixture_whose_fallback_follows_the_experts(
    make_model, rows, arguments, trainer, tmp_path, base_folder
):
    model = make_model(experts=["cats"])
    model.set_fallback("average", weights=[0.5, 0.25, 0.25])
    running = trainer(MoaTrainer, model, arguments(save_strategy="steps", save_steps=2), rows)
    running.train()
    running.save_model()
    loaded = MoaModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "out")
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    expected = MoaModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "out")
    expected.merge_adapters("average", weights=[0.5, 0.25, 0.25], into="again")
    with torch.no_grad(), loaded.using("default"), expected.using("again"):
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits)
    first, last = (load_file(tmp_path / "out" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, 4))
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_saving_does_not_change_a_training(make_model, rows, arguments, trainer):
    results = []
    for more in ({}, {"save_strategy": "steps", "save_steps": 1}):
        model = make_model(experts=["cats"])
        trainer(MoaTrainer, model, arguments(output=f"out{len(more)}", **more), rows).train()
        results.append(trained(model))
    assert all(torch.equal(results[1][name], one) for name, one in results[0].items())


def test_the_best_model_is_loaded_whole(make_model, rows, arguments, trainer):
    model = make_model(experts=["cats"])
    more = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    more |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that it is not the last
    best = arguments(load_best_model_at_end=True, **more)
    running = trainer(MoaTrainer, model, best, rows, eval_dataset=rows)
    running.train()
    assert running.state.best_model_checkpoint.endswith("checkpoint-1")
    stored = load_file(f"{running.state.best_model_checkpoint}/moa_router.safetensors")
    assert all(torch.equal(model.moa_router.state_dict()[name], one) for name, one in stored.items())
    evaluated = running.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(max(one["eval_loss"] for one in running.state.log_history if "eval_loss" in one))


@pytest.mark.parametrize("more", [{}, {"padding_free": True}])
def test_trl_keeps_the_task_of_prompt_completion_rows(more, make_model, arguments, trainer, rows):
    words = ["the red cat", "one dog ran", "review : bad film", "two blue"]
    texts = Dataset.from_dict(
        {
            "prompt": words,
            "completion": [" sat .", " yes", " negative", " good"],
            "task": ["cats", "dogs", "films", "cats"],
        }
    )
    running = trainer(MoaSFTTrainer, make_model(), arguments(SFTConfig, **more), texts)
    batch = next(iter(running.get_train_dataloader()))
    assert sorted(batch["task"].tolist()) == [0, 0, 1, 2]


def test_rows_without_padding_have_the_loss_and_the_gradient_of_padded_ones(make_model, arguments, trainer, rows):
    results = []
    for padding_free in (False, True):
        model = make_model().train()
        running = trainer(MoaSFTTrainer, model, arguments(SFTConfig, padding_free=padding_free), rows)
        batch = running.data_collator([rows[index] for index in range(4)])
        assert len(batch["input_ids"]) == (1 if padding_free else 4)
        loss = running.compute_loss(model, dict(batch))
        loss.backward()
        results.append((loss.detach(), model.moa_router.head.weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_bad_input_is_refused_in_one_sentence(make_model, rows, arguments, trainer, base_model):
    with pytest.raises(TypeError, match="MoaTrainer trains a MoaModel, got a LlamaForCausalLM"):
        trainer(MoaTrainer, base_model, arguments(), rows)
    with pytest.raises(ValueError, match="nothing in this mixture is trainable"):
        trainer(MoaTrainer, make_model(router=False), arguments(), rows)
    with pytest.raises(ValueError, match="router would then read the answer"):
        trainer(MoaTrainer, make_model(), arguments(label_smoothing_factor=0.1), rows)
    with pytest.raises(ValueError, match="packing drops the column 'task'"):
        trainer(MoaSFTTrainer, make_model(), arguments(SFTConfig, packing=True, max_length=8), rows)
    running = trainer(MoaTrainer, make_model(), arguments(), rows)
    with pytest.raises(ValueError, match="a row's task is 'birds', and the experts are cats, dogs, films"):
        running.data_collator([{**rows[0], "task": "birds"}])
    with running.model.pinned(["cats"] * 4), pytest.raises(ValueError, match="no router was asked"):
        running.compute_loss(running.model, running.data_collator([rows[index] for index in range(4)]))
    with pytest.raises(ValueError, match="has no expert 'cats'"):
        running.train(resume_from_checkpoint=running.args.output_dir)


def test_a_checkpoint_is_written_beside_what_another_process_has_written_there_first(make_model, tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "rng_state_1.pth").write_bytes(b"of the other process")
    make_model().save_pretrained(folder)
    assert (folder / "moa_config.json").is_file() and (folder / "rng_state_1.pth").is_file()


def test_thresholds_of_a_router_that_learns_on_are_dropped_with_a_word(make_model, trainer, arguments, rows):
    model = make_model()
    model.moa_config.router.abstention = Abstention("energy", 0.1, 0.0, 1.0)
    with pytest.warns(UserWarning, match="thresholds for strange prompts no longer hold"):
        trainer(MoaTrainer, model, arguments(), rows)
    assert model.moa_config.router.abstention is None

    frozen = make_model(router=False, experts=["cats"])
    frozen.moa_config.router.abstention = Abstention("energy", 0.1, 0.0, 1.0)
    trainer(MoaTrainer, frozen, arguments(), rows)
    assert frozen.moa_config.router.abstention is not None
