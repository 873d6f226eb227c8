"""The catalog: every task loads, and the names that are asked for are there."""

import re

import pytest

from moa.tasks import DEMO_TASKS, SUITES, load_task, load_tasks, task_names
from moa.tasks.pocket import GENERATORS


def test_the_catalog_has_the_seven_tasks_the_inference_suite_and_three_more():
    assert set(task_names()) == {*DEMO_TASKS, *SUITES["inference"], "mrpc", "multi30k", "dialogsum"}
    assert SUITES["seven"] == DEMO_TASKS


@pytest.mark.parametrize("name", task_names())
def test_a_task_of_the_catalog_loads_under_its_own_name(name):
    task = load_task(name)
    assert task.name == name
    assert task.hub is not None and set(task.hub.splits) == {"train", "validation", "test"}
    assert task.folders[0] == name


def test_no_two_tasks_of_a_suite_have_the_same_first_line_of_the_prompt():
    for names in (task_names(), *SUITES.values()):
        headers = [load_task(name).prompt.splitlines()[0] for name in names]
        assert len(set(headers)) == len(headers)


def test_the_seven_tasks_have_one_pocket_generator_each():
    assert {load_task(name).pocket for name in DEMO_TASKS} == set(GENERATORS)


def test_an_unknown_task_is_answered_with_the_nearest_name_and_the_list():
    with pytest.raises(ValueError, match=r"unknown task 'mnly': choose from .*; did you mean 'mnli'\?") as error:
        load_task("mnly")
    assert all(re.search(rf"\b{name}\b", str(error.value)) for name in task_names())


@pytest.mark.parametrize("name", ["squad.v2", "my/task", "two words", ""])
def test_a_name_that_no_adapter_could_bear_is_unknown_too(name):
    with pytest.raises(ValueError, match="unknown task"):
        load_task(name)


def test_a_suite_stands_for_its_tasks_and_no_task_comes_twice():
    assert [task.name for task in load_tasks(["inference", "sst2"])] == ["mnli", "fever", "rte", "scitail", "sst2"]
    with pytest.raises(ValueError, match="'mnli' twice"):
        load_tasks(["seven", "mnli"])
    with pytest.raises(ValueError, match="at least one task"):
        load_tasks([])
