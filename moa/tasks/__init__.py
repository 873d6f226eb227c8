"""Tasks and their data: one YAML file a task; rows from the Hub, a local folder or a built-in generator."""

from moa.tasks.suites import DEMO_TASKS, SUITES, load_task, load_tasks, task_names
from moa.tasks.task import Example, Task

__all__ = ["DEMO_TASKS", "SUITES", "Example", "Task", "load_task", "load_tasks", "task_names"]
