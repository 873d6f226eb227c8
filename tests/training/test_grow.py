"""The command that adds experts to a saved mixture, and removes them."""

import pytest

from moa.model import MoaModel
from moa.training.fit_router import main as fit_router
from moa.training.grow import main

FEW = ("--source", "pocket", "--train_rows", "24", "--validation_rows", "12")


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    """A saved mixture of two tasks with a fitted router."""
    folder = tmp_path / "moa"
    model = MoaModel.from_adapters(str(base_folder), {"sst2": adapters["cats"], "squad": adapters["dogs"]})
    model.save_pretrained(folder)
    fit_router(
        [str(folder), *FEW, "--layers", "1", "--poolings", "mean", "--heads", "linear", "--disable_tqdm", "true"]
    )
    return folder


def test_an_expert_is_added_and_removed_again(mixture, adapters, base_folder, capsys):
    before = MoaModel.from_pretrained(None, mixture)
    capsys.readouterr()
    main([str(mixture), "--add", f"piqa={adapters['films']}", *FEW])
    said = capsys.readouterr().out
    model = MoaModel.from_pretrained(None, mixture)
    assert model.experts == ("sst2", "squad", "piqa")
    assert all(f"{name}: router accuracy on held-out prompts" in said for name in model.experts)
    fitted = model.moa_config.router
    assert fitted.calibration.prompts == 2 * 36 and fitted.plain_prompts  # with and without their templates
    assert fitted.abstention.score == "both"
    assert model.moa_config.scores.keys() == {"router accuracy on held-out prompts"}
    head = before.moa_router.head
    assert model.moa_router.head.weight[:2].equal(head.weight) and model.moa_router.head.bias[:2].equal(head.bias)

    main([str(mixture), "--remove", "piqa", *FEW])
    again = MoaModel.from_pretrained(None, mixture)
    assert again.experts == ("sst2", "squad") and not (mixture / "piqa").exists()
    now, then = again.moa_config.router.abstention, before.moa_config.router.abstention
    assert (now.score, now.rate, now.base_above) == (then.score, then.rate, pytest.approx(then.base_above, rel=1e-4))
    assert now.merged_above == pytest.approx(then.merged_above, rel=1e-4)
    assert now.typical == {name: pytest.approx(numbers, rel=1e-4) for name, numbers in then.typical.items()}
    assert again.moa_router.head.weight.equal(head.weight)


def test_an_expert_is_replaced_by_another_adapter_of_its_name(mixture, adapters):
    main([str(mixture), "--remove", "sst2", "--add", f"sst2={adapters['films']}", *FEW])
    model = MoaModel.from_pretrained(None, mixture)
    assert model.experts == ("squad", "sst2") and model.peft_config["sst2"].r == 8


def test_bad_input_is_one_sentence_and_changes_nothing(mixture, adapters, refusal):
    config = (mixture / "moa_config.json").read_bytes()
    for words, message in (
        ([], "nothing to do"),
        (["--add", "piqa"], "--add takes NAME=ADAPTER"),
        (["--add", f"piqa={adapters['films']}", "piqa=elsewhere"], "--add names 'piqa' twice"),
        (["--add", f"squad={adapters['films']}"], "an expert is called 'squad' already"),
        (["--remove", "birds"], "no expert is called 'birds'"),
        (["--add", f"piqa={adapters['films']}", "--tasks", "sst2", "squad"], "no task is called 'piqa'"),
    ):
        assert message in refusal(main, [str(mixture), *words, *FEW])
    assert (mixture / "moa_config.json").read_bytes() == config
