"""The tasks that come with the package: one YAML file each in catalog/, and the suites made of them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from moa.tasks.definition import read_task
from moa.tasks.names import unknown
from moa.tasks.task import Task

CATALOG = Path(__file__).parent / "catalog"
DEMO_TASKS = ("cnn_dailymail", "wmt14", "squad", "sst2", "mnli", "paws", "piqa")
SUITES = {"seven": DEMO_TASKS, "inference": ("mnli", "fever", "rte", "scitail")}


def task_names() -> list[str]:
    """Names of the tasks of the catalog, sorted."""
    return sorted(path.stem for path in CATALOG.glob("*.yaml"))


def load_task(name: str | Path) -> Task:
    """The task of that name in the catalog, or the one that a YAML file of your own defines.

    Anything that ends in .yaml or .yml is a path; `moa.tasks.definition.read_task` describes the format.

    Raises:
        ValueError: the catalog has no such task (the message has the nearest name and the list), or the
            file is not a task.
        FileNotFoundError: there is no such file.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return read_task(name)
    if str(name) not in task_names():
        raise ValueError(
            f"{unknown('task', str(name), task_names())} (the path of a .yaml file is a task of your own)"
        )
    return _catalog_task(str(name))


def load_tasks(names: Sequence[str | Path]) -> list[Task]:
    """Several tasks: names of tasks or of suites ("seven", "inference"), or YAML files of your own.

    Raises:
        ValueError: none given, one given twice, or one that does not exist.
    """
    if not names:
        raise ValueError("--tasks needs at least one task: give names, or YAML files of your own")
    tasks = [load_task(name) for given in names for name in SUITES.get(str(given), (given,))]
    for position, task in enumerate(tasks):
        if task.name in {earlier.name for earlier in tasks[:position]}:
            raise ValueError(f"--tasks names {task.name!r} twice: name each task once")
    return tasks


@cache
def _catalog_task(name: str) -> Task:
    return read_task(CATALOG / f"{name}.yaml")
