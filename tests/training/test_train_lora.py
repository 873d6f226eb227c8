"""One adapter a task: what is trained, what is kept, what a kill costs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moa.training.train_lora import main
from moa.training.trainer import LoraTrainer, answer_positions


@pytest.fixture
def command(base_folder, tmp_path):
    def make(*more, output="lora"):
        return [
            *("--tasks", "sst2", "--model", str(base_folder), "--source", "pocket"),
            *("--max_steps", "6", "--train_rows", "48", "--save_steps", "2", "--disable_tqdm", "true"),
            *("--output_dir", str(tmp_path / output), *more),
        ]

    return make


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def interrupted_at(step, monkeypatch):
    """Ctrl-C in the middle of a step, as a person or a scheduler would send it."""
    original = LoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", training_step)


def test_stock_peft_loads_the_adapter_and_it_has_learned_something(command, tmp_path, base_folder):
    main(command())
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "lora" / "sst2")
    config = adapted.peft_config["default"]
    assert (config.r, config.target_modules) == (8, {"q_proj", "k_proj", "v_proj", "o_proj"})
    assert all(tensor.abs().sum() > 0 for name, tensor in weights(tmp_path / "lora" / "sst2").items())


def test_a_killed_run_resumes_to_the_same_weights(command, tmp_path, monkeypatch):
    main(command(output="whole"))
    with monkeypatch.context() as patch:
        interrupted_at(5, patch)
        with pytest.raises(SystemExit) as stop:
            main(command())
        assert stop.value.code == 130
    assert not (tmp_path / "lora" / "sst2" / "adapter_model.safetensors").exists()
    main(command("--resume_from_checkpoint"))
    whole, resumed = weights(tmp_path / "whole" / "sst2"), weights(tmp_path / "lora" / "sst2")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_killed_while_it_saved_goes_on_from_the_checkpoint_before(command, tmp_path, monkeypatch):
    main(command(output="whole"))
    with monkeypatch.context() as patch:
        interrupted_at(5, patch)
        with pytest.raises(SystemExit):
            main(command())
    before, half = (tmp_path / "lora" / "sst2" / f"checkpoint-{step}" for step in (4, 5))
    shutil.copytree(before, half, ignore=shutil.ignore_patterns("optimizer.pt", "trainer_state.json"))
    main(command("--resume_from_checkpoint"))
    for name, tensor in weights(tmp_path / "whole" / "sst2").items():
        assert torch.equal(tensor, weights(tmp_path / "lora" / "sst2")[name])


def test_an_unfinished_run_is_not_overwritten(command, monkeypatch, refusal):
    with monkeypatch.context() as patch:
        interrupted_at(5, patch)
        with pytest.raises(SystemExit):
            main(command())
    said = refusal(main, command())
    assert "holds an unfinished run (checkpoint-4): pass --resume_from_checkpoint" in said


def test_a_finished_adapter_is_kept_and_one_trained_otherwise_is_not_overwritten(command, tmp_path, capsys, refusal):
    main(command())
    before = weights(tmp_path / "lora" / "sst2")
    main(command())
    assert "it was trained with these settings" in capsys.readouterr().out
    assert "made otherwise (its training differ)" in refusal(main, command("--learning_rate", "1e-4"))
    after = weights(tmp_path / "lora" / "sst2")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("words", [("--learning_rate", "1e-5"), ("--lora_alpha", "64"), ("--lora_r", "4")])
def test_a_killed_run_does_not_go_on_with_other_settings(command, monkeypatch, refusal, words):
    with monkeypatch.context() as patch:
        interrupted_at(5, patch)
        with pytest.raises(SystemExit):
            main(command())
    assert "was made otherwise" in refusal(main, command("--resume_from_checkpoint", *words))


def test_an_adapter_that_somebody_else_put_there_is_not_overwritten(command, make_adapter, tmp_path, refusal):
    path = make_adapter(tmp_path / "lora" / "sst2")
    before = (path / "adapter_model.safetensors").read_bytes()
    assert "what this run did not make" in refusal(main, command())
    assert (path / "adapter_model.safetensors").read_bytes() == before


def test_the_same_command_twice_gives_the_same_bytes_and_goes_to_the_tracker(command, tmp_path):
    for output in ("one", "two"):
        main(command("--report_to", "tensorboard", "--logging_steps", "2", output=output))
        assert list((tmp_path / output / "sst2").rglob("events.out.tfevents*"))
    one, two = (tmp_path / output / "sst2" / "adapter_model.safetensors" for output in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_record_says_what_the_adapter_was_trained_on(command, tmp_path):
    main(command())
    record = json.loads((tmp_path / "lora" / "sst2" / "moa_training.json").read_text())
    assert record["rows"] == 48
    assert record["training"]["max_steps"] == 6
    assert len(record["rows_sha256"]) == 64


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--taks", "sst2"], "did you mean '--task"),
        (["--tasks", "sst"], "sst2"),
        (["--tasks", "sst2", "sst2"], "twice"),
        (["--lora_r", "0"], "r"),
        (["--num_processes", "2"], "torchrun --nproc_per_node 2"),
        (["--data_dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(command, refusal, tmp_path, words, said):
    assert said in refusal(main, command(*words))
    assert not list(tmp_path.glob("lora/*/adapter_model.safetensors"))


def test_a_length_that_cuts_off_every_answer_is_refused_and_does_not_stand_in_the_way(command, refusal, tmp_path):
    said = refusal(main, command("--max_length", "3"))
    assert "of 48 rows none has an answer within --max_length 3" in said
    main(command())
    assert (tmp_path / "lora" / "sst2" / "adapter_model.safetensors").is_file()


def test_logits_are_computed_where_an_answer_is_in_any_row():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, -100, -100, 7, 8]])
    assert answer_positions(labels).tolist() == [1, 2, 3]


def test_the_loss_is_that_of_all_logits(base_model, command):
    ids = torch.randint(3, 20, (2, 7))
    labels = ids.clone()
    labels[0, :4] = labels[1, :5] = -100
    expected = F.cross_entropy(
        base_model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    kept = base_model(input_ids=ids, logits_to_keep=answer_positions(labels)).logits
    got = F.cross_entropy(kept.transpose(1, 2), labels[:, answer_positions(labels) + 1])
    torch.testing.assert_close(got, expected)


def test_two_processes_train_one_adapter_data_parallel(command, tmp_path):
    script = Path(__file__).parents[2] / "training" / "train_lora.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), *command("--num_processes", "2", "--max_steps", "2")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("world size 2, strategy DDP (gloo), device cpu") == 1
    state = json.loads((tmp_path / "lora" / "sst2" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(2 * 2 * 8 / 48, rel=0.1)  # two processes see twice the rows


@pytest.mark.parametrize("more", [(), ("--lora_target_modules", "all-linear"), ("--joint",)])
def test_an_adapter_may_leave_the_first_layers_as_they_are(command, tmp_path, more):
    main(command("--lora_first_layer", "2", *more))
    layers = {name.split(".layers.")[1].split(".")[0] for name in weights(tmp_path / "lora" / "sst2")}
    assert layers == {"2", "3"}  # of four


def test_a_first_layer_that_the_model_does_not_have_is_refused(command, refusal):
    assert "--lora_first_layer 4 is no layer of this model: it has 0 to 3" in refusal(
        main, command("--lora_first_layer", "4")
    )
    main(command("--lora_first_layer", "3"))  # and leaves nothing in the way


def test_the_config_of_an_adapter_has_the_same_bytes_in_every_process(base_folder, tmp_path):
    saved = []
    for hashes in ("1", "2"):
        words = ["--task", "sst2", "--model", str(base_folder), "--source", "pocket", "--max_steps", "1"]
        words += ["--train_rows", "8", "--output_dir", str(tmp_path / hashes)]
        environment = {**os.environ, "PYTHONHASHSEED": hashes}
        command = [sys.executable, "-m", "moa.training.train_lora", *words]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        saved.append((tmp_path / hashes / "sst2" / "adapter_config.json").read_bytes())
    assert saved[0] == saved[1]
