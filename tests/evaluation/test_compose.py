"""Budgets of adapters: both ends are what they should be, the middle is clusters, and everything can be run again."""

import html
import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.adapters import from_model
from moa.evaluation.budgets import recommendation
from moa.evaluation.clusters import Composition, agreement, cluster_name, compositions, cosines, gains_kept
from moa.evaluation.compose import main
from moa.evaluation.composition import Composer
from moa.evaluation.kept import Kept
from moa.evaluation.merges import AskedMerge
from moa.merging import merge
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.strangeness import Abstention, Mahalanobis
from moa.tasks import load_tasks

TASKS = ("sst2", "squad", "wmt14")
PAIR = Composition((("sst2", "wmt14"), ("squad",)))
ALL = Composition((TASKS,))
PROMPTS = ["the red cat sat .", "a good film", "two blue dog : question ?", "no"]


@pytest.fixture(scope="module")
def mixture(base_folder, adapters, tmp_path_factory):
    model = MoaModel.from_adapters(str(base_folder), dict(zip(TASKS, adapters.values(), strict=True)))
    torch.manual_seed(0)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight, std=3.0)
    model.set_router(router)
    folder = tmp_path_factory.mktemp("mixture") / "moa"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def prompts(tokenizer):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")


@pytest.fixture
def composer(mixture, tokenizer, tmp_path):
    def make(method="svd", scales=(1.0,)):
        model = MoaModel.from_pretrained(None, mixture)
        rows = {task.name: task.examples("validation", source="pocket", limit=2) for task in load_tasks(TASKS)}
        return Composer(
            model,
            tokenizer,
            AskedMerge.read(method),
            scales=scales,
            validation=rows,
            mixture=mixture,
            kept=Kept(tmp_path / "cells", model),
        )

    return make


def words(mixture, output, *more):
    return [
        *("--mixture", str(mixture), "--source", "pocket", "--rows", "3", "--validation_rows", "2"),
        *("--method", "svd", "--scales", "1", "2", "--max_new_tokens", "2", "--output_dir", str(output), *more),
    ]


@pytest.fixture
def command(mixture, tmp_path):
    return lambda *more: words(mixture, tmp_path / "composed", *more)


@pytest.fixture(scope="module")
def composed(mixture, tmp_path_factory):
    """What one run of the command leaves behind."""
    folder = tmp_path_factory.mktemp("output") / "composed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_CACHE", str(folder.parent / "cache"))
        main(words(mixture, folder, "--keep", "2"))
    return folder


def logits(model, prompts, context):
    with torch.no_grad(), context:
        return model(**prompts).logits


def activated(composer, composition, prompts):
    activate = composer.system(composition).activate
    return logits(composer.model, prompts, activate(prompts["input_ids"], prompts["attention_mask"]))


# ---- both ends


def test_the_budget_of_all_experts_is_the_mixture_itself(composer, mixture, prompts):
    composed = activated(composer(), Composition((("sst2",), ("squad",), ("wmt14",))), prompts)
    model = MoaModel.from_pretrained(None, mixture)
    with torch.no_grad():
        assert torch.equal(composed, model(**prompts).logits)


def test_the_budget_of_one_is_the_plain_merge(composer, mixture, base_folder, prompts, tmp_path):
    made = composer(scales=(2.0,))
    composed = activated(made, ALL, prompts)
    merge([mixture / name for name in TASKS], "svd", scale=2.0, output=tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, tmp_path / "merged").eval()(**prompts).logits
    assert torch.allclose(composed, expected, atol=1e-4)
    assert made.strength(TASKS)["scale"] == 2.0


# ---- in between


def test_a_cluster_runs_its_merge_and_an_expert_alone_itself(composer, mixture, base_folder, prompts, tmp_path):
    made = composer()
    composed = activated(made, PAIR, prompts)
    with made.running(PAIR):
        chosen = made.model.route(**prompts).experts
    assert sorted(set(chosen)) == [0, 1]
    merge([mixture / "sst2", mixture / "wmt14"], "svd", output=tmp_path / "merged")
    for row, cluster in enumerate(chosen):
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        stock = PeftModel.from_pretrained(base, (tmp_path / "merged", mixture / "squad")[cluster]).eval()
        with torch.no_grad():
            assert torch.allclose(composed[row], stock(**prompts).logits[row], atol=1e-4)


def test_a_cluster_is_as_likely_as_its_members_together(composer, prompts):
    made = composer()
    single = made.model.route(**prompts).logits.softmax(dim=-1)
    with made.running(PAIR):
        folded = made.model.route(**prompts).logits.softmax(dim=-1)
    assert torch.allclose(folded, torch.stack([single[:, 0] + single[:, 2], single[:, 1]], dim=1), atol=1e-6)


def test_after_a_composition_the_model_is_the_mixture_again(composer, prompts):
    made = composer()
    model = made.model
    before = model.moa_config.to_json(), logits(model, prompts, torch.no_grad())
    activated(made, PAIR, prompts)
    assert model.experts == TASKS and model.moa_config.to_json() == before[0]
    assert torch.equal(logits(model, prompts, torch.no_grad()), before[1])


def test_a_folded_router_folds_again_and_refuses_clusters_that_leave_an_expert_out():
    torch.manual_seed(1)
    router = SequenceRouter(8, 4, head="mlp", hidden_units=5)
    torch.nn.init.normal_(router.head[-1].weight)
    features = torch.randn(6, 8)
    twice = router.folded([0, 1, 0, 2]).folded([0, 1, 1])
    shares = router(features).softmax(dim=-1)
    expected = torch.stack([shares[:, [0, 2]].sum(dim=1), shares[:, [1, 3]].sum(dim=1)], dim=1)
    assert torch.allclose(twice(features).softmax(dim=-1), expected, atol=1e-6)
    assert router.num_experts == 4
    for clusters in ([0, 1, 0], [0, 2, 0, 2], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match="one for each of 4 experts"):
            router.folded(clusters)


def test_members_are_merged_with_their_own_statistics(composer, monkeypatch):
    class Asked(Exception):
        pass

    def merging(model, asked, adapter, needs):
        raise Asked(model.experts, [statistics.about["of"] for statistics in needs["statistics"]])

    monkeypatch.setattr(
        "moa.evaluation.merges.read_statistics", lambda path: SimpleNamespace(about={"of": path.parent.name})
    )
    monkeypatch.setattr("moa.evaluation.merges.make_merge", merging)
    with pytest.raises(Asked) as found:
        composer("regmean").strength(("squad", "wmt14"))
    assert found.value.args == (("squad", "wmt14"), ["squad", "wmt14"])


def test_weights_that_are_looked_for_are_those_of_the_members_alone(composer, prompts):
    made = composer("lorahub_linear:budget=4", scales=(1.0,))
    activated(made, PAIR, prompts)
    assert set(made.model.peft_config) == {*TASKS, "default", "sst2-wmt14"}


# ---- clusters


def test_cosines_are_those_of_the_dense_updates(mixture):
    model = MoaModel.from_pretrained(None, mixture)
    read = [from_model(model, name) for name in TASKS]
    modules = sorted({module for adapter in read for module in adapter.modules})
    shapes = {module: adapter.modules[module].shape for adapter in read for module in adapter.modules}
    dense = torch.stack(
        [
            torch.cat(
                [
                    (a.modules[m].B @ a.modules[m].A if m in a.modules else torch.zeros(shapes[m])).flatten()
                    for m in modules
                ]
            )
            for a in read
        ]
    )
    assert torch.allclose(cosines(read).float(), torch.corrcoef(torch.cat([dense, -dense], dim=1)), atol=1e-5)


def test_the_gain_kept_is_a_share_of_the_own_adapters_and_unknown_where_there_is_none():
    nll = torch.tensor([[1.0, 2.5], [2.0, 3.5], [5.0, 1.0]])
    gains = gains_kept(nll, torch.tensor([3.0, 3.0]), [0, 1, None])
    expected = [[1.0, torch.nan, torch.nan], [0.5, torch.nan, torch.nan], [-1.0, torch.nan, torch.nan]]
    assert torch.allclose(gains, torch.tensor(expected, dtype=gains.dtype), equal_nan=True)


def test_agreement_is_the_mean_of_both_and_of_the_cosine_alone_where_no_gain_is_known():
    angles = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, torch.nan], [0.4, torch.nan, torch.nan]])
    gains = torch.tensor([[1.0, torch.nan, torch.nan], [0.6, torch.nan, torch.nan], [torch.nan] * 3])
    found = agreement(angles, gains, 0.25)
    assert found[0, 1] == found[1, 0] == pytest.approx(0.25 * 0.2 + 0.75 * 0.6)
    assert found[0, 2] == pytest.approx(0.4) and found[1, 2] == 0


def test_clusters_are_those_of_scipys_tree_at_every_budget():
    torch.manual_seed(3)
    near = torch.rand(7, 7, dtype=torch.float64)
    near = ((near + near.T) / 2).fill_diagonal_(1)
    names = list("abcdefg")
    tree = linkage(squareform((1 - near).numpy(), checks=False), "average")
    for budget, composition in compositions(names, near, range(1, 8)).items():
        labels = fcluster(tree, budget, "maxclust")
        expected = {frozenset(n for n, own in zip(names, labels, strict=True) if own == label) for label in labels}
        assert set(map(frozenset, composition.clusters)) == expected and composition.budget == budget
        assert [c[0] for c in composition.clusters] == sorted(c[0] for c in composition.clusters)


def test_adapters_that_agree_alike_still_give_every_budget():
    found = compositions(["a", "b", "c", "d"], torch.full((4, 4), 0.3).fill_diagonal_(1), [1, 2, 3, 4])
    assert [composition.budget for composition in found.values()] == [1, 2, 3, 4]


def test_a_cluster_is_named_after_its_members_or_the_first_of_many():
    assert cluster_name(["a"]) == "a" and cluster_name(["a", "b", "c"]) == "a-b-c"
    assert cluster_name(list("abcdef")) == "a-and-5-more"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "a-b", "c"], "merge of a, b would be called 'a-b', and so is an expert"),
        (["a", "b-c", "a-b", "c"], "merge of a-b, c would be called 'a-b-c', and so is that of a, b-c"),
    ],
)
def test_a_cluster_that_would_take_the_name_of_another_adapter_is_refused(names, said):
    pairs = torch.eye(2).repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    assert len(compositions(names, pairs, [4])) == 1
    with pytest.raises(ValueError, match=said):
        compositions(names, pairs, [2, 4])


# ---- the command


def test_the_command_scores_every_budget_and_writes_an_ordinary_mixture(composed, prompts):
    found = json.loads((composed / "compose.json").read_text())
    assert [of["budget"] for of in found["budgets"]] == [1, 2, 3] and found["kept"] == 2
    assert all(of["nll"] > 0 and of["latency"]["ratio"] > 0 and of["parameters"] > 0 for of in found["budgets"])
    cells = {(cell["system"], cell["task"]) for cell in found["cells"]}
    systems = ["base", "oracle", *(f"compose:{budget}" for budget in (1, 2, 3))]
    assert cells == {*((name, task) for name in systems for task in TASKS), *((f"lora:{t}", t) for t in TASKS)}
    model = MoaModel.from_pretrained(None, composed / "mixture")
    clusters = found["budgets"][1]["clusters"]
    assert list(model.experts) == list(clusters) and len(model.experts) == 2
    assert model.route(**prompts).logits.shape == (4, 2)


def test_the_report_holds_the_recommendation_and_needs_no_network(composed):
    found = json.loads((composed / "compose.json").read_text())
    page = (composed / "compose.html").read_text()
    assert html.escape(found["recommendation"], quote=True).replace("&#x27;", "&#39;") in page
    assert "<svg" in page and "src=" not in page and 'href="http' not in page
    assert (composed / "compose.png").read_bytes().startswith(b"\x89PNG")


def test_the_cross_task_likelihoods_are_those_of_each_adapter_alone(composed, mixture, base_folder, tokenizer):
    found = json.loads((composed / "compose.json").read_text())["agreement"]["nll"]
    rows = load_tasks(["squad"])[0].examples("validation", source="pocket", limit=2)
    base, under = (AutoModelForCausalLM.from_pretrained(base_folder) for _ in range(2))
    adapted = PeftModel.from_pretrained(under, mixture / "wmt14")
    for model, of_model in ((base.eval(), found[3]), (adapted.eval(), found[2])):
        losses = []
        for row in rows:
            ids = tokenizer(row.prompt + row.answer, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(tokenizer(row.prompt)["input_ids"])] = -100
            with torch.no_grad():
                losses.append(float(model(input_ids=ids, labels=labels).loss))
        assert of_model[1] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_the_written_mixture_answers_as_the_budget_that_was_scored(composer, prompts, tmp_path):
    made = composer(scales=(2.0,))
    expected = activated(made, PAIR, prompts)
    with made.running(PAIR):
        made.model.save_pretrained(tmp_path / "written")
    model = MoaModel.from_pretrained(None, tmp_path / "written")
    with torch.no_grad():
        assert torch.equal(model(**prompts).logits, expected)


def test_a_composition_doubts_the_prompts_that_the_mixture_doubts(composer, prompts, tmp_path):
    made = composer()
    model, fitted = made.model, made.model.moa_config.router
    detector = Mahalanobis(3, 32, 2)
    torch.nn.init.normal_(detector.means)
    model.moa_router.detector = detector
    scores = detector(model.moa_router.standardised(model.features(**prompts))).sort().values.tolist()
    fitted.abstention = Abstention("mahalanobis", 0.1, sum(scores[1:3]) / 2, sum(scores[2:]) / 2)
    whole = model.route(**prompts)
    assert sorted(whole.fallback.tolist()) == [0, 0, 1, 2]
    with made.running(PAIR):
        composed = model.route(**prompts)
        model.save_pretrained(tmp_path / "written")
    written = MoaModel.from_pretrained(None, tmp_path / "written").route(**prompts)
    for found in (composed, written):
        assert torch.equal(found.fallback, whole.fallback) and torch.equal(found.strangeness, whole.strangeness)
        assert torch.equal(found.weights[:, -1], whole.weights[:, -1])  # the merged adapter's column


def test_a_second_run_measures_nothing_again_and_gives_the_same_bytes(composed, mixture, monkeypatch):
    def files():
        return {str(path.relative_to(composed)): path.read_bytes() for path in composed.rglob("*") if path.is_file()}

    first = files()
    for name in ("runner.answer_examples", "merges.choose_scale", "composition.measure_latency"):
        monkeypatch.setattr(f"moa.evaluation.{name}", lambda *a, **k: pytest.fail("done again"))
    main(words(mixture, composed, "--keep", "2"))
    assert files() == first


def test_but_for_latencies_another_folder_gets_the_same_results(composed, command, tmp_path, monkeypatch):
    def results(folder):
        found = json.loads((folder / "compose.json").read_text())
        for of in found["budgets"]:
            of.pop("latency")
        return {**found, "recommendation": ""}

    taken = {"seconds": 1.0, "base": 1.0, "ratio": 1.0, "prompts": 9, "prompt_tokens": 9, "new_tokens": 16}
    monkeypatch.setattr("moa.evaluation.composition.measure_latency", lambda *given: taken)
    main(command("--keep", "2"))
    assert results(tmp_path / "composed") == results(composed)


def test_the_smallest_budget_within_the_interval_of_the_best_is_recommended():
    def cell(system, hits):
        return {"system": system, "task": "t", "nll": 1.0, "scores": {"accuracy": sum(hits)}, "per_example": hits}

    def results(one, two):
        scores = {"base": [0] * 100, "oracle": [1.0] * 100, "compose:1": one, "compose:2": two}
        kinds = {"base": "base", "oracle": "oracle"}
        of = {"parameters": 10, "latency": {"ratio": 1.0}, "nll": 1.0}
        return {
            "seed": 0,
            "tasks": {"t": {"headline": "accuracy"}},
            "systems": [{"name": name, "kind": kinds.get(name, "compose")} for name in scores],
            "cells": [cell(name, hits) for name, hits in scores.items()],
            "budgets": [{**of, "budget": 1, "score": sum(one)}, {**of, "budget": 2, "score": sum(two)}],
        }

    budget, said = recommendation(results([1.0] * 88 + [0] * 12, [0] * 11 + [1.0] * 89))
    assert budget == 1 and said.startswith("Keep 1 adapter: 88.0 %") and "-1.0 points" in said
    budget, said = recommendation(results([1.0] * 40 + [0] * 60, [1.0] * 90 + [0] * 10))
    assert budget == 2 and "fewer are worse" in said


# ---- bad input


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--budgets", "0", "2"], "from 1 to the mixture's 3"),
        (["--budgets", "4"], "from 1 to the mixture's 3"),
        (["--budgets", "1", "--keep", "2"], "add it to --budgets"),
        (["--method", "tie"], "ties"),
        (["--geometry_share", "2"], "from 0 to 1"),
        (["--rows", "0"], "--rows"),
        (["--scales", "1", "0"], "--scales are finite numbers other than 0, got 0.0"),
        (["--mixture", "nowhere"], "nowhere"),
        (["--method", "regmean"], "merge_statistics.safetensors"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(command, refusal, tmp_path, wrong, said):
    assert said in refusal(main, command(*wrong))
    assert not (tmp_path / "composed" / "compose.json").exists()


def test_a_mixture_without_a_router_is_refused(command, refusal, mixture, tmp_path):
    model = MoaModel.from_pretrained(None, mixture, router=False)
    model.save_pretrained(tmp_path / "saved")
    assert "has no router" in refusal(main, command("--mixture", str(tmp_path / "saved")))


def test_a_mixture_whose_tokens_choose_is_refused(command, mixture, refusal, tmp_path):
    model = MoaModel.from_pretrained(None, mixture)
    model.set_granularity("token")
    model.save_pretrained(tmp_path / "saved")
    assert "in this mixture each token chooses" in refusal(main, command("--mixture", str(tmp_path / "saved")))
