"""Training token gates: what a mixture gets, what stays, and what a killed training leaves."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.tasks import load_task
from moa.training.fit_gates import main
from moa.training.fit_router import main as fit_router
from moa.training.gates_fit import GatesTrainer

NAMES = ("sst2", "squad", "piqa")


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    """A saved mixture with a router."""
    model = MoaModel.from_adapters(str(base_folder), dict(zip(NAMES, adapters.values(), strict=True)))
    model.set_router(SequenceRouter(32, 3))
    model.moa_config.scores = {"moa: share": 0.4, "merge:svd: share": 0.3}
    model.save_pretrained(tmp_path / "moa")
    return tmp_path / "moa"


@pytest.fixture
def command(mixture):
    def make(*more):
        shared = "--source pocket --train_rows 16 --validation_rows 4 --num_train_epochs 2 --learning_rate 0.05"
        return [str(mixture), *shared.split(), "--disable_tqdm", "true", "--report_to", "none", *more]

    return make


@torch.no_grad()
def nats_a_token(model, base_folder, own=False):
    """Of the held-out answers, by forwards of their own: mean over the answers of each one's mean."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    losses = []
    for name in NAMES:
        for example in load_task(name).examples("validation", source="pocket", limit=4, seed=42):
            prompt, whole = (
                tokenizer(text)["input_ids"] for text in (example.prompt, example.prompt + example.answer)
            )
            with model.pinned([name]) if own else nullcontext():
                logits = model(input_ids=torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(whole[len(prompt) :])).item())
    return sum(losses) / len(losses)


def test_a_mixture_gets_gates_that_make_answers_likelier_and_keeps_everything_else(
    command, mixture, base_folder, capsys
):
    before = {file: file.read_bytes() for file in mixture.rglob("*.safetensors")}
    main(command())
    found = json.loads((mixture / "gates_fit" / "gates_report.json").read_text())
    assert found["gates"] < found["all_alike"]
    assert all(file.read_bytes() == content for file, content in before.items())
    loaded = MoaModel.from_pretrained(str(base_folder), mixture)
    assert loaded.routes_by_gates and loaded.moa_router is not None
    assert nats_a_token(loaded, base_folder) == pytest.approx(found["gates"], rel=1e-4)
    assert nats_a_token(loaded, base_folder, own=True) == pytest.approx(found["own_expert"], rel=1e-4)
    assert "moa: share" not in loaded.moa_config.scores and loaded.moa_config.scores["merge:svd: share"] == 0.3
    assert f"{found['gates']:.3f} with the gates" in capsys.readouterr().out
    main(command())
    assert "kept the gates" in capsys.readouterr().out


def test_the_card_promises_no_fallback_where_tokens_are_routed(command, mixture):
    words = "--source pocket --train_rows 8 --validation_rows 4 --heads centroid"
    fit_router([str(mixture), *words.split()])
    assert "runs none of them" in (mixture / "README.md").read_text()
    main(command())
    card = (mixture / "README.md").read_text()
    assert "runs none of them" not in card and "mix the experts however strange their prompt is" in card
    model = MoaModel.from_pretrained(None, mixture)
    model.set_granularity("sequence")
    model.save_pretrained(mixture)
    assert "runs none of them" in (mixture / "README.md").read_text()


def test_a_fit_that_the_mixture_no_longer_routes_by_is_not_said_to_be_kept(command, mixture, refusal):
    words = "--source pocket --train_rows 8 --validation_rows 4 --heads centroid"
    router = [str(mixture), *words.split()]
    fit_router(router)
    main(command())
    assert "routes otherwise now: pass --overwrite to fit it again" in refusal(fit_router, router)
    fit_router([*router, "--overwrite"])
    assert MoaModel.from_pretrained(None, mixture).moa_config.granularity == "sequence"
    assert "routes otherwise now: pass --overwrite to fit it again" in refusal(main, command())


def test_a_killed_training_resumes_to_the_same_gates(command, mixture, monkeypatch):
    words = command("--save_steps", "2", "--max_steps", "5")
    main(words)
    whole = load_file(mixture / "moa_gates.safetensors")

    class Killed(Exception):
        pass

    step = GatesTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(GatesTrainer, "training_step", dies)
    with pytest.raises(Killed):
        main([*words, "--overwrite"])
    monkeypatch.undo()
    main([*words, "--resume_from_checkpoint"])
    resumed = load_file(mixture / "moa_gates.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gates_stay_with_a_mixture_that_routes_otherwise(command, mixture, base_folder):
    main(command("--max_steps", "2"))
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    model.set_granularity("sequence")
    model.save_pretrained(mixture)
    again = MoaModel.from_pretrained(str(base_folder), mixture)
    assert not again.routes_by_gates
    for name, tensor in model.moa_gates.state_dict().items():
        assert torch.equal(again.moa_gates.state_dict()[name], tensor)
    again.set_granularity("token", by="gates")
    assert again.routes_by_gates


def test_another_training_needs_overwrite(command, mixture, refusal):
    main(command("--max_steps", "1"))
    assert "pass --overwrite to fit it again" in refusal(main, command("--max_steps", "2"))
    main(command("--max_steps", "2", "--overwrite"))
    assert json.loads((mixture / "gates_fit" / "moa_training.json").read_text())["training"]["max_steps"] == 2


def test_experts_that_cannot_be_mixed_are_refused_and_leave_nothing(
    base_folder, make_adapter, adapters, tmp_path, command, refusal
):
    make_adapter(tmp_path / "dora", use_dora=True)
    folders = {"sst2": tmp_path / "dora", "squad": list(adapters.values())[0]}
    MoaModel.from_adapters(str(base_folder), folders).save_pretrained(tmp_path / "mixed")
    words = [str(tmp_path / "mixed"), *command()[1:]]
    assert "expert 'sst2' is a DoRA adapter" in refusal(main, words)
    assert not (tmp_path / "mixed" / "gates_fit" / "moa_training.json").exists()
