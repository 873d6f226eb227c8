"""A task: how a row of some data set becomes a prompt, an answer and what counts as right."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moa.tasks.fields import acceptable_answers, as_answer, find_field, normalised, template_fields
from moa.tasks.hub import HubRows, HubSource
from moa.tasks.local import Located, local_rows
from moa.tasks.names import unknown
from moa.tasks.pocket import pocket_rows

SPLITS = ("train", "validation", "test")
SOURCES = ("hub", "local", "pocket")


@dataclass(frozen=True)
class Example:
    """One row, ready for training and scoring: `prompt + answer` is the text a model is trained on.

    Attributes:
        task: name of the task.
        prompt: everything before the answer, without a trailing space.
        answer: the answer to train on, beginning with one space.
        references: every acceptable answer, stripped; more than one for SQuAD, for example.
        choices: the candidate answers in the form of `answer`; empty when the task is generative.
        label: index of the right choice; None when the task is generative.
    """

    task: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    choices: tuple[str, ...]
    label: int | None


@dataclass(frozen=True)
class Task:
    """What a YAML file of the catalog, or of a user, says about a task; `load_task` reads one.

    Exactly one of `choices`, `options` and `answer` is set.

    Attributes:
        name: name of the task, of its data folder and of its adapter.
        family: the kind of task ("sentiment", "nli", ...).
        metric: "accuracy", "squad", "rouge" or "bleu".
        max_new_tokens: tokens a generated answer may have.
        prompt: template; `{field}` stands for the field of the row.
        choices: word -> the values of the label column that mean it (normalised text).
        options: fields of the row that hold the candidate answers themselves.
        answer: the field that holds the answer, or the list of acceptable answers.
        label: the field that holds the label, where there are choices or options.
        columns: field -> the columns it may be found under, in order; a dot goes into a nested value.
        max_words: field -> how many words of it the prompt shows, from its start.
        hub, folders, pocket: where rows come from, for each of the three sources.
    """

    name: str
    family: str
    metric: str
    max_new_tokens: int
    prompt: str
    choices: Mapping[str, frozenset[str]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    answer: str | None = None
    label: str = "label"
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_words: Mapping[str, int] = field(default_factory=dict)
    hub: HubSource | None = None
    folders: tuple[str, ...] = ()
    pocket: str | None = None

    def examples(
        self,
        split: str,
        *,
        source: str = "hub",
        data_dir: str | Path | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> list[Example]:
        """Examples of one split, in the order of the data set.

        Args:
            split: "train", "validation" or "test".
            source: "hub" downloads the public data set, "pocket" generates a small one, "local" reads
                `data_dir`.
            data_dir: folder with `<task>/<split>.jsonl`; giving it means source "local".
            limit: at most this many examples, sampled with `seed`; a larger limit keeps the rows of a
                smaller one.
            seed: seed of the sample.

        Raises:
            ValueError: an unknown split or source, a source this task does not have, an empty split, or a
                row that does not fit (the message names the file and line).
            FileNotFoundError: the data is not there, or cannot be downloaded.
        """
        source = _chosen_source(source, data_dir)
        rows = self._rows(source, split, data_dir)
        if not len(rows):
            raise ValueError(f"the {split} split of task {self.name!r} ({source}) has no rows: give it at least one")
        chosen = _sample(len(rows), limit, f"{self.name}/{split}/{seed}")
        # a file of the user's own is checked whole, so that an error does not depend on the sample
        checked = range(len(rows)) if source == "local" else chosen
        examples = {i: self.example(*rows[i]) for i in checked}
        return [examples[i] for i in chosen]

    def plain(self) -> Task | None:
        """The task with nothing but the fields of a row in its prompt, as a person might send them; None where the
        prompt is just that already."""
        fields = " ".join(f"{{{name}}}" for name in template_fields(self.prompt))
        return None if " ".join(self.prompt.split()) == fields else replace(self, prompt=fields)

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """The example that `row` stands for; `where` says in an error where the row was found.

        A field may be empty text where the prompt shows another one (a question without a context).

        Raises:
            ValueError: a field is missing, all that the prompt shows are empty, an answer is empty, or the label
                is not one that the task knows.
        """
        shown = {name: self._shown(name, row, where) for name in template_fields(self.prompt)}
        if not any(shown.values()):
            names = " and ".join(map(repr, shown))
            raise ValueError(f"{where}: no text in {names}: give the prompt something to show")
        prompt = self.prompt.format(**shown)
        if self.answer is not None:
            references = acceptable_answers(self._value(self.answer, row, where), where)
            return Example(self.name, prompt, as_answer(references[0]), references, (), None)
        texts = tuple(self.choices) or tuple(self._option(name, row, where) for name in self.options)
        label = self._label(row, where)
        choices = tuple(as_answer(text) for text in texts)
        return Example(self.name, prompt, choices[label], (choices[label].strip(),), choices, label)

    def _rows(self, source: str, split: str, data_dir: str | Path | None) -> Sequence[Located] | HubRows:
        """Rows of a split, each with the place an error would name."""
        if split not in SPLITS:
            raise ValueError(unknown("split", split, SPLITS))
        if source == "local" and data_dir is not None:
            return local_rows(data_dir, self.folders, split)
        if source == "hub" and self.hub is not None:
            return HubRows(self.hub, split)
        if source == "pocket" and self.pocket is not None:
            return [(row, f"pocket {self.pocket} ({split})") for row in pocket_rows(self.pocket, split)]
        raise ValueError(
            f"task {self.name!r} has no {source} source: add a `{source}` section to its YAML file, "
            "or read a folder of your own with --data_dir"
        )

    def _value(self, name: str, row: Mapping[str, Any], where: str) -> Any:
        return find_field(row, (name, *self.columns.get(name, ())), where)

    def _shown(self, name: str, row: Mapping[str, Any], where: str) -> str:
        text = str(self._value(name, row, where)).strip()
        words = self.max_words.get(name)
        return text if words is None else " ".join(text.split()[:words])

    def _option(self, name: str, row: Mapping[str, Any], where: str) -> str:
        text = str(self._value(name, row, where)).strip()
        if not text:
            raise ValueError(f"{where}: the option {name!r} is empty: give the row a text for each option")
        return text

    def _label(self, row: Mapping[str, Any], where: str) -> int:
        """The index of the right choice, from whatever the data set calls it."""
        value = self._value(self.label, row, where)
        means = list(self.choices.values()) or [frozenset({str(i)}) for i in range(len(self.options))]
        for index, values in enumerate(means):
            if normalised(value) in values:
                return index
        known = ", ".join(sorted(set().union(*means)))
        raise ValueError(f"{where}: label {value!r} is none of {known}: correct the row or the task's `choices`")


def _chosen_source(source: str, data_dir: str | Path | None) -> str:
    """The source to read: a data folder means "local", whatever the default was."""
    if source not in SOURCES:
        raise ValueError(unknown("source", source, SOURCES))
    if source == "pocket" and data_dir is not None:
        raise ValueError(f"source 'pocket' was asked for with data_dir {str(data_dir)!r}: pass only one of the two")
    if source == "local" and data_dir is None:
        raise ValueError("source 'local' was asked for without a data_dir: pass --data_dir DIR")
    return "local" if data_dir is not None else source


def _sample(count: int, limit: int | None, seed: str) -> list[int]:
    """Indices of a sample, ascending; the sample of a smaller limit is part of that of a larger one."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: pass a number of examples from 1 up, or none for all of them")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return sorted(order[:limit])
