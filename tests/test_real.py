"""The whole path on a real model: SmolLM2-135M, which travels as a package; real rows where they are at hand."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel

pytestmark = pytest.mark.real
ROWS = Path(os.environ.get("MOA_REAL_ROWS", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(autouse=True, scope="module")
def threads():
    """As many threads as the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    """One conversion of the model for all of these tests."""
    monkeypatch.setenv("MOA_CACHE", str(home / "cache"))


def train_and_compare(home, name, tasks, source, steps):
    from moa.evaluation.full_evaluation import main as evaluate
    from moa.training.train_lora import main as train_lora
    from moa.training.train_moa import main as train_moa

    folder = home / name
    train_lora(
        [
            *("--tasks", *tasks, *source, "--max_steps", str(steps), "--train_rows", str(8 * steps)),
            *("--attn_implementation", "eager", "--max_length", "192", "--output_dir", str(folder / "lora")),
        ]
    )
    train_moa(
        [
            *("--tasks", *tasks, *source, "--adapters", str(folder / "lora"), "--output_dir", str(folder / "moa")),
            *("--train_rows", "40", "--validation_rows", "20"),
        ]
    )
    evaluate(
        [
            *("--mixture", str(folder / "moa"), *source, "--rows", "24", "--other_rows", "8", "--methods", "svd"),
            *("--scales", "1", "2", "--validation_rows", "4", "--output_dir", str(folder / "evaluation")),
        ]
    )
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    return folder, {(cell["system"], cell["task"]): cell for cell in results["cells"]}, results["router"]


@pytest.fixture(scope="module")
def pocket(home):
    """Two pocket tasks, learned, routed and compared once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_CACHE", str(home / "cache"))
        return train_and_compare(home, "pocket", ("sst2", "squad"), ("--source", "pocket"), steps=25)


def test_pocket_tasks_are_learned_and_routed(pocket):
    _, cells, router = pocket
    assert router["accuracy"] > 0.98
    for task in ("sst2", "squad"):
        assert cells[f"lora:{task}", task]["nll"] < 0.3 * cells["base", task]["nll"]
        assert cells["moa", task]["nll"] == pytest.approx(cells["oracle", task]["nll"], rel=0.1)
        assert cells["oracle", task]["nll"] < cells["merge:svd", task]["nll"] < cells["base", task]["nll"]


@pytest.mark.skipif(
    not ROWS.is_dir(), reason="no real rows: set MOA_REAL_ROWS to a folder of sst2/ and multi30k_en_de/"
)
def test_real_rows_lower_the_likelihood_of_their_answers(home):
    source = ("--data_dir", str(ROWS))
    _, cells, router = train_and_compare(home, "rows", ("sst2", "multi30k"), source, steps=12)
    assert router["accuracy"] > 0.95
    for task in ("sst2", "multi30k"):
        assert cells[f"lora:{task}", task]["nll"] < 0.9 * cells["base", task]["nll"]


def test_stock_peft_reads_what_the_real_model_saved(pocket):
    from moa.base_model import load_base_model, load_tokenizer
    from moa.model import MoaModel

    folder = pocket[0] / "moa"
    model = MoaModel.from_pretrained(None, folder)
    batch = load_tokenizer("smollm2-135m")(["Sentiment: positive or negative?"], return_tensors="pt")
    for name in ("sst2", "default"):
        path = folder if name == "default" else folder / name
        stock = PeftModel.from_pretrained(load_base_model("smollm2-135m"), path).eval()
        with torch.no_grad(), model.using(name):
            torch.testing.assert_close(stock(**batch).logits, model(**batch).logits)
