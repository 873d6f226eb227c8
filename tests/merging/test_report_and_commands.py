"""The report tells what happened; the registry, the commands and METHODS.md say the same things."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moa.merging import Merged, find_method, merge, merge_method, methods
from moa.merging.catalog import main as methods_command
from moa.merging.catalog import markdown
from moa.merging.cli import main as merge_command
from moa.merging.registry import _METHODS

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def own_method():
    """A method from outside the package, removed again afterwards."""

    @merge_method("first_only")
    def first_only(updates, weights, *, seed: int = 0, gain: float = 1.0) -> Merged:
        """The first adapter alone.

        Args:
            gain: how much
                of it.
        """
        return Merged(updates[0].scaled(gain), facts={"seed": float(seed)})

    yield first_only
    del _METHODS["first_only"]


def test_the_report_is_stored_beside_the_adapter_and_names_every_source(folders, tmp_path):
    result = merge(folders, weights=[1, 0.5, 0], rank=2, output=tmp_path / "out", name="mine")
    stored = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert stored == json.loads(json.dumps(result.report.to_dict()))
    assert [stored[key] for key in ("name", "method", "rank", "scale", "base_model")] == [
        "mine",
        "svd",
        2,
        1.0,
        "tiny/base",
    ]
    for source, folder, weight in zip(stored["sources"], folders, [1, 0.5, 0], strict=True):
        weights_file = (folder / "adapter_model.safetensors").read_bytes()
        assert source["sha256"] == hashlib.sha256(weights_file).hexdigest()
        assert source["weight"] == weight
        assert source["ranks"] == [3, 3]
    assert 0 < stored["energy_dropped"] < 1


def test_layers_that_an_adapter_lacks_are_listed(adapters):
    report = merge(adapters).report
    assert [source.missing for source in report.sources] == [[], [], [DOWN]]
    console = Console(width=100, record=True)
    console.print(report)
    assert "layers that an adapter lacks count as unchanged by it: c 1" in console.export_text()


def test_adapters_of_one_name_are_told_apart(adapters):
    report = merge([adapters[0], adapters[0], adapters[0]]).report
    assert list(report.weights) == ["a", "a#2", "a#3"]


def test_the_widest_input_dtype_is_stored(adapters):
    halves = [adapters[0].to(torch.bfloat16), adapters[1].to(torch.float16)]
    from dataclasses import replace

    halves = [replace(halves[0], dtype=torch.bfloat16), replace(halves[1], dtype=torch.float16)]
    assert merge(halves[:1]).report.dtype == "bfloat16"
    assert merge(halves).report.dtype == "float32"


def test_progress_wraps_the_layers(adapters):
    seen = []
    merge(adapters, progress=lambda layers, description: seen.extend(layers) or layers)
    assert seen == sorted(adapters[0].modules)


def test_a_method_of_ones_own_is_found_documented_and_given_a_seed_per_layer(own_method, adapters):
    method = find_method("first_only")
    assert method.function is own_method
    assert method.summary == "The first adapter alone."
    assert method.describe("gain") == "how much of it."
    assert list(method.options) == ["gain"]
    layers = merge(adapters, "first_only", gain=2, weights=[1, 1, 1]).report.layers
    assert len({layer.facts["seed"] for layer in layers.values()}) == len(layers)
    assert "first_only" in markdown()


def test_a_name_is_registered_once_and_laws_must_exist():
    with pytest.raises(ValueError, match="'svd' is registered already"):
        merge_method("svd")
    with pytest.raises(ValueError, match="breaks an unknown law 'order'"):
        merge_method("new", breaks={"order": "because"})
    with pytest.raises(ValueError, match="new needs a docstring"):
        merge_method("new")(lambda updates, weights: None)
    assert "new" not in methods()


def test_every_option_of_every_method_is_described():
    for method in methods().values():
        assert method.summary.endswith(".")
        for option in method.options:
            assert method.describe(option), f"{method.name} says nothing about {option}"


def test_the_merge_command_writes_what_the_function_returns(folders, tmp_path, capsys):
    options = ["--method", "ties", "--density", "0.5", "--weights", "1", "-0.5", "1", "--rank", "4"]
    merge_command([*map(str, folders), *options, "--output", str(tmp_path / "out")])
    assert "ties merge of 3 adapters" in capsys.readouterr().out
    merge(folders, "ties", density=0.5, weights=[1, -0.5, 1], rank=4, output=tmp_path / "same")
    for file in ("adapter_model.safetensors", "adapter_config.json", "merge_report.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()


def test_a_weight_may_be_written_with_a_negative_number_and_an_exponent(folders, tmp_path):
    merge_command([*map(str, folders), "--weights", "-1e-3", "1", "-.5", "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert [source["weight"] for source in report["sources"]] == [-0.001, 1.0, -0.5]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_a_dtype_may_be_given_by_name(name, folders):
    assert merge(folders, dtype=name).modules.keys() == merge(folders, dtype=getattr(torch, name)).modules.keys()
    assert {u.B.dtype for u in merge(folders, dtype=name).modules.values()} == {getattr(torch, name)}


def test_the_methods_command_lists_everything_as_json(capsys):
    methods_command(["--json"])
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert {"average", "concatenation", "factor_sum", "svd", "ties", "weighted_sum"} <= set(listed)
    assert listed["ties"]["options"]["density"]["default"] == 0.2
    assert listed["factor_sum"]["options"]["split"]["values"] == "sqrt, both, b"
    methods_command([])
    assert "weighted_sum" in capsys.readouterr().out


def test_methods_md_is_current():
    page = Path(__file__).parents[2] / "METHODS.md"
    assert page.read_text() == markdown(), "run: moa methods --markdown > METHODS.md"
