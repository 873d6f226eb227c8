"""Whatever is wrong with adapters or a merge, the answer is one sentence that says so, and nothing is written."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moa.adapters import Extras, read_adapter, write_adapter
from moa.errors import one_line
from moa.low_rank import LowRank
from moa.merging import RankRule, find_method, merge, merge_recipe, methods, read_recipe
from moa.merging.cli import main

DOWN = "model.layers.0.mlp.down_proj"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def refusal(adapters, **options):
    """The message of the error that a merge ends in."""
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        merge(adapters, **options)
    assert len(one_line(caught.value)) < 500
    return one_line(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, "there is no merge method 'tie': the methods are adamerging, .* did you mean 'ties'?"),
        ({"method": "svd", "density": 0.2}, "svd has no option 'density': it takes none; it is an option of .*ties"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"weights": "12"}, "weights must be a list of numbers, got the text '12'"),
        ({"method": "ties", "densty": 0.2}, "ties has no option 'densty': it takes .* did you mean 'density'"),
        ({"method": "ties", "election": "x"}, "election of ties must be one of total, frequency, got 'x'"),
        ({"method": "ties", "density": "a"}, "density of ties must be a number, got 'a'"),
        ({"rank": 0}, "rank must be from 1 to 9, all that these adapters hold together, got 0"),
        ({"rank": -1}, "rank must be from 1 to 9"),
        ({"rank": 10}, "rank must be from 1 to 9"),
        ({"rank": 2.5}, "rank must be a whole number, auto or full, got 2.5"),
        ({"method": "concatenation", "rank": 4}, "concatenation keeps every rank .* use svd"),
        ({"weights": [1, 1]}, "weights must be one for each adapter: got 2 for 3 adapters"),
        ({"weights": [0, 0, 0]}, "all weights are zero"),
        ({"weights": [1, 1, float("nan")]}, "weights must be finite numbers"),
        ({"method": "average", "weights": [1, 1, -2]}, "add up to zero"),
        ({"scale": 0.0}, "scale must be a finite number other than 0"),
        ({"dtype": torch.int8}, "dtype must be one of float32, bfloat16, float16, float64, got int8"),
        ({"dtype": "bfloat61"}, "got bfloat61; did you mean 'bfloat16'?"),
        ({"method": "regmean", "statistics": []}, "statistics must be one for each adapter: got 0 for 3 adapters"),
        ({"method": "regmean"}, "adapter 'a' has no statistics: run 'moa statistics --adapters"),
        (
            {"rank": RankRule(by="loss"), "statistics": [{}] * 4},
            "statistics must be one for each adapter: got 4 for 3",
        ),
        ({"method": "svd", "statistics": [{}] * 3}, "svd looks at no statistics: leave statistics out"),
        ({"method": "ties", "objective": object()}, "ties looks at no objective: leave objective out"),
        ({"method": "lorahub"}, "lorahub looks for weights by examples and was given none: pass objective="),
        ({"method": "concatenation", "rank": "auto"}, "concatenation keeps every rank .* use svd"),
        ({"rank": "most"}, "rank must be a whole number, auto or full, got 'most'"),
        ({"scale": 1e300}, "beyond the range of torch.float32"),
        ({"name": "a.b"}, "adapter name 'a.b' is not usable: use letters, digits, _ and - only"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, folders, tmp_path):
    assert re.search(message, refusal(folders, output=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


CHECKED = {m.name: inspect.signature(m.check).parameters for m in methods().values() if m.check}
LIMITED = [(m.name, option) for m in methods().values() for option in m.options if option in CHECKED.get(m.name, ())]


@pytest.mark.parametrize(("method", "option"), LIMITED)
def test_a_value_that_an_option_cannot_have_is_refused_before_an_adapter_is_read(method, option):
    kind = type(find_method(method).options[option].default)
    value = {float: float("nan"), int: -1, str: "no-such-method", type(None): -1.0}[kind]
    assert re.search(rf"\b{option}\b|no merge method", refusal(["nowhere"], method=method, **{option: value}))


def test_every_number_that_has_a_limit_is_checked_before_an_adapter_is_read():
    """What is not depends on the adapters (k, groups), or may be any number (start)."""
    numbers = {(m.name, o) for m in methods().values() for o, p in m.options.items() if p.annotation in (int, float)}
    late = {("consensus", "k"), ("hierarchical", "groups"), ("adamerging", "start")}
    assert numbers - set(LIMITED) == late


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--method", "ties", "--density", "3"],
            "density is the share of entries to keep and must be in (0, 1], got 3",
        ),
        (["--method", "ties", "--density", "3", "--state", "kept"], "density is the share of entries to keep"),
        (["--method", "hierarchical", "--node", "tise"], "there is no merge method 'tise'"),
        (["--method", "svd", "--density", "0.3"], "svd has no option 'density'"),
        (
            ["--method", "lorahub", "--budget", "0", "--model", "m", "--tasks", "sst2"],
            "budget must be more than 0, got 0",
        ),
        (
            ["--method", "lorahub", "--model", "m", "--tasks", "sst2", "--density", "1"],
            "lorahub has no option 'density'",
        ),
        (["--method", "lorahub", "--model", "m", "--tasks", "sst2", "--output", "file/out"], "file is a file, choose"),
    ],
)
def test_options_and_output_are_checked_before_adapters_and_models_are_read(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr("moa.model_objective.objective_for", lambda *_, **__: pytest.fail("the model was read"))
    monkeypatch.setattr("moa.merging.checks.read_adapter", lambda *_, **__: pytest.fail("an adapter was read"))
    with pytest.raises(SystemExit) as caught:
        main(["a", "b", "--output", "out", *words])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_cannot_be_created_is_refused_before_an_adapter_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "file is a file, choose another output folder" in refusal(["nowhere"], output=tmp_path / "file" / "out")
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(PermissionError, match=f"cannot be created: {tmp_path} is not writable"):
        merge(["nowhere"], output=tmp_path / "new" / "out")
    with pytest.raises(PermissionError):
        merge_recipe({"adapters": [{"adapters": ["nowhere"]}], "output": str(tmp_path / "out")})


@pytest.mark.parametrize(
    ("held", "names"),
    [
        ({"lora_bias": {DOWN: torch.ones(24)}}, "lora_bias"),
        (
            {"saved": {"lm_head.weight": torch.ones(2, 2)}, "base_bias": {"q.bias": torch.ones(2)}},
            "trained biases, mod",
        ),
    ],
)
def test_a_norm_is_not_restored_beside_what_is_more_than_updates(held, names, adapters, tmp_path):
    more = replace(adapters[0], extras=Extras(**held))
    message = refusal([more, adapters[1]], restore_norm=True, base="tiny/base", output=tmp_path / "out")
    assert f"restore_norm changes the updates alone, and these adapters hold {names}" in message
    assert message.endswith("too: use scale") and not (tmp_path / "out").exists()


def test_no_adapters_or_one_outside_a_list_is_refused(folders):
    assert "at least one adapter" in refusal([])
    assert "put it in a list" in refusal(folders[0])


def test_an_existing_output_folder_is_refused_and_left_alone(folders, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    assert "exists already: choose another output folder" in refusal(folders, output=output)
    assert list(output.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link exists already: choose another output folder" in refusal(folders, output=tmp_path / "link")


def test_a_failed_merge_leaves_nothing_behind(folders, tmp_path, edit_weights):
    def last_is_nan(tensors):
        name = sorted(tensors)[-1]
        return {**tensors, name: tensors[name] * float("nan")}

    edit_weights(folders[2], last_is_nan)
    before = sorted(tmp_path.iterdir())
    assert "hold NaN or infinite values" in refusal(folders, output=tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_adapters_of_different_base_models_are_refused_unless_told_otherwise(folders, edit_config):
    edit_config(folders[1], base_model_name_or_path="other/base")
    message = refusal(folders)
    assert "'tiny/base'" in message and "'other/base'" in message and "check_base=False" in message
    assert merge(folders, check_base=False).report.base_model is None


def test_adapters_of_two_folders_of_one_name_are_refused(folders, edit_config, tmp_path):
    for place in "xy":
        (tmp_path / place / "model").mkdir(parents=True)
        (tmp_path / place / "model" / "config.json").write_text(f'"{place}"')
    edit_config(folders[0], base_model_name_or_path=str(tmp_path / "x" / "model"))
    edit_config(folders[1], base_model_name_or_path=str(tmp_path / "y" / "model"))
    assert "merge adapters of one base model" in refusal(folders)


def test_a_repository_and_its_local_copy_are_one_base_and_the_result_names_the_repository(
    folders, edit_config, tmp_path
):
    (tmp_path / "base").mkdir()
    edit_config(folders[0], base_model_name_or_path=str(tmp_path / "base"))
    result = merge(folders, output=tmp_path / "out")
    assert result.report.base_model == "tiny/base"
    assert read_adapter(tmp_path / "out").base_model == "tiny/base"


def test_adapters_of_different_revisions_of_a_base_are_refused(folders, edit_config):
    edit_config(folders[0], revision="aaa")
    edit_config(folders[1], revision="bbb")
    assert "'aaa'" in refusal(folders)


def test_layers_of_different_sizes_are_refused_whatever_the_base_is_called(adapters, tmp_path):
    other = {m: LowRank(torch.randn(6, 2), torch.randn(2, 6)) for m in adapters[0].modules}
    write_adapter(tmp_path / "other", other, base_model="tiny/base", dtype=torch.float32)
    message = refusal([adapters[0], tmp_path / "other"], check_base=False)
    assert "[24, 40] for adapter 'a' and [6, 6] for 'other'" in message


def test_adding_factors_of_different_ranks_is_refused(adapters):
    message = refusal(adapters, method="factor_sum")
    assert "all adapters need the same rank, got ranks 2 and 3: use weighted_sum or svd" in message


def test_a_value_beyond_the_range_of_the_dtype_is_refused(adapters, tmp_path):
    message = refusal(adapters, scale=1e12, dtype=torch.float16, output=tmp_path / "out")
    assert "beyond the range of torch.float16: save in float32 or bfloat16" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--densty", "0.3"], "unknown option --densty; did you mean '--density'? (--help lists all)"),
        (["--method", "svdd"], "there is no merge method 'svdd'"),
        (["--rank", "x"], "argument --rank: must be a whole number, auto or full, got 'x'"),
        (["--weights", "1"], "weights must be one for each adapter: got 1 for 3 adapters"),
        (["--metod", "ties"], "unknown option --metod; did you mean '--method'?"),
        (["--meth", "ties"], "unknown option --meth; did you mean '--method'?"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--split", "half", "--method", "factor_sum"], "split of factor_sum must be one of sqrt, both, b"),
        (["--density", "0.3"], "svd has no option 'density'"),
        (["--statistics", "x", "y", "z"], "svd looks at no statistics"),
        (["--statistics", "x", "--method", "regmean"], "statistics must be one for each adapter: got 1 for 3"),
        (["--normalise", "perhaps", "--method", "ties"], "normalise of ties must be one of mean, sum, got 'perhaps'"),
        (["--normalise", "true", "--method", "ties"], "normalise of ties must be one of mean, sum, got 'true'"),
        (["--initial", "a"], "argument --initial: must be NAME=VALUE, got 'a'"),
        (["--initial", "d=e"], "initial names 'd', and 0 folders to merge are called so"),
        (["--rank-energy", "2"], "in (0, 1], got 2.0"),
    ],
)
def test_the_command_line_says_one_sentence_and_exits_with_2(arguments, message, folders, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*map(str, folders), "--output", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_a_misspelt_required_option_is_what_is_named(folders, capsys):
    with pytest.raises(SystemExit):
        main([*map(str, folders), "--ouput", "x"])
    assert "unknown option --ouput; did you mean '--output'?" in capsys.readouterr().err


def test_a_config_that_is_no_json_is_refused(folders):
    (folders[0] / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in refusal(folders)
    (folders[0] / "adapter_config.json").write_text(json.dumps([1]))
    assert "must hold a JSON object, got a list" in refusal(folders)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"target_modules": "("}, "target_modules in the config has '(', which is no regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules in the config has '*', which is no regular expression"),
        ({"target_modules": 5}, "target_modules in the config must be a pattern or a list of names, got 5"),
        ({"exclude_modules": [3]}, "exclude_modules in the config must be a pattern or a list of names, got [3]"),
        ({"rank_pattern": [1]}, "rank_pattern in the config must map patterns to numbers, got [1]"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern in the config has '(', which is no regular expression"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern: q_proj in the config must be a number, got 'x'"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: q_proj in the config must be a number, got None"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path in the config must be text, got 3"),
        ({"use_rslora": "yes"}, "use_rslora in the config must be true or false, got 'yes'"),
    ],
)
def test_a_config_that_peft_could_not_have_written_is_refused(folders, edit_config, entry, said):
    assert said in refusal([folders[0], edit_config(folders[1], **entry)], rank=2)


@pytest.mark.parametrize(
    ("method", "option"), [("wudi", "ridge"), ("wudi", "cap"), ("consensus", "threshold"), ("regmean", "ridge")]
)
def test_options_are_finite(folders, method, option):
    said = refusal(folders, method=method, **{option: float("inf")})
    assert f"{option} of {method} must be a finite number, got inf" in said


def test_a_chance_that_cannot_be_drawn_is_refused(folders):
    for method in ({"method": "dare_linear"}, {"method": "dare_rank"}, {"method": "knots", "rule": "dare"}):
        assert "must be at least 2^-16" in refusal(folders, density=1e-6, **method)


def test_a_recipe_that_is_part_of_itself_is_refused(tmp_path):
    (tmp_path / "loop.yaml").write_text("adapters: &all [a, *all]")
    with pytest.raises(ValueError, match="holds an alias"):
        read_recipe(tmp_path / "loop.yaml")


def test_a_rule_for_ranks_takes_numbers():
    with pytest.raises(ValueError, match="energy must be a number, got 'x'"):
        RankRule(energy="x")


def test_a_warning_is_one_line_on_a_command_line(folders, edit_config, tmp_path):
    edit_config(folders[1], target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lost"])
    words = [sys.executable, "-m", "moa.cli", "merge", *map(str, folders[:2]), "--output", str(tmp_path / "out")]
    words[1:3] = ["-c", "import sys; from moa.cli import main; main(sys.argv[1:])"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "lost" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "UserWarning" not in done.stderr


def test_a_seed_may_be_a_whole_number_of_numpy(folders, tmp_path):
    ours = merge(folders, "dare_linear", seed=3, output=tmp_path / "ours")
    theirs = merge(folders, "dare_linear", seed=np.int64(3), output=tmp_path / "theirs")
    assert ours.report.to_json() == theirs.report.to_json()


def test_numbers_too_large_to_be_merged_are_refused_in_one_sentence(folders, tmp_path):
    assert "weights must lie between -1e+15 and 1e+15" in refusal(folders, weights=[1e200] * len(folders))
    huge = read_adapter(folders[0])
    modules = {name: LowRank(update.B * 1e30, update.A * 1e30) for name, update in huge.modules.items()}
    write_adapter(tmp_path / "huge", modules, base_model=huge.base_model, dtype=torch.float32)
    for method, rank in [("ties", None), ("knots", None), ("consensus", None), ("della", None), ("ties", "full")]:
        said = refusal([tmp_path / "huge", folders[1]], method=method, rank=rank)
        assert "so large that products of them leave the range of numbers, give smaller ones" in said
