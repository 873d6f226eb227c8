"""The whole comparison on a tiny model: every cell there, none done twice, bad input refused."""

import json

import pytest
import torch

from moa.evaluation.full_evaluation import main
from moa.model import MoaModel
from moa.router import SequenceRouter

TASKS = ("sst2", "squad", "wmt14")


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    named = dict(zip(TASKS, adapters.values(), strict=True))
    model = MoaModel.from_adapters(str(base_folder), named)
    torch.manual_seed(0)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight, std=3.0)
    model.set_router(router)
    model.save_pretrained(tmp_path / "moa")
    return tmp_path / "moa"


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
    assert "merge:ties" in capsys.readouterr().out.replace(" ", "")


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "tie"], "ties"),
        (["--mixture", "nowhere"], "nowhere"),
        (["--tasks", "sst3"], "sst2"),
        (["--rows", "0"], "--rows"),
        (["--row", "5"], "did you mean '--rows'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(command, refusal, tmp_path, words, said):
    assert said in refusal(main, command(*words))
    assert not (tmp_path / "evaluation" / "results.json").exists()
