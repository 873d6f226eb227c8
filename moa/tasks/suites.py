"""The tasks that come with the package: one YAML file each in catalog/, and the suites made of them."""

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


@cache
def _catalog_task(name: str) -> Task:
    return read_task(CATALOG / f"{name}.yaml")
