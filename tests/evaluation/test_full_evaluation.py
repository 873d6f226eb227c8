"""The whole comparison on a tiny model: every cell there, none done twice, bad input refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.evaluation.full_evaluation import main
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.strangeness import Abstention
from moa.tasks import load_task

TASKS = ("sst2", "squad", "wmt14")


def save_mixture(base_folder, adapters, folder, *, names=TASKS, router=True):
    model = MoaModel.from_adapters(str(base_folder), dict(zip(names, adapters.values(), strict=True)))
    if router:
        torch.manual_seed(0)
        fitted = SequenceRouter(32, 3)
        torch.nn.init.normal_(fitted.head.weight, std=3.0)
        model.set_router(fitted)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    return save_mixture(base_folder, adapters, tmp_path / "moa")


@pytest.fixture
def other_base(base_folder, tmp_path):
    """A base model of the same shapes and tokenizer, with other weights."""
    folder = shutil.copytree(base_folder, tmp_path / "another")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def command(mixture, tmp_path):
    def make(*more):
        return [
            *("--mixture", str(mixture), "--source", "pocket", "--rows", "6", "--other_rows", "4"),
            *("--validation_rows", "4", "--methods", "average", "ties", "--scales", "1", "2"),
            *("--output_dir", str(tmp_path / "evaluation"), *more),
        ]

    return make


def results(tmp_path):
    return json.loads((tmp_path / "evaluation" / "results.json").read_text())


def test_every_system_is_scored_on_every_task(command, tmp_path, capsys):
    main(command())
    found = results(tmp_path)
    assert found["attention"] == "sdpa"
    cells = {(cell["system"], cell["task"]): cell for cell in found["cells"]}
    systems = ["base", *(f"lora:{task}" for task in TASKS), "moa", "merge:average", "merge:ties", "oracle"]
    assert set(cells) == {(system, task) for system in systems for task in TASKS}
    assert [system["name"] for system in found["systems"]] == systems
    for task in TASKS:
        assert cells["oracle", task]["scores"] == cells[f"lora:{task}", task]["scores"]
        assert cells["base", task]["n"] == 6
    assert cells["lora:squad", "sst2"]["n"] == 4
    assert "unparsable" in cells["base", "sst2"]["generated"]
    assert found["router"]["n"] == 18 and sum(map(sum, found["router"]["confusion"])) == 18
    assert (tmp_path / "evaluation" / "report.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "evaluation" / "results.md").read_text().startswith("|  | sst2 (accuracy) | squad (f1) |")
    assert "merge:ties" in capsys.readouterr().out.replace(" ", "")


def test_a_mixture_that_mixes_tokens_is_scored_as_it_routes(command, tmp_path, mixture, base_folder):
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    model.set_granularity("token")
    model.save_pretrained(mixture)
    main(command("--methods", "none", "--routers", "arrow"))
    cells = {(cell["system"], cell["task"]): cell for cell in results(tmp_path)["cells"]}
    for task in TASKS:  # both mix the best two of three experts, as many as top_k says
        assert cells["moa", task]["nll"] != cells["base", task]["nll"]
    assert results(tmp_path)["router"] is None


def test_the_router_of_the_report_is_the_models_own(command, tmp_path, mixture):
    main(command())
    model = MoaModel.from_pretrained(None, mixture)
    found = results(tmp_path)["router"]
    hits = sum(found["confusion"][i][i] for i in range(3))
    assert found["accuracy"] == pytest.approx(hits / 18)
    assert found["names"] == list(model.experts)


def test_a_second_run_repeats_no_cell_and_gives_the_same_numbers(command, tmp_path, monkeypatch):
    main(command())
    first = results(tmp_path)
    monkeypatch.setattr("moa.evaluation.runner.answer_examples", lambda *a, **k: pytest.fail("done again"))
    monkeypatch.setattr("moa.evaluation.merges.choose_scale", lambda *a, **k: pytest.fail("chosen again"))
    main(command())
    second = results(tmp_path)
    first.pop("created"), second.pop("created")
    assert first == second


def test_an_interrupted_run_goes_on_where_it_stopped(command, tmp_path, monkeypatch):
    from moa.evaluation import runner

    original, calls = runner.answer_examples, []

    def interrupted(*args, **kwargs):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(args)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "answer_examples", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(command())
        assert stop.value.code == 130
    calls.clear()
    monkeypatch.setattr(runner, "answer_examples", lambda *a, **k: calls.append(a) or original(*a, **k))
    main(command())
    assert len(calls) == 7 * 3 - 5


def test_the_scale_of_a_merge_is_that_of_the_lowest_validation_likelihood(command, tmp_path):
    main(command())
    ties = next(system for system in results(tmp_path)["systems"] if system["name"] == "merge:ties")
    best = min(ties["scales"], key=ties["scales"].get)
    assert ties["note"] == f"scale {float(best):g} chosen on validation"
    average = next(system for system in results(tmp_path)["systems"] if system["name"] == "merge:average")
    assert average["scales"] == {}


def test_cells_and_scales_of_another_base_model_are_not_used_again(command, tmp_path, other_base):
    few = ("--tasks", "sst2", "--methods", "ties")
    main(command(*few))
    first = results(tmp_path)
    words = (*few, "--model", str(other_base), "--check_base", "False")
    main(command(*words))
    second = results(tmp_path)
    main(command(*words, "--output_dir", str(tmp_path / "fresh")))
    fresh = json.loads((tmp_path / "fresh" / "results.json").read_text())
    for found in (second, fresh):
        found.pop("created")
        for cell in found["cells"]:
            cell.pop("seconds")
    assert second == fresh
    assert all(one["nll"] != other["nll"] for one, other in zip(first["cells"], second["cells"], strict=True))
    assert second["base_model"] == str(other_base) != first["base_model"]
    assert second["base_weights"]["fingerprint"] != first["base_weights"]["fingerprint"]
    assert str(other_base) in (tmp_path / "evaluation" / "report.html").read_text()


def test_a_base_model_that_the_mixture_does_not_name_is_refused_unless_asked_for(command, refusal, other_base):
    config = json.loads((other_base / "config.json").read_text())
    (other_base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    assert str(other_base) in refusal(main, command("--model", str(other_base)))


def test_a_mixture_without_a_router_is_compared_without_the_row_moa(command, tmp_path, base_folder, adapters, capsys):
    folder = save_mixture(base_folder, adapters, tmp_path / "routerless", router=False)
    main(command("--mixture", str(folder)))
    found = results(tmp_path)
    assert [s["name"] for s in found["systems"] if s["kind"] != "lora"] == [
        *("base", "merge:average", "merge:ties", "oracle")
    ]
    assert found["router"] is None
    said = "The mixture has no router, so there is no row moa"
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(said) and printed.count(said) == 2  # before the work, and among the notes
    assert said in (tmp_path / "evaluation" / "report.html").read_text()


def test_cells_and_scales_that_were_cut_short_are_computed_again(command, tmp_path):
    few = ("--tasks", "squad", "--methods", "ties")
    main(command(*few))
    first = results(tmp_path)
    for name in ("scale-ties", "moa--squad"):
        file = tmp_path / "evaluation" / "cells" / f"{name}.json"
        file.write_text(file.read_text()[:40])
    main(command(*few))
    second = results(tmp_path)
    for one, other in zip(first["cells"], second["cells"], strict=True):
        assert one["nll"] == other["nll"] and one["scores"] == other["scores"]
    assert first["systems"] == second["systems"]


def test_without_merges_the_table_is_printed_and_no_validation_row_is_read(command, tmp_path, capsys, monkeypatch):
    from moa.tasks import Task

    read, examples = [], Task.examples
    monkeypatch.setattr(
        Task, "examples", lambda self, split, **more: read.append(split) or examples(self, split, **more)
    )
    main([*command(), "--methods", "none"])
    assert set(read) == {"test"}
    assert not any(system["kind"] == "merge" for system in results(tmp_path)["systems"])
    assert "No verdict: these results hold no merge to compare." in capsys.readouterr().out


def test_tasks_that_are_no_experts_are_scored_without_a_share_of_an_own_lora(command, tmp_path, capsys):
    main(command("--tasks", "mnli", "paws"))
    found = results(tmp_path)
    assert {cell["task"] for cell in found["cells"]} == {"mnli", "paws"} and found["router"] is None
    assert not any(cell["system"] == "oracle" for cell in found["cells"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "mnli is left out: its own LoRA was not scored." in printed
    assert "No verdict" in (tmp_path / "evaluation" / "report.html").read_text()


@torch.no_grad()
def test_what_the_router_did_stands_beside_its_example(command, tmp_path, mixture, base_folder):
    model = MoaModel.from_pretrained(None, mixture)
    model.moa_router.temperature.fill_(50.0)  # so that it is not sure of every prompt
    model.save_pretrained(mixture)
    main(command("--tasks", "squad", "--methods", "none", "--batch_size", "2"))
    [cell] = [cell for cell in results(tmp_path)["cells"] if cell["system"] == "moa"]
    sure, tokenizer = [], AutoTokenizer.from_pretrained(base_folder)
    prompts = [one.prompt for one in load_task("squad").examples("test", source="pocket", limit=6, seed=0)]
    for prompt in prompts:
        routing = model.route(**tokenizer([prompt], return_tensors="pt"))
        sure.append(routing.logits.softmax(dim=-1).max().item())
    lengths = [len(prompt) for prompt in prompts]
    assert lengths != sorted(lengths) and len({round(one, 4) for one in sure}) > 1, "any order would do"
    assert cell["confidence"] == pytest.approx(sure, rel=1e-3)


def test_prompts_of_a_task_without_an_expert_fall_back_and_are_counted(command, tmp_path, mixture, capsys):
    model = MoaModel.from_pretrained(None, mixture)
    router = model.moa_config.router
    router.abstention = Abstention("energy", 0.02, -1e9, 1e9)  # every prompt is strange, none very
    model.save_pretrained(mixture)
    main(command("--tasks", "sst2", "mnli", "--methods", "none"))
    found = results(tmp_path)
    assert found["fallback"] == {
        "sst2": {"n": 6, "merged": 6, "base": 0, "own": True},
        "mnli": {"n": 6, "merged": 6, "base": 0, "own": False},
    }
    assert found["router"]["n"] == found["router"]["calibration"]["prompts"] == 6
    printed = " ".join(capsys.readouterr().out.split())
    assert "mnli has no LoRA of its own: of its 6 prompts 100.0 % fell back" in printed
    nlls = {(cell["system"], cell["task"]): cell["nll"] for cell in found["cells"]}
    router.abstention = Abstention("energy", 0.02, -1e9, -1e9)  # all are very strange
    model.save_pretrained(mixture)
    main(command("--tasks", "sst2", "mnli", "--methods", "none"))
    cells = {(cell["system"], cell["task"]): cell["nll"] for cell in results(tmp_path)["cells"]}
    assert cells["moa", "mnli"] == pytest.approx(cells["base", "mnli"], rel=1e-4) != nlls["moa", "mnli"]


def test_experts_of_own_tasks_ask_for_their_yaml_files(command, refusal, tmp_path, base_folder, adapters):
    folder = save_mixture(base_folder, adapters, tmp_path / "own", names=("sst2", "tickets", "mails"))
    said = refusal(main, command("--mixture", str(folder)))
    assert "experts mails, tickets: pass --tasks with their YAML files" in said


def test_the_scores_of_the_last_evaluation_are_on_the_mixtures_card(command, mixture, monkeypatch):
    few = command("--tasks", "sst2", "--methods", "none")
    for scale in (1, 2):  # random adapters have no share of anything
        scores = {f"merge:svd (scale {scale}), share": 0.5}
        monkeypatch.setattr("moa.evaluation.comparison.card_scores", lambda found, scores=scores: scores)
        main(few)
    assert json.loads((mixture / "moa_config.json").read_text())["scores"] == {"merge:svd (scale 2), share": 0.5}
    assert "merge:svd (scale 2), share" in (mixture / "README.md").read_text()
    MoaModel.from_pretrained(None, mixture)  # the card is no part of what the checksums protect


def test_a_mixture_that_was_changed_while_it_was_evaluated_stays_as_it_is_now(command, mixture, monkeypatch, capsys):
    def meanwhile(found, file):
        model = MoaModel.from_pretrained(None, mixture)
        model.remove_expert("squad")
        model.save_pretrained(mixture)

    monkeypatch.setattr("moa.evaluation.report.write_markdown", meanwhile)
    main(command("--tasks", "sst2", "--methods", "none"))
    assert "was changed meanwhile, so its card gets no scores" in capsys.readouterr().out
    assert "squad" not in MoaModel.from_pretrained(None, mixture).experts


def test_the_help_says_that_the_mixtures_card_gets_the_scores(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "README.md and moa_config.json get the scores" in printed and "--check_base" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "tie"], "ties"),
        (["--mixture", "nowhere"], "nowhere"),
        (["--tasks", "sst3"], "sst2"),
        (["--rows", "0"], "--rows"),
        (["--scales", "1", "nan"], "--scales are finite numbers other than 0, got nan"),
        (["--row", "5"], "did you mean '--rows'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(command, refusal, tmp_path, words, said):
    assert said in refusal(main, command(*words))
    assert not (tmp_path / "evaluation" / "results.json").exists()
