"""All adapters in one run: the same adapters as one after another, from one pass over one base model."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from moa.training.data import for_each_task
from moa.training.joint import in_few_forwards
from moa.training.joint_batches import JointBatches, forwards_a_step, steps_alone
from moa.training.joint_trainer import JointTrainer
from moa.training.lora import save_adapter
from moa.training.train_lora import main

TASKS = ("sst2", "mrpc", "squad")
ROWS = {"sst2": 22, "mrpc": 9, "squad": 35}  # so that tasks finish at different steps, in the midst of an epoch
RATES = ("--lora_r", "8", "mrpc=4", "--lora_alpha", "16", "mrpc=3", "--learning_rate", "2e-3", "squad=5e-4")
HARD = (*RATES, "--gradient_accumulation_steps", "2", "--num_train_epochs", "2", "--weight_decay", "0.1")


def row(task, number):
    words = ["red", "blue", "cat", "dog", "sat", "ran", "good", "bad", "film", "review"]
    text = " ".join(words[(number * k + k) % len(words)] for k in range(1, 3 + number % 7))
    if task == "sst2":
        return {"sentence": text, "label": number % 2}
    if task == "mrpc":
        return {"sentence1": text, "sentence2": f"the {text}", "label": number % 2}
    return {"context": f"{text} {text}", "question": "question ?", "answers": {"text": [text.split()[-1]]}}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, count in ROWS.items():
        (folder / task).mkdir()
        lines = "\n".join(json.dumps(row(task, number)) for number in range(count))
        (folder / task / "train.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def words(base_folder, data_dir):
    def make(output, *more, tasks=TASKS):
        return [
            *("--tasks", *tasks, "--model", str(base_folder), "--data_dir", str(data_dir), "--source", "local"),
            *("--per_device_train_batch_size", "4", "--disable_tqdm", "true", "--output_dir", str(output), *more),
        ]

    return make


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """Adapters of the three tasks, trained one after another."""
    folder = tmp_path_factory.mktemp("alone")
    main(words(folder, *HARD))
    return folder


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def distance(one, other):
    """How far two adapters are from each other, as a share of how far training moved the first one's B."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    moved = sum(tensor.square().sum() for name, tensor in one.items() if "lora_B" in name)
    return (sum((one[name] - other[name]).square().sum() for name in one) / moved).sqrt().item()


def interrupted_at(step, monkeypatch):
    original = JointTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(JointTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--joint_batch_size", "64"),
        ("--padding_free", "true"),
        ("--padding_free", "true", "--joint_batch_size", "64", "--pad_to_multiple_of", "32"),
    ],
)
def test_joint_adapters_are_those_trained_one_after_another(alone, words, tmp_path, base_folder, more):
    main(words(tmp_path, *HARD, "--joint", *more))
    for task in TASKS:
        assert distance(alone / task, tmp_path / task) < 1e-3
        one, other = (json.loads((folder / task / "moa_training.json").read_text()) for folder in (alone, tmp_path))
        assert other["result"].pop("joint") == list(TASKS)
        assert other["result"].pop("train_loss") == pytest.approx(one["result"].pop("train_loss"), abs=1e-4)
        assert one == other
        files = {file.name for file in (alone / task).iterdir() if file.is_file()} - {"training_args.bin"}
        assert {file.name for file in (tmp_path / task).iterdir()} == files
        for name in files - {"adapter_model.safetensors", "moa_training.json"}:
            assert (tmp_path / task / name).read_bytes() == (alone / task / name).read_bytes()
    assert not (tmp_path / ".joint").exists()
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "mrpc")
    assert (stock.peft_config["default"].r, stock.peft_config["default"].lora_alpha) == (4, 3)


def test_dropout_of_the_adapters_is_drawn_in_a_joint_run_too(alone, words, tmp_path):
    for name, chance in (("never", "0"), ("once", "0.5"), ("again", "0.5")):
        main(words(tmp_path / name, "--max_steps", "3", "--joint", "--lora_dropout", chance, tasks=TASKS[:2]))
    for task in TASKS[:2]:
        assert distance(tmp_path / "never" / task, tmp_path / "once" / task) > 0.1
        assert distance(tmp_path / "once" / task, tmp_path / "again" / task) == 0


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_run_whose_second_adapter_could_not_be_saved_goes_on_from_its_checkpoint(
    words, tmp_path, monkeypatch, refusal, error
):
    def save(model, name, directory, tokenizer):
        if name == "mrpc":
            raise error("the disk is full")
        save_adapter(model, name, directory, tokenizer)

    more = ("--max_steps", "2", "--joint", "--save_steps", "2")
    main(words(tmp_path / "whole", *more, tasks=TASKS[:2]))
    with monkeypatch.context() as patch:
        patch.setattr("moa.training.joint.save_adapter", save)
        assert "the disk is full" in refusal(main, words(tmp_path / "full", *more, tasks=TASKS[:2]))
    main(words(tmp_path / "full", *more, "--resume_from_checkpoint", tasks=TASKS[:2]))
    for task in TASKS[:2]:
        one, other = (tmp_path / run / task / "adapter_model.safetensors" for run in ("whole", "full"))
        assert one.read_bytes() == other.read_bytes()


def test_a_gpu_takes_a_whole_step_at_once_or_half_as_many_rows_until_they_fit():
    tried = []

    def train(batch_size):
        tried.append(batch_size)
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return batch_size

    training = SimpleNamespace(
        device=torch.device("cuda"), world_size=1, per_device_train_batch_size=5, gradient_accumulation_steps=2
    )
    assert in_few_forwards(train, training, tasks=2) == 2
    assert tried == [20, 10, 5, 2]
    training.world_size = 2
    with pytest.raises(torch.OutOfMemoryError):
        in_few_forwards(train, training, tasks=2)
    training.device = torch.device("cpu")
    training.per_device_train_batch_size = 3
    assert in_few_forwards(train, training, tasks=2) == 3


def test_a_killed_run_resumes_to_the_same_bytes(words, tmp_path, monkeypatch, refusal):
    more = ("--max_steps", "5", "--joint", "--save_steps", "2")
    main(words(tmp_path / "whole", *more, tasks=TASKS[:2]))
    with monkeypatch.context() as patch:
        interrupted_at(4, patch)
        with pytest.raises(SystemExit) as stop:
            main(words(tmp_path / "killed", *more, tasks=TASKS[:2]))
        assert stop.value.code == 130
    assert not list((tmp_path / "killed").glob("*/adapter_model.safetensors"))
    said = refusal(main, words(tmp_path / "killed", *more, tasks=TASKS[:2]))
    assert "unfinished run (checkpoint-4): pass --resume_from_checkpoint" in said
    said = refusal(main, words(tmp_path / "killed", *more, "--resume_from_checkpoint", tasks=TASKS))
    assert "was made otherwise (its adapters differ)" in said
    main(words(tmp_path / "killed", *more, "--resume_from_checkpoint", tasks=TASKS[:2]))
    for task in TASKS[:2]:
        one, other = (tmp_path / run / task / "adapter_model.safetensors" for run in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes()


def test_what_a_run_of_one_task_finished_is_kept_and_what_it_began_is_not_touched(words, tmp_path, capsys, refusal):
    main(words(tmp_path, "--max_steps", "2", tasks=["sst2"]))
    before = (tmp_path / "sst2" / "adapter_model.safetensors").read_bytes()
    main(words(tmp_path, "--max_steps", "2", "--joint"))
    assert f"kept {tmp_path / 'sst2'}" in capsys.readouterr().out
    assert (tmp_path / "sst2" / "adapter_model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "squad" / "moa_training.json").read_text())["result"]["joint"] == ["mrpc", "squad"]
    (tmp_path / "squad" / "adapter_model.safetensors").unlink()
    (tmp_path / "squad" / "checkpoint-1").mkdir()
    (tmp_path / "squad" / "checkpoint-1" / "trainer_state.json").touch()
    said = refusal(main, words(tmp_path, "--max_steps", "2", "--joint", "--resume_from_checkpoint"))
    assert "unfinished run of this task alone (checkpoint-1): finish it without --joint" in said


def test_two_processes_train_what_two_processes_train_one_after_another(words, tmp_path):
    runs = [
        words(tmp_path / name, *RATES, "--max_steps", "4", *more)
        for name, more in (("alone", []), ("joint", ["--joint", "--joint_batch_size", "3"]))
    ]
    script = tmp_path / "both.py"
    script.write_text(f"from moa.training.train_lora import main\nfor words in {runs!r}:\n    main(words)\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "world size 2, strategy DDP (gloo)" in done.stdout
    assert all(distance(tmp_path / "alone" / task, tmp_path / "joint" / task) < 1e-3 for task in TASKS[:2])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_holds_what_each_task_takes_and_no_row_counts_for_more_than_its_task(tmp_path, monkeypatch, processes):
    training = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, use_cpu=True
    )
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    runs = [steps_alone(size, training, "task") for size in (5, 12)]
    assert [len(run) for run in runs] == ([4, 6] if processes == 1 else [2, 4])
    rows = [
        {"input_ids": [0] * (3 + index % 5), "labels": [-100, -100, 1, *[1] * (index % 5)], "expert": int(index >= 5)}
        for index in range(17)
    ]
    batches, forwards = JointBatches(rows, [5, 12], runs, 3), forwards_a_step(runs, 3)
    assert len(batches) == forwards * len(runs[1]) * processes
    for step, wanted in enumerate(runs[1]):
        items = [batches[place] for place in range(step * forwards * processes, (step + 1) * forwards * processes)]
        taken = [row for item in items for row in item]
        assert all(len(item) <= 3 for item in items) and all(items[-processes:])
        assert sum(row["expert"] for row in taken) == sum(map(len, wanted))
        for expert, run in enumerate(runs):
            shares = [row["weight"] * (len(row["labels"]) - 2) for row in taken if row["expert"] == expert]
            assert sum(shares) == pytest.approx(float(step < len(run)))


def test_values_of_each_task():
    assert for_each_task(8, ["a", "b"], "--lora_r", int) == {"a": 8, "b": 8}
    assert for_each_task(["8"], ["a", "b"], "--lora_r", int) == {"a": 8, "b": 8}
    assert for_each_task(["8", "b=16"], ["a", "b"], "--lora_r", int) == {"a": 8, "b": 16}
    assert for_each_task(["a=1e-3", "b=2"], ["a", "b"], "--learning_rate", float) == {"a": 1e-3, "b": 2.0}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lora_r", "mrpc=4"], "--lora_r has none for 'sst2': write sst2=VALUE too"),
        (["--lora_r", "8", "rte=4"], "names no task of sst2, mrpc, squad"),
        (["--lora_r", "8", "16"], "--lora_r has two values for all"),
        (["--lora_alpha", "mrpc=much", "8"], "--lora_alpha takes a whole number, got 'mrpc=much'"),
        (["--learning_rate", "fast"], "--learning_rate takes a number, got 'fast'"),
        (["--joint", "--packing", "true"], "--joint takes no --packing"),
        (["--joint", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"], "follows one loss"),
        (["--joint", "--joint_batch_size", "0"], "--joint_batch_size 0 is no number of rows"),
        (["--joint_batch_size", "8"], "--joint_batch_size is for --joint"),
        (["--joint", "--max_length", "3"], "task 'sst2' has no batch to train on, of 0 rows with an answer"),
        (["--joint", "--learning_rate", "1e-3", "mrpc=1e30", "--logging_steps", "1"], "no longer finite at step"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(words, refusal, tmp_path, more, said):
    assert said in refusal(main, words(tmp_path, *more))
    assert not list(tmp_path.glob("*/adapter_model.safetensors"))


@pytest.mark.parametrize("refused", [("--max_length", "3"), ("--learning_rate", "1e30", "--logging_steps", "1")])
def test_a_refused_run_does_not_stand_in_the_way_of_the_next(words, refusal, tmp_path, refused):
    refusal(main, words(tmp_path, "--joint", *refused))
    main(words(tmp_path, "--max_steps", "2", "--joint"))
    assert len(list(tmp_path.glob("*/adapter_model.safetensors"))) == len(TASKS)


def test_a_task_cannot_be_called_like_a_part_of_the_model(words, refusal, tmp_path, data_dir):
    task = tmp_path / "q_proj.yaml"
    task.write_text(
        "name: q_proj\nfamily: sentiment\nmetric: accuracy\nmax_new_tokens: 4\nprompt: '{sentence}'\n"
        "choices: {negative: [0], positive: [1]}\nlocal: {folders: [sst2]}\n"
    )
    said = refusal(main, words(tmp_path / "out", "--joint", tasks=["sst2", str(task)]))
    assert "an adapter cannot be called 'q_proj'" in said
