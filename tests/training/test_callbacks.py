"""Callbacks in transformers' Trainer and in TRL's, in one process and in two; expected values by other libraries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from scipy.stats import entropy
from sklearn.metrics import accuracy_score
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moa.merging import merge
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.training.callbacks import MergeCallback, PushFusedCallback, RoutingCallback
from moa.training.moa_trainer import keep_task

PROMPTS = np.random.default_rng(0).integers(3, 24, (16, 5)).tolist()
TASKS = [0, 1, 2, 0, 0, 1, -100, 2] * 2
ROWS = [
    {"input_ids": [*prompt, 7, 8], "labels": [-100] * 5 + [7, 8], "task": task}
    for prompt, task in zip(PROMPTS, TASKS, strict=True)
]


@pytest.fixture
def make_model(base_folder, adapters):
    def make():
        model = MoaModel.from_adapters(AutoModelForCausalLM.from_pretrained(base_folder), adapters)
        torch.manual_seed(0)
        router = SequenceRouter(32, 3)
        torch.nn.init.normal_(router.head.weight, std=0.5)
        model.set_router(router)
        model.set_requires_grad(["cats"])
        return model

    return make


@pytest.fixture(params=["transformers", "trl"])
def make_trainer(request, base_folder, tmp_path):
    def make(model, output="out", **more):
        settings = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 4, "learning_rate": 1e-2}
        settings |= {"remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        settings |= {name: more.pop(name) for name in list(more) if hasattr(TrainingArguments, name)}
        rows = Dataset.from_list(ROWS)
        collate = keep_task(DataCollatorForLanguageModeling(pad_token_id=0), model.experts)
        kind, config = (Trainer, TrainingArguments) if request.param == "transformers" else (SFTTrainer, SFTConfig)
        if kind is SFTTrainer:
            settings |= {"bf16": False, "max_length": None, "gradient_checkpointing": False}
            more["processing_class"] = AutoTokenizer.from_pretrained(base_folder)
        args = config(output_dir=str(tmp_path / output), **settings)
        return kind(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collate, **more)

    return make


def expected_metrics(model):
    """Of all rows, from other libraries; the calibration error from its definition."""
    routing = model.route(torch.tensor(PROMPTS))
    probabilities = routing.logits.softmax(dim=-1).double().numpy()
    known = np.array(TASKS) != -100
    chosen, truth, confidence = (
        probabilities.argmax(axis=1)[known],
        np.array(TASKS)[known],
        probabilities.max(axis=1)[known],
    )
    bins = np.digitize(confidence, np.linspace(0, 1, 16), right=True)
    gaps = [
        abs((chosen[bins == one] == truth[bins == one]).mean() - confidence[bins == one].mean()) * (bins == one).mean()
        for one in set(bins)
    ]
    use = np.bincount(probabilities.argmax(axis=1), minlength=3) / len(PROMPTS)
    return {
        "routing_accuracy": accuracy_score(truth, chosen),
        "routing_entropy": entropy(probabilities, axis=1).mean(),
        "routing_calibration_error": sum(gaps),
        **{f"routing_use_{name}": share for name, share in zip(model.experts, use, strict=True)},
    }


class Tracker(TrainerCallback):
    """What a tracker that was there first would receive."""

    def __init__(self):
        self.received = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.received.append(dict(logs))


def test_the_routing_of_all_rows_is_in_the_log_the_history_and_the_tracker(make_model, make_trainer):
    model, tracker = make_model(), Tracker()
    trainer = make_trainer(model, callbacks=[tracker], gradient_accumulation_steps=2, max_steps=2, logging_steps=2)
    trainer.add_callback(RoutingCallback(trainer))
    trainer.train()
    expected = expected_metrics(model)
    assert 0 < expected["routing_accuracy"] < 1 and expected["routing_calibration_error"] > 0.01
    for told in (tracker.received[0], trainer.state.log_history[0]):
        assert {name: told[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert "loss" in told
    returned = trainer.evaluate()
    assert {name: returned[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert tracker.received[-1]["eval_routing_accuracy"] == returned["eval_routing_accuracy"]


def test_each_log_tells_of_the_rows_since_the_last(make_model, make_trainer):
    trainer = make_trainer(make_model(), logging_steps=1, callbacks=[RoutingCallback()])
    trainer.train()
    accuracies = [one["routing_accuracy"] for one in trainer.state.log_history if "loss" in one]
    assert len(accuracies) == 4 and len(set(accuracies)) > 1


def test_a_tracker_that_would_miss_the_metrics_is_told_of(make_model, make_trainer):
    trainer = make_trainer(make_model(), report_to="tensorboard", callbacks=[RoutingCallback()])
    with pytest.raises(
        ValueError, match=r"after tensorboard has read the log: make it with RoutingCallback\(trainer\)"
    ):
        trainer.train()


def test_the_best_merge_is_kept_with_its_report_and_stock_peft_loads_it(
    make_model, make_trainer, tmp_path, base_folder
):
    scores = iter([0.2, 0.9, 0.4, 0.3])
    seen = []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(model(torch.tensor(PROMPTS)).logits)
        return next(scores)

    trainer = make_trainer(make_model(), save_strategy="steps", save_steps=1)
    trainer.add_callback(MergeCallback("average", evaluate, when="save", weights=[0.5, 0.3, 0.2]))
    trainer.train()
    kept = tmp_path / "out" / "best_merge"
    told = json.loads((kept / "merge_scores.json").read_text())
    assert [one["score"] for one in told["scores"]] == [0.2, 0.9, 0.4, 0.3]
    assert [one["step"] for one in told["scores"]] == [1, 2, 3, 4]
    assert json.loads((kept / "merge_report.json").read_text())["method"] == "average"
    checkpoint = tmp_path / "out" / "checkpoint-2"
    merge(
        [checkpoint / name for name in ("cats", "dogs", "films")],
        "average",
        weights=[0.5, 0.3, 0.2],
        output=tmp_path / "again",
    )
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    stock = PeftModel.from_pretrained(base, tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(seen[1], stock(torch.tensor(PROMPTS)).logits, rtol=1e-4, atol=1e-4)
    best, again = (load_file(folder / "adapter_model.safetensors") for folder in (kept, tmp_path / "again"))
    assert all(torch.equal(best[name], one) for name, one in again.items())
    assert not list((tmp_path / "out").glob(".best_merge*"))


def test_a_plain_trainer_resumes_the_active_expert_and_says_so_where_more_learns(make_model, make_trainer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole, resumed, more = make_model(), make_model(), make_model()
    make_trainer(whole, **saving).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    make_trainer(resumed, **saving).train(resume_from_checkpoint=checkpoint)
    ended, expected = dict(resumed.named_parameters()), dict(whole.named_parameters())
    assert all(torch.equal(ended[name], one) for name, one in expected.items())
    more.moa_router.requires_grad_(True)
    with pytest.raises(ValueError, match="restores the active expert alone, 'cats', and more than that learns here"):
        make_trainer(more, **saving).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("make_trainer", ["transformers"], indirect=True)
def test_a_resumed_training_remembers_how_good_its_merges_were(make_model, make_trainer, tmp_path):
    scores, kept = iter([0.2, 0.9, 0.4, 0.3]), tmp_path / "out" / "best_merge"
    best = []
    for steps, checkpoint in ((2, None), (4, str(tmp_path / "out" / "checkpoint-2"))):
        merged = MergeCallback("average", lambda model: next(scores), when="save")
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps}
        make_trainer(make_model(), callbacks=[merged], **saving).train(resume_from_checkpoint=checkpoint)
        best.append(load_file(kept / "adapter_model.safetensors"))
    assert all(torch.equal(best[1][name], one) for name, one in best[0].items())
    told = json.loads((kept / "merge_scores.json").read_text())
    assert [(one["step"], one["score"]) for one in told["scores"]] == [(1, 0.2), (2, 0.9), (3, 0.4), (4, 0.3)]


def test_merging_does_not_change_a_training(make_model, make_trainer):
    results = []
    for callbacks in ([], [MergeCallback("dare_linear", lambda model: torch.rand(1).item(), when="save")]):
        model = make_model()
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
        make_trainer(model, f"out{len(callbacks)}", callbacks=callbacks, **saving).train()
        results.append({name: one.clone() for name, one in model.named_parameters()})
        results[-1]["random numbers"] = torch.get_rng_state()
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[1][name], one) for name, one in results[0].items())


def test_a_lower_loss_can_be_the_better_and_the_latest_can_be_kept(make_model, make_trainer, tmp_path):
    best = {"losses": 1, "latest": 2}
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    for name, options in (("losses", {"greater_is_better": False}), ("latest", {"keep_best": False})):
        scores = iter([1.0, 3.0] if name == "losses" else [3.0, 1.0])
        merged = MergeCallback("average", lambda model, scores=scores: next(scores), when="save", **options)
        make_trainer(make_model(), name, callbacks=[merged], **saving).train()
    for name, step in best.items():
        merge(
            [tmp_path / name / f"checkpoint-{step}" / one for one in ("cats", "dogs", "films")],
            "average",
            output=tmp_path / f"{name}-again",
        )
        kept, again = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (tmp_path / name / "best_merge", tmp_path / f"{name}-again")
        )
        assert all(torch.equal(kept[key], one) for key, one in again.items())


def test_the_end_of_a_training_is_merged_and_pushed_with_a_card(make_model, make_trainer, tmp_path, hub, base_folder):
    model = make_model()
    trainer = make_trainer(model, callbacks=[PushFusedCallback("tester/at-the-end", "adapter", private=True)])
    trainer.add_callback(MergeCallback("svd", lambda model: 1.0, trainer=trainer))
    trainer.train()
    assert (tmp_path / "out" / "best_merge" / "adapter_model.safetensors").is_file()
    assert any(one.get("merge_score") == 1.0 for one in trainer.state.log_history)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    pushed = PeftModel.from_pretrained(base, "tester/at-the-end", cache_dir=tmp_path / "cache").eval()
    model.merge_adapters("svd", into="again")
    with torch.no_grad(), model.eval().using("again"):
        torch.testing.assert_close(
            pushed(torch.tensor(PROMPTS)).logits, model(torch.tensor(PROMPTS)).logits, rtol=1e-4, atol=1e-4
        )


def test_bad_input_is_refused_in_one_sentence(make_trainer, make_model, base_folder):
    with pytest.raises(ValueError, match="average"):
        MergeCallback("avrage", lambda model: 0.0)
    with pytest.raises(ValueError, match="when='never' is no moment to merge at: choose one of save, end"):
        MergeCallback("average", lambda model: 0.0, when="never")
    with pytest.raises(ValueError, match="form='mixture' does not exist"):
        PushFusedCallback("tester/none", "mixture")
    trainer = make_trainer(make_model(), callbacks=[MergeCallback("average", lambda model: float("nan"))])
    with pytest.raises(ValueError, match="evaluate gave nan for the average merge: return a finite number"):
        trainer.train()


@pytest.mark.parametrize(
    "callback", [RoutingCallback(), PushFusedCallback("a/b"), MergeCallback("svd", lambda m: 0.0)]
)
def test_another_model_than_a_mixture_is_refused(callback, base_model, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, max_steps=1)
    trainer = Trainer(model=base_model, args=args, train_dataset=Dataset.from_list(ROWS), callbacks=[callback])
    with pytest.raises(
        TypeError, match=f"{type(callback).__name__} is for a MoaModel, this trainer has a LlamaForCausalLM"
    ):
        trainer.train()


def test_a_process_that_saves_nothing_leaves_alone_what_the_first_is_writing(make_model, make_trainer, monkeypatch):
    model = make_model()
    trainer = make_trainer(model, callbacks=[])
    written = Path(trainer.args.output_dir) / f".best_merge-{trainer.state.global_step}" / "adapter_model.safetensors"
    written.parent.mkdir(parents=True)
    written.write_bytes(b"by the first process")
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    callback = MergeCallback("average", lambda model: 1.0, when="save")
    callback.on_save(trainer.args, trainer.state, trainer.control, model=model)
    assert written.read_bytes() == b"by the first process"


def test_two_processes_count_all_rows_and_the_first_alone_writes_and_pushes(make_model, tmp_path, hub):
    model = make_model()
    model.save_pretrained(tmp_path / "mixture")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    script = Path(__file__).parent / "callbacks_run.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    own = [line for line in ran.stderr.splitlines() if line.startswith("[rank0]")]  # not that the other was left alone
    assert ran.returncode == 0, "\n".join(own) or ran.stderr[-3000:]
    expected = expected_metrics(model)
    for name in ("transformers", "trl"):
        for rank in (0, 1):
            log = json.loads((tmp_path / f"{name}_{rank}.json").read_text())
            told = next(one for one in log if "loss" in one)
            assert {metric: told[metric] for metric in expected} == pytest.approx(expected, abs=1e-5)
            assert [one["merge_score"] for one in log if "merge_score" in one] == [0.5, 0.5]
        assert (tmp_path / name / "best_merge" / "adapter_model.safetensors").is_file()
        assert not list((tmp_path / name).glob(".best_merge*"))
        assert sum(f"two-{name}/commit/" in path for method, path, status in hub.log if method == "POST") == 1
