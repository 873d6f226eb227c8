"""From a YAML file to a Task: the format of the catalog, and of a task of one's own."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moa.tasks.fields import normalised, template_fields
from moa.tasks.hub import Carve, HubSource
from moa.tasks.names import unknown
from moa.tasks.pocket import GENERATORS
from moa.tasks.task import SPLITS, Task
from moa.yaml_nodes import composed

METRICS = ("accuracy", "squad", "rouge", "bleu")
KINDS = {
    str: "text",
    int: "a whole number",
    dict: "a mapping",
    list: "a list",
    (dict, list): "a mapping or a list",
}
KEYS: dict[str, Any] = {
    "name": str,
    "family": str,
    "metric": str,
    "max_new_tokens": int,
    "prompt": str,
    "answer": str,
    "choices": (dict, list),
    "options": list,
    "label": str,
    "columns": dict,
    "max_words": dict,
    "hub": dict,
    "local": dict,
    "pocket": dict,
}


def read_task(path: str | Path) -> Task:
    """The task that a YAML file defines.

    A file needs `name`, `metric`, `prompt`, and one of `choices`, `options` and `answer`; the rest only
    where it is used::

        name: tickets                 # letters, digits, - and _
        family: routing               # default: the name
        metric: accuracy              # accuracy (choices, options); squad, rouge or bleu (answer)
        max_new_tokens: 4             # default 32
        prompt: |                     # {field} stands for a column of the row
          Urgency of the ticket: high or low?
          Ticket: {text}
          Answer:
        choices: {high: [1], low: [0]}   # word: the values of `label` that mean it
        label: priority               # default "label"

        options: [left, right]        # instead of choices: the fields that hold the candidate answers,
                                      # and `label` is the index of the right one
        answer: summary               # instead: the field that holds the answer, or a list of them

        columns: {text: [body, ticket.body]}  # other columns a field may be under; a dot goes inside
        max_words: {text: 200}        # words of a field that the prompt shows, from its start

        hub:                          # for --source hub
          path: someone/tickets       # also: name (the configuration), revision
          splits: {train: train, validation: {carve: train, rows: 500}, test: test}
        local: {folders: [helpdesk]}  # for --data_dir: other folders than the one called `name`
        pocket: {generator: sentiment}  # for --source pocket: a generator of this package

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, a key is unknown, missing or there twice, or a value makes no sense.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no task file {path}: pass the path of a YAML file, or a name of the catalog")
    try:
        root = composed(path.read_text(encoding="utf-8"), _Loader)
        return _task(None if root is None else _Loader("").construct_document(root))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"task file {path}: {error}") from error


def check_task_name(name: str) -> str:
    """The name, if a data folder and an adapter can bear it.

    Raises:
        ValueError: it has a dot, a slash, a space or another character that they cannot, or PEFT's `ModuleDict`
            of adapters or a mixture's fallback has the name already.
    """
    from torch.nn import ModuleDict  # here, because whoever only lists tasks should not wait for torch

    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"task name {name!r}: use only letters, digits, '-' and '_' "
            "(it names a folder and an adapter, and PEFT takes a dot for a path)"
        )
    if name == "default" or hasattr(ModuleDict(), name):
        raise ValueError(f"task name {name!r}: PEFT uses it for something else, choose another")
    return name


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            same, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if same in lines:
                raise ValueError(f"line {line}: key {key.value!r} is already on line {lines[same]}: keep one")
            lines[same] = line
        return super().construct_mapping(node, deep)


def _task(raw: Any) -> Task:
    _check_keys(raw, KEYS, "the file", required=("name", "metric", "prompt"))
    for key, value in raw.items():
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise ValueError(f"`{key}` is {value!r}: it must be {KINDS[KEYS[key]]}")
    task = Task(
        name=check_task_name(raw["name"]),
        family=raw.get("family", raw["name"]),
        metric=_metric(raw),
        max_new_tokens=_positive("max_new_tokens", raw.get("max_new_tokens", 32)),
        prompt=raw["prompt"].rstrip(),
        choices=_choices(raw["choices"]) if "choices" in raw else {},
        options=_texts("options", raw["options"]) if "options" in raw else (),
        answer=raw.get("answer"),
        label=raw.get("label", "label"),
        columns={name: _texts(f"columns.{name}", names) for name, names in raw.get("columns", {}).items()},
        max_words={name: _positive(f"max_words.{name}", n) for name, n in raw.get("max_words", {}).items()},
        hub=_hub(raw["hub"]) if "hub" in raw else None,
        folders=_folders(raw),
        pocket=_pocket(raw["pocket"]) if "pocket" in raw else None,
    )
    _check_fields(task)
    return task


def _check_keys(raw: Any, known: Iterable[str], place: str, required: Iterable[str] = ()) -> None:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{place} is {raw!r}: it must be a mapping of `key: value`")
    for key in raw:
        if key not in known:
            raise ValueError(f"{place} has an {unknown('key', key, known)}")
    for key in required:
        if key not in raw:
            raise ValueError(f"{place} has no `{key}`: add it")


def _check_fields(task: Task) -> None:
    """A field that nothing uses is a misspelt one."""
    shown = template_fields(task.prompt)
    if not shown:
        raise ValueError("`prompt` shows no field of the row: write at least one {field} in it")
    answered = (task.answer,) if task.answer else (task.label, *task.options)
    for name in task.columns:
        if name not in (*shown, *answered):
            raise ValueError(f"`columns` has an {unknown('field', name, {*shown, *answered})}")
    for name in task.max_words:
        if name not in shown:
            raise ValueError(f"`max_words` has an {unknown('field', name, shown)}")


def _metric(raw: Mapping[str, Any]) -> str:
    """The metric, if it goes with the way the task is answered."""
    ways = [key for key in ("choices", "options", "answer") if key in raw]
    if len(ways) != 1:
        raise ValueError(
            f"the file has {' and '.join(ways) or 'no answer'}: give exactly one of `choices` (words), "
            "`options` (fields with the candidates) and `answer` (the field with the text)"
        )
    if raw["metric"] not in METRICS:
        raise ValueError(unknown("metric", raw["metric"], METRICS))
    if (raw["metric"] == "accuracy") == (ways == ["answer"]):
        raise ValueError(
            f"metric {raw['metric']!r} does not go with `{ways[0]}`: use accuracy with choices or options, "
            "and squad, rouge or bleu with answer"
        )
    return raw["metric"]


def _positive(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{key}` is {value!r}: it must be a whole number from 1 up")
    return value


def _texts(key: str, value: Any) -> tuple[str, ...]:
    """One text or several, as several."""
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"`{key}` has {text!r}: it must be text (put quotes around words such as yes, no, true)")
    if not texts or len(set(texts)) < len(texts):
        raise ValueError(f"`{key}` is {texts}: give at least one name, and each only once")
    return tuple(texts)


def _choices(raw: Mapping[Any, Any] | list) -> dict[str, frozenset[str]]:
    """Word -> every value of the label that means it; a list means 0, 1, 2, ... in its order."""
    words = _texts("choices", list(raw))
    values = [raw[word] for word in words] if isinstance(raw, Mapping) else [[i] for i in range(len(words))]
    meanings: dict[str, frozenset[str]] = {}
    for word, meant in zip(words, values, strict=True):
        meant = meant if isinstance(meant, list) else [meant]
        meanings[word] = frozenset({normalised(word), *map(normalised, meant)})
        for other in set(meanings) - {word}:
            if shared := meanings[word] & meanings[other]:
                raise ValueError(f"label {sorted(shared)[0]!r} means both {other!r} and {word!r}: keep it in one")
    if len(words) < 2:
        raise ValueError(f"`choices` is {list(words)}: give at least two words")
    return meanings


def _hub(raw: Any) -> HubSource:
    _check_keys(raw, ("path", "name", "revision", "splits"), "`hub`", required=("path", "splits"))
    _check_keys(raw["splits"], SPLITS, "`hub.splits`")
    for key in set(raw) - {"splits"}:
        _texts(f"hub.{key}", raw[key])
    splits = {split: _hub_split(split, wanted) for split, wanted in raw["splits"].items()}
    return HubSource(raw["path"], splits, raw.get("name"), raw.get("revision"))


def _hub_split(split: str, wanted: Any) -> str | Carve:
    if isinstance(wanted, str):
        return wanted
    place = f"`hub.splits.{split}`"
    _check_keys(wanted, ("carve", "rows"), place, required=("carve", "rows"))
    return Carve(wanted["carve"], _positive(f"hub.splits.{split}.rows", wanted["rows"]))


def _folders(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Folders to look for under a data folder: the task's name first, then its aliases."""
    local = raw.get("local", {"folders": [raw["name"]]})
    _check_keys(local, ("folders",), "`local`", required=("folders",))
    return tuple(dict.fromkeys((raw["name"], *_texts("local.folders", local["folders"]))))


def _pocket(raw: Any) -> str:
    _check_keys(raw, ("generator",), "`pocket`", required=("generator",))
    if raw["generator"] not in GENERATORS:
        raise ValueError(unknown("pocket generator", raw["generator"], GENERATORS))
    return raw["generator"]
