"""Who may import whom, as CONTRIBUTING.md says it; read from the source, nothing is run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"moa": "moa", "merging": "moa.merging", "training": "moa.training", "evaluation": "moa.evaluation"}
FILES = {
    ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for folder, package in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(path):
    """Every module that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


def importers(package):
    """Our modules that import `package` or something inside it."""
    inside = (package, f"{package}.")
    return {
        name for name, path in FILES.items() if any(m == inside[0] or m.startswith(inside[1]) for m in imports(path))
    }


def ours(name):
    return {module for module in imports(FILES[name]) if module == "moa" or module.startswith("moa.")}


BOTTOM = (
    "moa.hub",
    "moa.errors",
    "moa.low_rank",
    "moa.routing",
    "moa.router",
    "moa.strangeness",
    "moa.calibration",
    "moa.attention",
    "moa.varlen",
    "moa.precision",
    "moa.base_model",
    "moa.yaml_nodes",
)


@pytest.mark.parametrize("name", BOTTOM)
def test_the_bottom_imports_nothing_of_ours(name):
    assert ours(name) <= {"moa.errors", "moa.attention", "moa.varlen", "moa.precision"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("moa.tasks")])
def test_tasks_know_only_tasks_errors_and_yaml(name):
    assert all(module.startswith(("moa.tasks", "moa.errors", "moa.yaml_nodes")) for module in ours(name))
    heavy = {"torch", "transformers", "peft", "trl"} & {module.split(".")[0] for module in imports(FILES[name])}
    # a task's name becomes an adapter's, and torch alone knows which names its ModuleDict has taken
    assert heavy <= ({"torch"} if name == "moa.tasks.definition" else set())


def test_listing_the_tasks_imports_nothing_heavy():
    program = "import sys, moa.tasks; moa.tasks.task_names(); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "peft", "datasets"} & set(out.split())


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("moa.merging")])
def test_merging_needs_no_model(name):
    allowed = (
        *("moa.merging", "moa.low_rank", "moa.adapters", "moa.base_model", "moa.base_weights", "moa.peft_checks"),
        *("moa.errors", "moa.yaml_options"),
    )
    found = ours(name) - ({"moa.model_objective"} if name == "moa.merging.cli" else set())  # a command may use all
    assert all(module.startswith(allowed) for module in found)
    assert not {"transformers", "peft", "trl"} & {module.split(".")[0] for module in imports(FILES[name])}


def test_training_and_evaluation_do_not_know_each_other():
    assert not any(name.startswith("moa.evaluation") for name in importers("moa.training"))
    assert not any(name.startswith("moa.training") for name in importers("moa.evaluation"))


def test_nothing_below_imports_training_or_evaluation():
    above = importers("moa.training") | importers("moa.evaluation")
    assert all(name.startswith(("moa.training", "moa.evaluation")) for name in above)


def test_each_outside_library_is_known_in_few_rooms():
    assert importers("trl") <= {
        "moa.arguments",
        "moa.training.completion_config",
        "moa.training.lora",
        "moa.training.moa_trainer",
        "moa.training.trainer",
    }
    assert importers("evaluate") == {"moa.evaluation.metrics"}
    assert importers("peft") <= {
        "moa.adapters",
        "moa.peft_checks",
        "moa.peft_export",
        "moa.peft_loading",
        "moa.assembly",
        "moa.mixture",
        "moa.routed_model",
        "moa.routing_model",
        "moa.saving",
        "moa.push",
        "moa.training.lora",
        "moa.training.train_lora",
    }


def test_nothing_is_pickled():
    loaders = ("torch.load", "torch.save", "pickle", "joblib")
    for name, path in FILES.items():
        source = path.read_text()
        assert not any(f"{loader}(" in source or f"import {loader}" in source for loader in loaders), name


@pytest.mark.parametrize("folder", ["merging", "training", "evaluation"])
def test_a_folder_refuses_to_be_imported_under_its_bare_name(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"import moa.{folder}"):
        __import__(folder)
