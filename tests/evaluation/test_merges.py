"""Merges to compare: read from their text, given what they need, made when their turn comes and not twice."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from moa.adapters import read_adapter
from moa.evaluation import merges as under_test
from moa.evaluation.full_evaluation import main
from moa.evaluation.kept import Kept
from moa.evaluation.merges import AskedMerge, merge_systems, needs_of
from moa.merging import merge
from moa.merging.statistics import STATISTICS_FILE, Statistics, write_statistics
from moa.model import MoaModel
from moa.tasks import Example


def example(prompt, answer, task="cats"):
    return Example(task, prompt, answer, (answer.strip(),), (), None)


FEW = {
    "cats": [example("the red cat sat .", " good"), example("one dog ran answer :", " no good film")],
    "dogs": [example("review : the film good ? answer :", " yes positive")],
}
SEARCH = "lorahub_linear:budget=3"


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def mixture(base_folder, adapters, tmp_path):
    MoaModel.from_adapters(str(base_folder), adapters).save_pretrained(tmp_path / "moa")
    return tmp_path / "moa"


@pytest.fixture
def model(mixture):
    return MoaModel.from_pretrained(None, mixture)


@pytest.fixture
def store_statistics(mixture):
    """Random statistics beside each expert, as `moa statistics` stores them."""

    def store(seed):
        generator = torch.Generator().manual_seed(seed)
        for expert in ("cats", "dogs", "films"):
            shapes = read_adapter(mixture / expert).shapes
            grams, layers = {}, {}
            for module, shape in shapes.items():
                x = torch.randn(2 * shape.n, shape.n, generator=generator)
                grams[f"gram.{module}"] = x.T @ x / len(x)
                layers[module] = {"gram": f"gram.{module}", "tokens": 5, "fisher": False}
            found = Statistics(grams.__getitem__, layers)
            write_statistics(mixture / expert / STATISTICS_FILE, found, {"text_sha256": str(seed)})

    return store


@pytest.fixture
def systems(model, tokenizer, mixture, tmp_path):
    """The systems of merges, as the evaluation makes them."""

    def make(*specs, few_shot=FEW, scales=(1.0,)):
        asked = [AskedMerge.read(spec) for spec in specs]
        needs = needs_of(asked, model, tokenizer, mixture, few_shot)
        kept = Kept(tmp_path / "cells", model)
        return merge_systems(model, tokenizer, asked, scales, list(FEW.values()), kept, needs)

    return make


@pytest.fixture
def merged(model, monkeypatch):
    """The methods that were merged by, in order."""
    seen, merge_adapters = [], model.merge_adapters
    monkeypatch.setattr(
        model, "merge_adapters", lambda method, **o: seen.append(method) or merge_adapters(method, **o)
    )
    return seen


def use(system):
    with system.activate(torch.tensor([[1]]), torch.tensor([[1]])):
        pass


# read


def test_a_merge_is_read_from_its_text():
    asked = AskedMerge.read("ties:density=0.4,scope=model,rank=16")
    assert (asked.spec, asked.method.name) == ("ties:density=0.4,scope=model,rank=16", "ties")
    assert asked.options == {"density": 0.4, "scope": "model"} and asked.rank == 16


@pytest.mark.parametrize(
    ("spec", "options", "rank"),
    [
        ("svd:rank=auto", {}, "auto"),
        ("svd:rank=full", {}, "full"),
        ("cat", {}, None),
        ("lora_soups:convex=true,steps=5,lr=1e-3", {"convex": True, "steps": 5, "lr": 0.001}, None),
        ("wudi:cap=none", {"cap": None}, None),
        ("ties:", {}, None),
    ],
)
def test_values_are_read_as_what_the_method_takes(spec, options, rank):
    asked = AskedMerge.read(spec)
    assert (asked.options, asked.rank) == (options, rank)
    assert all(type(asked.options[name]) is type(value) for name, value in options.items())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tie", "there is no merge method 'tie'"),
        ("ties:densty=0.4", "ties has no option 'densty': it takes .* did you mean 'density'"),
        ("ties:density=half", "density of ties must be a number, got 'half'"),
        ("ties:scope=layer", "scope of ties must be one of module, model, got 'layer'"),
        ("lora_soups:convex=perhaps", "convex of lora_soups must be of type bool, got 'perhaps'"),
        ("lora_soups:steps=1.5", "steps of lora_soups must be of type int, got '1.5'"),
        ("ties:density", "options are written ties:option=value, got 'density'"),
        ("ties:density=0.1,density=0.2", "gives density twice: keep one"),
        ("svd:rank=0", "rank must be a whole number from 1, auto or full, got '0'"),
        ("svd:rank=-3", "rank must be a whole number from 1, auto or full, got '-3'"),
        ("svd:rank=many", "rank must be a whole number from 1, auto or full, got 'many'"),
        ("svd:rank=", "rank must be a whole number from 1, auto or full, got ''"),
        ("cat:rank=4", "concatenation keeps every rank it is given and takes no rank"),
    ],
)
def test_a_text_that_makes_no_sense_is_refused_before_any_model_is_loaded(spec, said, refusal):
    with pytest.raises(ValueError, match=said):
        AskedMerge.read(spec)
    assert spec.partition(":")[0] in refusal(main, ["--mixture", "nowhere", "--methods", spec])


# needs


def test_needs_are_met_only_where_a_method_asks(model, tokenizer, tmp_path):
    plain = [AskedMerge.read(spec) for spec in ("svd", "ties")]
    assert needs_of(plain, model, tokenizer, tmp_path / "nowhere", {}) == {}


def test_statistics_are_those_beside_each_expert(model, tokenizer, mixture, store_statistics):
    store_statistics(1)
    needs = needs_of([AskedMerge.read("regmean")], model, tokenizer, mixture, FEW)
    assert list(needs) == ["statistics"]
    assert [set(found) for found in needs["statistics"]] == [
        set(read_adapter(mixture / expert).shapes) for expert in model.experts
    ]


def test_an_objective_has_the_examples_by_the_experts_they_are_for(model, tokenizer, mixture):
    needs = needs_of([AskedMerge.read(SEARCH)], model, tokenizer, mixture, FEW)
    assert list(needs) == ["objective"]
    assert needs["objective"].names == ("cats", "dogs", "films") and needs["objective"].tasks == ("cats", "dogs")


def test_statistics_that_are_missing_are_named_before_anything_is_scored(model, tokenizer, mixture):
    with pytest.raises(FileNotFoundError, match="there are no statistics at .*cats.*'moa statistics'"):
        needs_of([AskedMerge.read("svd"), AskedMerge.read("regmean")], model, tokenizer, mixture, FEW)


def test_distillation_on_a_task_of_no_expert_is_refused_before_anything_is_scored(model, tokenizer, mixture):
    few = {**FEW, "birds": FEW["cats"]}
    with pytest.raises(ValueError, match="'birds' is the task of none of cats, dogs, films: leave it out of --tasks"):
        needs_of([AskedMerge.read("distillation")], model, tokenizer, mixture, few)
    assert needs_of([AskedMerge.read(SEARCH)], model, tokenizer, mixture, few)["objective"].tasks[-1] == "birds"


# made


def test_a_merge_is_made_when_its_turn_comes_and_dropped_at_the_next(model, systems, merged):
    coming = systems("svd:rank=3", "ties:density=0.5")
    assert merged == []
    first = next(coming)
    assert merged == ["svd"] and "merge_0" in model.peft_config
    use(first)
    assert merged == ["svd"]
    next(coming)
    assert merged == ["svd", "ties"] and "merge_0" not in model.peft_config
    assert next(coming, None) is None and "merge_1" not in model.peft_config


def test_what_was_chosen_is_kept_and_the_merge_is_made_again_only_to_be_used(systems, merged, monkeypatch):
    first = [(s.note, s.cost, s.fingerprint) for s in systems("svd", SEARCH, scales=(1.0, 2.0))]
    merged.clear()
    monkeypatch.setattr(under_test, "choose_scale", lambda *a: pytest.fail("chosen again"))
    second = list(systems("svd", SEARCH, scales=(1.0, 2.0)))
    assert merged == [] and [(s.note, s.cost, s.fingerprint) for s in second] == first
    use(second[1])
    assert merged == ["lorahub_linear"]


@pytest.mark.parametrize("spec", ["svd:rank=3", "ties:density=0.5,scope=model", "regmean"])
def test_what_is_loaded_is_what_merge_gives(spec, model, systems, mixture, adapters, store_statistics):
    store_statistics(1)
    next(systems(spec))
    asked = AskedMerge.read(spec)
    folders = [mixture / name for name in adapters]
    expected = merge(folders, asked.method.name, rank=asked.rank, **asked.options).modules
    for module, update in expected.items():
        layer = model.get_base_model().get_submodule(module)
        got = layer.get_delta_weight("merge_0").double()
        want = update.to(torch.float64).delta()
        assert (got - want).norm() < 1e-4 * want.norm()


def test_other_statistics_or_examples_make_another_system(systems, store_statistics, merged):
    store_statistics(1)
    first = [s.fingerprint for s in systems("svd", "regmean", SEARCH)]
    assert [s.fingerprint for s in systems("svd", "regmean", SEARCH)] == first
    merged.clear()
    store_statistics(2)
    second = [s.fingerprint for s in systems("svd", "regmean", SEARCH)]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True] and merged == ["regmean"]
    third = [s.fingerprint for s in systems("svd", "regmean", SEARCH, few_shot={"cats": FEW["cats"]})]
    assert [a == b for a, b in zip(second, third, strict=True)] == [True, True, False]


def test_a_resumed_evaluation_neither_merges_nor_scores_again(base_folder, adapters, tmp_path, monkeypatch):
    names = dict(zip(("sst2", "squad", "wmt14"), adapters.values(), strict=True))
    MoaModel.from_adapters(str(base_folder), names).save_pretrained(tmp_path / "experts")
    words = [
        *("--mixture", str(tmp_path / "experts"), "--source", "pocket", "--tasks", "sst2", "squad", "--rows", "3"),
        *("--validation_rows", "2", "--scales", "1", "--output_dir", str(tmp_path / "evaluation")),
        *("--methods", "cat", "distillation:steps=2", "lorahub_linear:budget=3"),
    ]
    results = tmp_path / "evaluation" / "results.json"
    main(words)
    first = json.loads(results.read_text())
    monkeypatch.setattr(MoaModel, "merge_adapters", lambda *a, **k: pytest.fail("merged again"))
    monkeypatch.setattr("moa.evaluation.runner.answer_examples", lambda *a, **k: pytest.fail("scored again"))
    main(words)
    second = json.loads(results.read_text())
    first.pop("created"), second.pop("created")
    assert first == second
    assert {"merge:cat", "merge:distillation:steps=2"} <= {system["name"] for system in first["systems"]}
