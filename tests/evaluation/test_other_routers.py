"""Rows of the table for other routers, against the rows that they should equal."""

import json

import pytest
import torch

from moa.evaluation.full_evaluation import main
from moa.evaluation.other_routers import router_systems
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.strangeness import fit_mahalanobis

TASKS = ("sst2", "squad", "wmt14")


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    """With a router that knows the means of its prompts, and a head that says nothing."""
    model = MoaModel.from_adapters(str(base_folder), dict(zip(TASKS, adapters.values(), strict=True)))
    torch.manual_seed(0)
    router = SequenceRouter(32, 3)
    router.detector = fit_mahalanobis(torch.randn(12, 32), torch.arange(12) % 3, 3)
    model.set_router(router)
    model.save_pretrained(tmp_path / "moa")
    return tmp_path / "moa"


def test_other_routers_are_rows_of_the_table(mixture, tmp_path, capsys):
    words = ["--mixture", str(mixture), "--tasks", "sst2", "--source", "pocket", "--rows", "6", "--other_rows", "6"]
    words += ["--validation_rows", "4", "--methods", "average", "--routers", "uniform", "random", "centroid", "arrow"]
    main([*words, "--output_dir", str(tmp_path / "evaluation")])
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    cells = {cell["system"]: cell for cell in found["cells"]}
    assert "other routers" in capsys.readouterr().out
    # equal weights are the average of the updates
    uniform, average = (cells[name]["nll_per_example"] for name in ("router:uniform", "merge:average"))
    assert uniform == pytest.approx(average, rel=1e-3)
    # a random choice is one of the experts' answers
    alone = torch.tensor([cells[f"lora:{task}"]["nll_per_example"] for task in TASKS])
    chosen = torch.tensor(cells["router:random"]["nll_per_example"])
    nearest = torch.tensor(cells["router:centroid"]["nll_per_example"])
    for one in (chosen, nearest):
        assert ((alone - one).abs().amin(dim=0) < 1e-4).all()
    kinds = {system["name"]: system["kind"] for system in found["systems"]}
    assert kinds["router:arrow"] == "router" and cells["router:arrow"]["nll"] > 0


def test_a_random_choice_depends_on_the_prompt_alone(mixture, base_folder):
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    (system,) = router_systems(model, ["random"], seed=1)

    def weights(ids, mask):
        with system.activate(torch.tensor(ids), torch.tensor(mask)):
            return model.route_state.weights.clone()

    ids = [[0, 5, 6, 7], [8, 9, 10, 11], [0, 0, 12, 13]]
    together = weights(ids, [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    assert weights([[12, 13]], [[1, 1]]).equal(together[2:]) and weights([[5, 6, 7]], [[1, 1, 1]]).equal(together[:1])
    many = weights([[one, two] for one in range(3, 23) for two in range(3, 23)], [[1, 1]] * 400).mean(dim=0)
    assert (many - 1 / 3).abs().max() < 0.08


def test_the_nearest_centroid_is_found_on_standardised_features(mixture, base_folder):
    model = MoaModel.from_pretrained(str(base_folder), mixture)
    router = model.moa_router
    router.mean += 0.3
    router.std *= 1.7
    (system,) = router_systems(model, ["centroid"])
    ids = torch.arange(3, 27).view(8, 3)
    z = ((model.features(ids) - router.mean) / router.std).double()
    with system.activate(ids, torch.ones_like(ids)):
        found = model.route_state.weights.argmax(dim=1)
    assert found.equal(torch.cdist(z, router.detector.means.double()).argmin(dim=1))


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        (["oracle"], "the table has it always"),
        (
            ["arow"],
            "--routers arow does not exist: choose from uniform, random, centroid, arrow, sequence, soft, layer, "
            "layer_soft, gates; did you mean 'arrow'?",
        ),
        (["random", "random"], "--routers names one twice"),
    ],
)
def test_unknown_routers_are_refused_in_one_sentence(mixture, refusal, routers, message):
    assert message in refusal(main, ["--mixture", str(mixture), "--source", "pocket", "--routers", *routers])
