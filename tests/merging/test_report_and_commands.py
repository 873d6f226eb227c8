"""The report tells what happened; the registry, the commands and METHODS.md say the same things."""

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from moa.adapters import read_adapter
from moa.merging import Merged, RankRule, find_method, merge, merge_method, methods
from moa.merging.catalog import main as methods_command
from moa.merging.catalog import markdown
from moa.merging.cli import main as merge_command
from moa.merging.inspection import main as inspect_command
from moa.merging.registry import _METHODS, optional
from moa.merging.statistics import LayerStatistics

DOWN = "model.layers.0.mlp.down_proj"
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


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
    assert "layers that an adapter lacks: c 1" in console.export_text()


def test_adapters_of_one_name_are_told_apart(adapters):
    report = merge([adapters[0], adapters[0], adapters[0]]).report
    assert list(report.weights) == ["a", "a#2", "a#3"]


def test_the_widest_input_dtype_is_stored(adapters):
    halves = [adapters[0].to(torch.bfloat16), adapters[1].to(torch.float16)]
    halves = [replace(halves[0], dtype=torch.bfloat16), replace(halves[1], dtype=torch.float16)]
    assert merge(halves[:1]).report.dtype == "bfloat16"
    assert merge(halves).report.dtype == "float32"


@pytest.mark.parametrize(
    ("method", "rank"), [("svd", 3), ("ties", 24), ("weighted_sum", None), ("concatenation", None)]
)
def test_a_restored_norm_is_the_mean_of_the_norms_of_those_that_have_the_layer(method, rank, adapters):
    weights = [3.0, -1.0, 0.5]
    rank = {} if rank is None else {"rank": rank}
    result = merge(adapters, method, weights=weights, restore_norm=True, scale=-2, dtype="float64", **rank)
    plain = merge(adapters, method, weights=weights, dtype="float64", **rank)
    for module, update in result.modules.items():
        there = [a.modules[module] for a in adapters if module in a.modules]
        norms = [float(torch.linalg.matrix_norm(u.B @ u.A)) for u in there]
        before = plain.modules[module].B @ plain.modules[module].A
        expected = -2 * before * (sum(norms) / len(norms) / torch.linalg.matrix_norm(before))
        torch.testing.assert_close(update.B @ update.A, expected)


def test_a_layer_that_cancels_out_has_no_norm_to_restore(adapters):
    twins = [adapters[0], replace(adapters[0], name="twin")]
    result = merge(twins, weights=[1, -1], restore_norm=True, dtype="float64")
    assert all(float(update.norm()) < 1e-12 for update in result.modules.values())


@pytest.mark.parametrize("method", ["svd", "ties", "dare_ties", "knots"])
def test_auto_is_the_default_rule_for_methods_in_and_out_of_the_span(method, adapters, dense_sum):
    result = merge(adapters, method, rank="auto", dtype="float64")
    assert result.report.layers == merge(adapters, method, rank=RankRule(), dtype="float64").report.layers
    assert result.report.rank["by"] == "energy" and result.report.rank["energy"] == 0.99
    for module, layer in result.report.layers.items():
        S2 = torch.linalg.svdvals(dense_sum(adapters, [1 / 3] * 3, module)).square()
        assert layer.rank == int((S2.cumsum(0) < 0.99 * S2.sum()).sum()) + 1


def test_full_is_every_direction_there_is_and_for_methods_that_leave_the_span_the_size_of_the_layer(adapters):
    # a and b share a direction, c lacks a layer
    for method, expected in (("svd", {DOWN: 4, Q: 8, V: 8}), ("ties", {DOWN: 24, Q: 24, V: 12})):
        report = merge(adapters, method, rank="full", dtype="float64").report
        assert {module: layer.rank for module, layer in report.layers.items()} == expected
        assert report.energy_dropped < 1e-20


def test_a_merge_goes_on_in_memory_as_from_its_folder(folders, tmp_path):
    result = merge(folders[:2], rank=4, output=tmp_path / "first", dtype="float64")
    live, stored = result.adapter("live"), read_adapter(tmp_path / "first")
    assert (live.name, live.base_model, live.sha256) == ("live", "tiny/base", stored.sha256)
    again = [merge([one, folders[2]], "ties", dtype="float64").modules for one in (live, stored)]
    for module, update in again[0].items():
        torch.testing.assert_close(update.delta(), again[1][module].delta())
    in_memory = merge(folders[:2], name="inner").adapter("pair")
    assert in_memory.path is None and in_memory.sha256 is None
    assert merge([in_memory]).report.sources[0].merge["name"] == "inner"


def data_of(adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, shape in adapter.shapes.items():
        x = torch.randn(2 * shape.n, shape.n, generator=generator, dtype=torch.float64)
        found[module] = LayerStatistics(x.T @ x / len(x), len(x))
    return found


def test_statistics_follow_their_adapter_past_one_of_weight_zero(adapters):
    data = [data_of(adapter, seed) for seed, adapter in enumerate(adapters)]
    got = merge(adapters, "regmean", weights=[1, 0, 2], statistics=data, dtype="float64").modules
    without = merge(adapters[::2], "regmean", weights=[1, 2], statistics=data[::2], dtype="float64").modules
    for module, update in without.items():
        torch.testing.assert_close(got[module].delta(), update.delta())


class NearZero:
    """An objective that wants all gates to be zero."""

    names, layers, tasks = ("a", "b", "c"), (DOWN, Q, V), ("new",)

    def describe(self):
        return {"wants": 0}

    def losses(self, gates, shares, *, crossed):
        return gates.square().sum(dim=1)

    def step_loss(self, gates, shares, *, kind, guard, step, seed):
        return gates.square().sum()


def test_the_report_says_what_judged_and_whether_bases_were_compared(adapters):
    report = merge(adapters, "lorahub_linear", budget=2, objective=NearZero(), check_base=False).report
    assert report.objective == {"wants": 0} and report.check_base is False
    plain = merge(adapters).report
    assert plain.objective is None and plain.check_base is True
    assert [source.statistics for source in plain.sources] == [None] * 3


def test_rounding_in_the_report_is_that_of_the_stored_matrices(adapters):
    report = merge(adapters, rank=4, dtype="bfloat16").report
    exact, stored = (merge(adapters, rank=4, dtype=dtype).modules for dtype in ("float64", "bfloat16"))
    errors, sizes = [], []
    for module, layer in report.layers.items():
        want = exact[module].B @ exact[module].A
        errors.append(float((stored[module].B.double() @ stored[module].A.double() - want).norm()))
        sizes.append(float(want.norm()))
        assert layer.rounding == pytest.approx(errors[-1] / sizes[-1], rel=1e-6)
    whole = (sum(e**2 for e in errors) / sum(s**2 for s in sizes)) ** 0.5
    assert report.rounding == pytest.approx(whole, rel=1e-6)


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


class Products(TorchDispatchMode):
    """Which dtypes matrices are multiplied in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", [name for name, m in methods().items() if not m.needs and name != "hierarchical"])
def test_a_method_computes_in_the_dtype_that_it_says(name, adapters):
    pair = [replace(adapter, modules={Q: adapter.modules[Q].truncated(2)[0]}) for adapter in adapters[:2]]
    with Products() as products:
        merge(pair, name, dtype="float64")
    assert (torch.float32 in products.dtypes) == (find_method(name).computes_in == "float32")


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


def test_names_with_brackets_and_long_paths_are_printed_as_they_are(folders, tmp_path, capsys):
    folder, output = tmp_path / "[bold]x[red]", tmp_path / f"[b]{'long' * 40}"
    folders[0].rename(folder)
    merge_command([str(folder), str(folders[1]), "--output", str(output)])
    said = capsys.readouterr().out
    assert "[bold]x[red]" in said and f"written to {output}\n" in said
    inspect_command([str(folder), str(folders[1]), "--output", f"{output}-2"])
    said = capsys.readouterr()
    assert "[bold]x[red]" in said.out and f"written to {output}-2\n" in said.err


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


def test_the_methods_command_says_what_a_method_needs_and_its_other_names(capsys):
    methods_command(["--json"])
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed.keys() == methods().keys()
    for name, method in methods().items():
        assert listed[name]["needs"] == list(method.needs) and listed[name]["aliases"] == list(method.aliases)
    assert listed["regmean"]["needs"] == ["statistics"] and listed["lorahub"]["needs"] == ["objective"]
    assert listed["svd"]["needs"] == []


@pytest.mark.parametrize(("alias", "name"), [(a, m.name) for m in methods().values() for a in m.aliases])
def test_another_name_is_the_same_method(alias, name):
    assert find_method(alias) is find_method(name)


def test_another_name_is_reported_as_the_methods_own(folders, tmp_path, capsys):
    assert {"cat", "task_arithmetic"} <= {alias for method in methods().values() for alias in method.aliases}
    for alias, name in (("cat", "concatenation"), ("task_arithmetic", "weighted_sum")):
        merge_command([*map(str, folders), "--method", alias, "--output", str(tmp_path / alias)])
        merge_command([*map(str, folders), "--method", name, "--output", str(tmp_path / name)])
        for file in ("adapter_model.safetensors", "adapter_config.json", "merge_report.json"):
            assert (tmp_path / alias / file).read_bytes() == (tmp_path / name / file).read_bytes()


@pytest.fixture
def help_of(capsys, monkeypatch):
    """What `moa merge ... --help` prints."""
    monkeypatch.setenv("COLUMNS", "2000")

    def printed(*words):
        with pytest.raises(SystemExit) as stop:
            merge_command([*words, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return printed


def shown(page):
    """The flags that a help page explains."""
    lines = (line.split("  ")[1] for line in page.splitlines() if line.startswith("  -"))
    return {word.strip(",") for line in lines for word in line.split() if word.startswith("-")}


RANK_FLAGS = {f"--{f.name if 'rank' in f.name else f'rank-{f.name}'}".replace("_", "-") for f in fields(RankRule)}


def test_the_help_of_the_merge_command_fits_two_screens_and_names_every_method_once(help_of, monkeypatch):
    page = help_of()
    listed = page.partition("\nmethods:\n")[2].partition("\n\n")[0]
    names = [name for line in listed.splitlines() for name in line.partition(":")[0].strip().split(", ")]
    assert sorted(names) == list(methods())
    assert "examples:\n  moa merge" in page and "--method ties --help" in page and "--rank auto --help" in page
    options = {f"--{option.replace('_', '-')}" for method in methods().values() for option in method.options}
    assert not shown(page) & (options | RANK_FLAGS)
    monkeypatch.setenv("COLUMNS", "100")
    assert len(help_of().splitlines()) < 80


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_the_help_of_a_method_shows_its_own_options_alone_and_in_one_spelling(method, help_of):
    page = help_of("--method", method.name)
    own = page.partition(f"options of {method.name}:")[2]
    spelt = {flag for flag in shown(own) if not flag.startswith("--no-")}
    assert spelt >= {f"--{option.replace('_', '-')}" for option in method.options}
    assert not any("_" in flag for flag in shown(page))
    others = {option for m in methods().values() for option in m.options} - method.options.keys()
    assert not shown(page) & {f"--{option.replace('_', '-')}" for option in others}
    for option, parameter in method.options.items():
        assert method.describe(option).rstrip(".") in page
        assert parameter.default is None or f"(default: {parameter.default})" in own
    assert ("--model" in shown(page)) == ("objective" in method.needs)
    assert ("--statistics" in shown(page)) == ("statistics" in method.needs)


def test_the_help_of_a_method_is_found_by_its_other_name_too(help_of, capsys):
    assert help_of("--method", "cat") == help_of("--method", "concatenation")
    with pytest.raises(SystemExit) as stop:
        merge_command(["--method", "tise", "--help"])
    assert stop.value.code == 2 and "did you mean 'ties'?" in capsys.readouterr().err


def test_the_help_of_rank_auto_shows_how_ranks_are_chosen(help_of):
    page = help_of("--rank", "auto")
    assert shown(page) >= {*RANK_FLAGS, "--statistics"}
    assert not RANK_FLAGS & shown(help_of("--rank", "4"))


OPTIONS = [(m.name, o) for m in methods().values() for o in m.options]


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_every_option_of_every_method_is_read_from_the_command_line_as_what_it_is(method, option, monkeypatch):
    asked = {}
    monkeypatch.setattr("moa.merging.cli.merge_recipe", lambda recipe, **more: asked.update(recipe, **more) or 1 / 0)
    parameter = find_method(method).options[option]
    kind, _ = optional(parameter.annotation)
    value = get_args(kind)[-1] if get_origin(kind) is Literal else {bool: True, int: 3, float: 0.25, str: "svd"}[kind]
    flag = f"--{option.replace('_', '-')}"
    several = {optional(m.options[option].annotation)[0] for m in methods().values() if option in m.options}
    words = [flag] if several == {bool} else [flag, str(value).lower() if kind is bool else str(value)]
    with pytest.raises(ZeroDivisionError):
        merge_command(["a", "--method", method, "--output", "b", *words])
    assert asked[option] == value and type(asked[option]) is type(value)
    find_method(method).check_options({option: asked[option]})


def test_methods_md_is_current():
    page = Path(__file__).parents[2] / "METHODS.md"
    assert page.read_text() == markdown(), "run: moa methods --markdown > METHODS.md"
