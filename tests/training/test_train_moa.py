"""The router: fitted on cached features, calibrated, resumed, saved with its experts."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.training.router_trainer import RouterTrainer
from moa.training.train_moa import main


@pytest.fixture
def command(base_folder, adapters, tmp_path):
    def make(*more, output="moa"):
        pairs = [f"{task}={path}" for task, path in zip(("sst2", "squad", "piqa"), adapters.values(), strict=True)]
        return [
            *("--tasks", "sst2", "squad", "piqa", "--adapters", *pairs, "--model", str(base_folder)),
            *("--source", "pocket", "--train_rows", "40", "--validation_rows", "16", "--num_train_epochs", "4"),
            *("--layers", "1", "--poolings", "mean", "--heads", "linear"),
            *("--disable_tqdm", "true", "--output_dir", str(tmp_path / output), *more),
        ]

    return make


def router_weights(folder):
    return load_file(folder / "moa_router.safetensors")


def test_the_saved_mixture_routes_as_the_training_reported(command, tmp_path, capsys):
    main(command())
    said = capsys.readouterr().out
    assert "router accuracy" in said and "95 % interval" in said
    model = MoaModel.from_pretrained(None, tmp_path / "moa")
    assert model.experts == ("sst2", "squad", "piqa")
    assert model.moa_config.router.layer == 1
    assert model.moa_config.scores["router accuracy on held-out prompts"] > 0.5
    assert model.moa_router.temperature != 1


def test_the_features_are_computed_once(command, tmp_path, monkeypatch):
    main(command())
    monkeypatch.setattr("moa.training.prompt_features.prompt_states", lambda *args: pytest.fail("computed again"))
    main(command(output="again"))
    first, second = router_weights(tmp_path / "moa"), router_weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_fit_resumes_to_the_same_router(command, tmp_path, monkeypatch):
    main(command(output="whole"))
    original = RouterTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RouterTrainer, "training_step", killed)
        with pytest.raises(SystemExit):
            main(command())
    assert not (tmp_path / "moa" / "moa_config.json").exists()
    main(command("--resume_from_checkpoint"))
    whole, resumed = router_weights(tmp_path / "whole"), router_weights(tmp_path / "moa")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_mixture_is_kept_and_another_one_is_not_put_over_it(command, tmp_path, capsys, refusal):
    main(command())
    before = (tmp_path / "moa" / "moa_router.safetensors").read_bytes()
    main(command())
    assert "kept" in capsys.readouterr().out
    said = refusal(main, command("--resume_from_checkpoint", "--tasks", "squad", "sst2", "piqa"))
    assert "made otherwise (its experts, rows_sha256 differ)" in said or "its rows_sha256 differ" in said
    assert (tmp_path / "moa" / "moa_router.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "sst2", "--adapters", "somewhere"], "at least two tasks"),
        (["--adapters", "sst2=a", "squad=b"], "none for 'piqa'"),
        (["--adapters", "mnli=a"], "names no task"),
        (["--routing", "hardd"], "hard, top_k, soft"),
        (["--layers", "9"], "this model has layers 1 to 4"),
        (["--fallback_method", "tie"], "ties"),
        (["--adapters", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(command, refusal, tmp_path, words, said):
    assert said in refusal(main, command(*words))
    assert not (tmp_path / "moa" / "moa_config.json").exists()


def test_two_processes_train_data_parallel_and_say_so(command, tmp_path):
    script = os.path.join(os.path.dirname(__file__), "../../training/train_moa.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, script, *command("--num_processes", "2", "--save_strategy", "no")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "world size 2, strategy DDP (gloo), device cpu" in done.stdout
    assert MoaModel.from_pretrained(None, tmp_path / "moa").moa_config.scores


def test_processes_that_do_not_know_each_other_are_refused(command, refusal, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "each of which runs alone" in refusal(main, command("--use_cpu", "false"))


def test_a_launcher_that_started_one_process_instead_of_two_is_refused(command, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        main(command())
    assert "asked for several processes and started one" in capsys.readouterr().err


def test_calibration_undoes_a_router_that_is_too_sure():
    torch.manual_seed(0)
    features, labels = torch.randn(2000, 3), None
    labels = torch.distributions.Categorical(logits=features).sample()
    router = SequenceRouter(3, 3)
    with torch.no_grad():
        router.head.weight.copy_(4 * torch.eye(3))
    assert router.calibrate(features, labels) == pytest.approx(4, rel=0.15)
    torch.testing.assert_close(router(features), features, rtol=0.2, atol=0.2)
