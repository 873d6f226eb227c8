"""A recipe gives what its merges give when they are done by hand; what it gets wrong is one sentence."""

import copy
import json
import re
import shutil
import warnings

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from moa.adapters import read_adapter
from moa.merging import RankRule, merge, merge_recipe, read_recipe
from moa.merging.cli import main
from moa.merging.statistics import STATISTICS_FILE, Statistics, write_statistics

FILES = ("adapter_model.safetensors", "adapter_config.json", "merge_report.json")
Q = "model.layers.0.self_attn.q_proj"


def by_svd(matrix, rank):
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def dense(path):
    return {m: u.B @ u.A for m, u in read_adapter(path, dtype=torch.float64).modules.items()}


def assert_same_folder(got, expected):
    for file in FILES:
        assert (got / file).read_bytes() == (expected / file).read_bytes(), file


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe beside the adapters."""

    def write(content, name="recipe.yaml"):
        (tmp_path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return tmp_path / name

    return write


# what it means


def test_a_merge_of_a_merge_is_that_of_dense_matrices_with_nothing_rounded_between(folders, tmp_path):
    inner = {"method": "svd", "rank": 2, "scale": 1.5, "weight": 0.7, "adapters": ["b", {"path": "c", "weight": -2}]}
    result = merge_recipe(
        {"rank": 4, "dtype": "float64", "adapters": [{"path": "a", "weight": 0.3}, inner]}, beside=tmp_path
    )
    a, b, c = map(dense, folders)
    for module, update in result.modules.items():
        within = 1.5 * by_svd(0.5 * b[module] - 2 * c[module], 2)  # b has no weight beside it: 1/N
        torch.testing.assert_close(update.delta(), by_svd(0.3 * a[module] + 0.7 * within, 4), rtol=1e-9, atol=1e-9)


def test_a_merge_of_a_merge_is_two_calls_by_hand(folders, tmp_path):
    inner = merge(folders[1:], "ties", density=0.5, weights=[1, 2], dtype="float64")
    by_hand = merge([folders[0], inner.adapter("pair")], "svd", rank=4, dtype="float32")
    members = [{"path": "b", "weight": 1}, {"path": "c", "weight": 2}]
    nested = {"name": "pair", "method": "ties", "density": 0.5, "adapters": members}
    result = merge_recipe({"rank": 4, "adapters": ["a", nested]}, beside=tmp_path)
    for module, update in result.modules.items():
        assert torch.equal(update.B, by_hand.modules[module].B) and torch.equal(update.A, by_hand.modules[module].A)
    assert result.report.dtype == "float32"  # as its files, though the inner merge is kept in float64
    assert result.report.weights == {"a": 0.5, "pair": 0.5}
    assert result.report.sources[1].merge["options"]["density"] == 0.5


def test_an_inner_merge_can_be_rounded_on_purpose(folders, tmp_path):
    inner = merge(folders[1:], dtype="bfloat16").adapter("pair")
    nested = {"name": "pair", "dtype": "bfloat16", "adapters": ["b", "c"]}
    result = merge_recipe({"dtype": "float64", "adapters": ["a", nested]}, beside=tmp_path)
    expected = merge([folders[0], inner], dtype="float64")
    assert torch.equal(result.modules[Q].delta(), expected.modules[Q].delta())


@pytest.mark.parametrize("where", ["list", "beside"])
def test_weights_stand_in_a_list_or_beside_the_adapters(where, folders, tmp_path):
    weights = [1.0, 1 / 3, -0.5]
    beside = [{"path": "a", "weight": 1}, "b", {"path": "c", "weight": -0.5}]
    asked = {"weights": weights, "adapters": ["a", "b", "c"]} if where == "list" else {"adapters": beside}
    assert list(merge_recipe(asked, beside=tmp_path).report.weights.values()) == weights


def test_a_rank_may_be_a_rule(folders, tmp_path, recipe):
    file = recipe({"rank": {"by": "erank", "max_rank": 4, "uniform": True}, "adapters": ["a", "b", "c"]})
    result = merge_recipe(read_recipe(file), beside=tmp_path)
    expected = merge(folders, rank=RankRule(by="erank", max_rank=4, uniform=True))
    assert result.report.layers == expected.report.layers and result.report.rank == expected.report.rank


def test_paths_are_beside_the_recipe_first_then_from_the_current_folder(folders, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    merge([folders[2]], weights=[3], output=here / "a")  # another "a", in the current folder
    merge([folders[1]], weights=[5], output=here / "only_here")
    monkeypatch.chdir(here)
    sources = merge_recipe({"adapters": ["a", "only_here"]}, beside=tmp_path).report.sources
    assert [source.path for source in sources] == [str(tmp_path / "a"), "only_here"]
    sources = merge_recipe({"adapters": ["a", "only_here"]}).report.sources
    assert [source.path for source in sources] == ["a", "only_here"]


def test_folders_may_be_paths(folders):
    assert merge_recipe({"adapters": folders}).report.weights == merge(folders).report.weights


def test_statistics_are_looked_for_beside_the_recipe(folders, tmp_path, recipe):
    files = [f"{name}.stats" for name in "abc"]
    for file, folder in zip(files, folders, strict=True):
        store_statistics(tmp_path / file, folder)
    result = merge_recipe(
        read_recipe(recipe({"method": "regmean", "statistics": files, "adapters": list("abc")})), beside=tmp_path
    )
    assert [source.statistics["adapter_sha256"] for source in result.report.sources] == [
        read_adapter(folder).sha256 for folder in folders
    ]


def store_statistics(file, folder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapter = read_adapter(folder)
    grams = {}
    for module, shape in adapter.shapes.items():
        x = torch.randn(3 * shape.n, shape.n, generator=generator)
        grams[f"gram.{module}"] = x.T @ x / len(x)
    layers = {module: {"gram": f"gram.{module}", "tokens": 9, "fisher": False} for module in adapter.shapes}
    about = {"adapter_sha256": adapter.sha256}
    return write_statistics(file, Statistics(grams.__getitem__, layers), about)


# on the command line


def test_settings_on_the_command_line_take_the_place_of_the_recipes(folders, tmp_path, recipe):
    members = [{"path": "a", "weight": 5}, {"path": "b", "weight": 6}, {"path": "c", "weight": 7}]
    settings = {"method": "ties", "density": 0.9, "rank": 3, "scale": 4, "seed": 7, "output": str(tmp_path / "never")}
    file = recipe({**settings, "adapters": members})
    words = ["--density", "0.5", "--rank", "2", "--scale", "0.5", "--seed", "0", "--weights", "1", "2", "3"]
    main(["--config", str(file), *words, "--dtype", "float64", "--output", str(tmp_path / "out")])
    merge(
        folders,
        "ties",
        density=0.5,
        rank=2,
        scale=0.5,
        seed=0,
        weights=[1, 2, 3],
        dtype="float64",
        output=tmp_path / "same",
    )
    assert_same_folder(tmp_path / "out", tmp_path / "same")
    assert not (tmp_path / "never").exists()


def test_another_method_on_the_command_line_keeps_the_rest_of_the_recipe(folders, tmp_path, recipe):
    file = recipe({"method": "svd", "rank": 3, "adapters": ["a", "b"]})
    main(["--config", str(file), "--method", "ties", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / FILES[2]).read_text())["method"] == "ties"
    assert read_adapter(tmp_path / "out").shapes[Q].r == 3


# a merge, once more


def again(folder, tmp_path):
    main(["--config", str(folder), "--output", str(tmp_path / "again")])
    assert_same_folder(tmp_path / "again", folder)


def test_a_nested_merge_is_made_again_from_its_folder_byte_for_byte(folders, tmp_path, recipe):
    pair = {"name": "pair", "method": "dare_ties", "density": 0.6, "seed": 3, "weight": 2, "adapters": ["b", "c"]}
    outer = {"method": "ties", "density": 0.4, "rank": {"by": "energy", "energy": 0.8}, "restore_norm": True}
    file = recipe({**outer, "scale": 0.5, "seed": 5, "dtype": "bfloat16", "name": "both", "adapters": ["a", pair]})
    main(["--config", str(file), "--output", str(tmp_path / "out")])
    again(tmp_path / "out", tmp_path)


def test_a_merge_by_statistics_is_made_again_from_its_folder_byte_for_byte(folders, tmp_path):
    for seed, folder in enumerate(folders):
        store_statistics(folder / STATISTICS_FILE, folder, seed)
    merge(folders, "regmean", weights=[1, 0, 2], output=tmp_path / "out")
    again(tmp_path / "out", tmp_path)


def test_a_merge_of_dora_adapters_is_made_again_from_its_folder_byte_for_byte(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    folders = []
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    merge(folders, rank=3, base=str(tmp_path / "base"), output=tmp_path / "out")
    again(tmp_path / "out", tmp_path)


def test_a_merge_across_base_models_stays_one(folders, edit_config, tmp_path):
    edit_config(folders[1], base_model_name_or_path="other/base")
    merge(folders, check_base=False, output=tmp_path / "out")
    again(tmp_path / "out", tmp_path)


def test_an_adapter_that_has_changed_since_is_refused(folders, edit_weights, tmp_path, refusal):
    merge(folders, output=tmp_path / "out")
    edit_weights(folders[1], lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    said = refusal(main, ["--config", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert f"{folders[1]} is not the adapter that the recipe was written for" in said and "leave sha256 out" in said
    assert not (tmp_path / "again").exists()


def test_a_merge_of_a_live_models_adapters_cannot_be_made_again(adapters, tmp_path, refusal):
    merge(adapters, output=tmp_path / "out")
    said = refusal(main, ["--config", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert "adapter 'a' was part of a live model and has no file to merge again" in said


# bad input


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"rank": 2}, "names its adapters in a list `adapters:`"),
        ({"adapters": "a"}, "names its adapters in a list `adapters:`"),
        ({"adapters": []}, "names its adapters in a list `adapters:`"),
        ({"adapters": ["a", 3]}, "a path, or has either `path` or `adapters`, got 3"),
        ({"adapters": [{"name": "a"}]}, "a path, or has either `path` or `adapters`"),
        ({"adapters": [{"path": "a", "adapters": ["b"]}]}, "a path, or has either `path` or `adapters`"),
        ({"adapters": [{"path": "a", "wieght": 1}]}, "got 'wieght'; did you mean 'weight'?"),
        ({"adapters": [{"path": "a", 1: 1}]}, "got 1"),
        ({"adapters": [{"path": 3}]}, "path of a recipe takes a folder or a Hub repository, got 3"),
        ({"adapters": [{"path": "a", "name": 3}]}, "name of a recipe takes text, got 3"),
        ({"adapters": [{"path": "a", "weight": "much"}]}, "weight of a recipe takes a number, got 'much'"),
        ({"adapters": [{"path": "a", "sha256": "00"}]}, "the recipe says 00"),
        ({"adapters": [{"path": "a", "weight": 1}, "b"], "weights": [1, 2]}, "either in one list or with each"),
        ({"adapters": ["a"], "scal": 2}, "a recipe has no key 'scal'; did you mean 'scale'?"),
        ({"adapters": ["a"], "metod": "ties"}, "a recipe has no key 'metod'; did you mean 'method'?"),
        ({"adapters": ["a"], "method": "tis"}, "there is no merge method 'tis'"),
        ({"adapters": ["a"], "method": "ties", "densty": 0.2}, "did you mean 'density'?"),
        ({"adapters": ["a"], "method": "ties", "density": "half"}, "density of ties must be a number, got 'half'"),
        ({"adapters": ["a"], "scale": "big"}, "scale of a recipe takes a number, got 'big'"),
        ({"adapters": ["a"], "scale": True}, "scale of a recipe takes a number, got True"),
        ({"adapters": ["a"], "seed": 0.5}, "seed of a recipe takes a whole number, got 0.5"),
        ({"adapters": ["a"], "restore_norm": "maybe"}, "restore_norm of a recipe takes true or false, got 'maybe'"),
        ({"adapters": ["a"], "weights": 1}, "weights of a recipe takes a list of numbers, got 1"),
        ({"adapters": ["a"], "weights": ["x"]}, "weights of a recipe takes a list of numbers, got ['x']"),
        ({"adapters": ["a"], "initial": "a"}, "initial of a recipe takes a mapping of adapters to folders, got 'a'"),
        ({"adapters": ["a"], "statistics": "x"}, "statistics of a recipe takes a list of files, got 'x'"),
        ({"adapters": ["a"], "statistics": ["x"]}, "svd looks at no statistics"),
        ({"adapters": ["a"], "dtype": 5}, "dtype must be one of"),
        ({"adapters": ["a"], "rank": 2.5}, "rank of a recipe takes a whole number, auto, full, or a rule's"),
        ({"adapters": ["a"], "rank": {"enrgy": 0.5}}, "got 'enrgy'; did you mean 'energy'?"),
        ({"adapters": ["a"], "rank": {"energy": "all"}}, "energy must be a number, got 'all'"),
        ({"adapters": ["nowhere/at/all"]}, "nowhere"),
        ("", "is empty"),
        ("- a\n- b\n", "must hold `name: value` lines, got a list"),
        ("adapters: [a\nrank: 2", "is not valid YAML"),
        ("rank: 2\nadapters: [a]\nrank: 3\n", "line 3: 'rank' is already on line 1"),
        ("adapters:\n- {path: a, path: b}\n", "'path' is already on line 2"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_sentence_and_status_two(
    content, said, folders, recipe, refusal, tmp_path
):
    assert said in refusal(main, ["--config", str(recipe(content)), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("outer", "said"),
    [
        ({"scale": 0}, "scale must be a finite number other than 0"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"method": "tis"}, "there is no merge method 'tis'"),
        ({"method": "ties", "density": 2}, "density"),
        ({"method": "concatenation", "rank": 3}, "takes no rank"),
        ({"method": "lorahub"}, "looks for weights by examples and was given none"),
        ({"statistics": ["x"]}, "svd looks at no statistics"),
        ({"weights": [1]}, "weights must be one for each adapter: got 1 for 3"),
        ({"weights": [0, 0, 0]}, "all weights are zero"),
        ({"output": "INNER"}, "two merges of this recipe write to"),
        ({"output": "INNER/outer"}, "two merges of this recipe write to"),
        ({"last": "nowhere/at/all"}, "nowhere"),
        ({"last": {"path": "b", "sha256": "00"}}, "the recipe says 00"),
        ({"last": {"adapters": ["b"], "method": "ties", "density": 2}}, "density"),
        ({"rank": 777}, "the size of the layers, got 777"),
        ({"rank": 0}, "the size of the layers, got 0"),
        ({"last": {"adapters": ["b"], "rank": 17}}, "all that these adapters hold together, got 17"),
        ({"last": {"adapters": ["b", "other_base"]}}, "merge adapters of one base model"),
        ({"last": {"adapters": ["other_base"]}}, "merge adapters of one base model"),
        ({"last": "other_layers", "check_base": False}, "they belong to different base models"),
        ({"last": "with_a_head", "check_base": False}, "whose merge depends on the base model's weights"),
    ],
)
def test_what_is_wrong_outside_is_refused_before_an_inner_merge_is_written(
    outer, said, folders, equal_rank_adapters, edit_config, edit_weights, recipe, refusal, tmp_path
):
    for name in ("other_base", "other_layers", "with_a_head"):
        shutil.copytree(folders[2], tmp_path / name)
    edit_config(tmp_path / "other_base", base_model_name_or_path="someone/else")
    edit_weights(
        tmp_path / "other_layers", lambda t: {k: v.repeat(2, 1) if "lora_B" in k else v for k, v in t.items()}
    )
    edit_config(tmp_path / "with_a_head", modules_to_save=["lm_head"])
    edit_weights(tmp_path / "with_a_head", lambda t: t | {"base_model.model.lm_head.weight": torch.ones(3, 24)})
    before = sorted(tmp_path.rglob("*"))
    inner = {"output": str(tmp_path / "inner"), "adapters": ["a", "b"]}
    asked = {key: value for key, value in outer.items() if key != "last"}
    if "output" in asked:
        asked["output"] = asked["output"].replace("INNER", inner["output"])
    content = {"output": str(tmp_path / "out"), **asked, "adapters": ["a", inner, outer.get("last", "c")]}
    file = recipe(content)
    assert said in refusal(main, ["--config", str(file)])
    assert sorted(path for path in tmp_path.rglob("*") if path != file) == before


def test_settings_without_a_value_are_the_defaults(folders, tmp_path):
    empty = dict.fromkeys(
        ("method", "rank", "scale", "seed", "weights", "dtype", "check_base", "restore_norm", "name")
    )
    result = merge_recipe({**empty, "adapters": ["a", "b"]}, beside=tmp_path)
    assert result.report == merge(folders[:2]).report


def test_a_recipe_that_is_not_there_is_named_with_the_nearest(recipe, tmp_path, refusal):
    recipe({"adapters": ["a"]})
    said = refusal(main, ["--config", str(tmp_path / "recipes.yaml"), "--output", str(tmp_path / "out")])
    assert "there is no such file" in said and "recipe.yaml" in said


@pytest.mark.parametrize("content", [None, "{", "[]", '{"method": "svd"}'])
def test_a_folder_without_a_whole_report_is_refused(content, folders, tmp_path, refusal):
    merge(folders, output=tmp_path / "merged")
    report = tmp_path / "merged" / FILES[2]
    report.unlink() if content is None else report.write_text(content)
    said = refusal(main, ["--config", str(tmp_path / "merged"), "--output", str(tmp_path / "out")])
    assert ("has no merge_report.json" if content is None else "is damaged or of another version") in said


def test_the_recipe_that_was_given_is_not_changed(folders, tmp_path):
    asked = {"rank": 2, "adapters": [{"path": "a", "weight": 1}, {"name": "p", "adapters": ["b", "c"]}]}
    before = copy.deepcopy(asked)
    merge_recipe(asked, beside=tmp_path)
    assert asked == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "takes adapters, or a recipe by --config: give one of the two"),
        (["{a}", "--config", "{recipe}"], "takes adapters, or a recipe by --config: give one of the two"),
        (["--config", "{recipe}", "--rank", "4", "--rank-energy", "0.5"], "--rank-energy tells --rank auto how"),
        (["--config", "{recipe}", "--model", "m"], "--model is for methods that look for their weights"),
        (["--config", "{recipe}", "--method", "lorahub", "--model", "m"], "give --tasks too"),
        (
            ["--config", "{recipe}", "--method", "lorahub", "--model", "m", "--tasks", "sst2"],
            "lorahub takes adapters by their folders, and this recipe has others",
        ),
        (["{a}", "--method", "lorahub"], "lorahub looks for weights by examples and was given none"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words, said, folders, recipe, refusal, tmp_path):
    places = {"{a}": str(folders[0]), "{recipe}": str(recipe({"adapters": [{"path": "a"}]}))}
    words = [places.get(word, word) for word in words]
    assert said in refusal(main, [*words, "--output", str(tmp_path / "out")])


def test_a_merge_without_a_place_to_go_is_refused(folders, refusal):
    assert "name it by --output" in refusal(main, [str(folders[0])])


def test_names_in_a_recipe_are_those_of_the_report(folders, tmp_path):
    members = [{"path": "a", "name": "first"}, "b", {"method": "weighted_sum", "adapters": ["c"]}]
    report = merge_recipe({"name": "mine", "adapters": members}, beside=tmp_path).report
    assert list(report.weights) == ["first", "b", "weighted_sum"] and report.name == "mine"
    assert re.fullmatch("[0-9a-f]{64}", report.sources[0].sha256)


def test_a_merge_of_a_written_merge_is_repeated_from_its_own_folder(folders, recipe, tmp_path):
    inner = {"adapters": ["b", "c"], "output": str(tmp_path / "inner")}
    main(
        [
            "--config",
            str(recipe({"method": "weighted_sum", "adapters": ["a", inner]})),
            "--output",
            str(tmp_path / "o"),
        ]
    )
    main(["--config", str(tmp_path / "o"), "--output", str(tmp_path / "again")])
    for file in FILES[:2]:
        assert (tmp_path / "o" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
