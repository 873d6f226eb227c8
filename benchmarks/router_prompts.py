"""Does the router still know a task when it is asked in other words, and does it know what it has never seen?

    python benchmarks/router_prompts.py outputs/moa --data_dir my_data --rows 100
    python benchmarks/router_prompts.py outputs/moa --data_dir my_data --unseen rte fever
    python benchmarks/router_prompts.py --write_tasks forms      # then, for what the answers are worth:
    moa evaluate --mixture outputs/moa --tasks forms/free/*.yaml --data_dir my_data

Test rows of every expert's task in three forms: as the adapters were trained; paraphrased, every header in other
words; free, one instruction as a person would write it, no headers at all. Unseen tasks have no expert. For each: the
share of prompts that go to their own expert, with a 95 % interval, and the shares that fall back to the merged adapter
and to the base model. Only the prefix pass runs. `--write_tasks` writes the tasks in either other form as files, for
commands that take tasks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from moa import MoaModel
from moa.base_model import load_tokenizer
from moa.intervals import share_of
from moa.routing import BASE, EXPERT, MERGED
from moa.tasks import Task, load_tasks
from moa.tasks.suites import CATALOG

PARAPHRASED = {
    "sst2": "Is this opinion of a film good or bad?\nOpinion: {sentence}\nVerdict:",
    "scitail": "Does the text support the statement?\nText: {premise}\nStatement: {hypothesis}\nVerdict:",
    "squad": "Find the answer in the passage\nPassage: {context}\nAsked: {question}\nFound:",
    "multi30k": "Translate the description of a picture\nSource text: {en}\nTarget text, in German:",
    "piqa": "How does one do this?\nTask: {goal}\nMethod:",
    "mrpc": "Do these two say one thing?\nSentence A: {sentence1}\nSentence B: {sentence2}\nVerdict:",
    "dialogsum": "What was this talk about?\nTalk: {dialogue}\nIn short:",
}
FREE = {
    "sst2": "I just read this in a review: {sentence} Did they like the movie or not?",
    "scitail": "If I know that {premise} can I conclude that {hypothesis}",
    "squad": "{context} Tell me, please: {question}",
    "multi30k": "How would you say this in German? {en}",
    "piqa": "I need some practical advice. {goal}",
    "mrpc": "{sentence1} Is that the same as saying: {sentence2}",
    "dialogsum": "{dialogue} Sum that up for me in a sentence or two.",
}
FORMS = {"as trained": {}, "paraphrased": PARAPHRASED, "free": FREE}
RAN = {"expert": EXPERT, "merged": MERGED, "base": BASE}


@dataclass(frozen=True)
class Routed:
    """Where the prompts of one task in one form went: `own` is -1 for a task without an expert."""

    form: str
    task: str
    chosen: list[int]
    fallback: list[int]
    own: int

    def as_json(self) -> dict[str, object]:
        shares = {name: self.fallback.count(code) / len(self.fallback) for name, code in RAN.items()}
        right = None if self.own < 0 else share_of(self.chosen.count(self.own), len(self.chosen))
        return {"form": self.form, "task": self.task, "n": len(self.chosen), "right": right, "ran": shares}


def routed(model: MoaModel, tokenizer: object, form: str, task: Task, asked: argparse.Namespace) -> Routed:
    examples = task.examples("test", source="hub", data_dir=asked.data_dir, limit=asked.rows, seed=asked.seed)
    prompts = sorted((example.prompt for example in examples), key=len)  # little padding
    chosen, fallback = [], []
    starts = range(0, len(prompts), asked.batch_size)
    for start in track(starts, description=f"{task.name}, {form}", transient=True):
        batch = tokenizer(prompts[start : start + asked.batch_size], return_tensors="pt", padding=True)
        with torch.no_grad():
            found = model.route(**batch.to(model.device))
        chosen += found.experts
        fallback += [EXPERT] * len(found.experts) if found.fallback is None else found.fallback.tolist()
    own = model.experts.index(task.name) if task.name in model.experts else -1
    return Routed(form, task.name, chosen, fallback, own)


def show(found: list[Routed]) -> None:
    table = Table(title="where prompts go", title_justify="left")
    for heading in ("form", "task", "own expert", "95 % interval", "merged", "base"):
        table.add_column(heading, justify="left" if heading in ("form", "task") else "right", no_wrap=True)
    for form in dict.fromkeys(one.form for one in found):
        rows = [one.as_json() for one in found if one.form == form]
        if len(rows) > 1:
            rows.append(together([one for one in found if one.form == form]))
        for row in rows:
            right = row["right"]
            share = "-" if right is None else f"{100 * right['accuracy']:.1f}"
            interval = "" if right is None else " to ".join(f"{100 * end:.1f}" for end in right["interval"])
            ran = (f"{100 * row['ran'][name]:.1f}" for name in ("merged", "base"))
            table.add_row(form, row["task"], share, interval, *ran)
        table.add_section()
    Console(width=110).print(table)


def together(found: list[Routed]) -> dict[str, object]:
    """All tasks of a form."""
    fallback = [ran for one in found for ran in one.fallback]
    right = None
    if all(one.own >= 0 for one in found):
        right = share_of(sum(one.chosen.count(one.own) for one in found), len(fallback))
    return {"task": "all", "right": right, "ran": {n: fallback.count(c) / len(fallback) for n, c in RAN.items()}}


def write_tasks(folder: Path) -> None:
    """The catalog's tasks in other words, as FOLDER/FORM/TASK.yaml."""
    for form in ("paraphrased", "free"):
        (folder / form).mkdir(parents=True, exist_ok=True)
        for name, prompt in FORMS[form].items():
            task = yaml.safe_load((CATALOG / f"{name}.yaml").read_text(encoding="utf-8")) | {"prompt": prompt}
            (folder / form / f"{name}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True, sort_keys=False))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", nargs="?", help="folder of a saved mixture, or a Hub repository")
    parser.add_argument("--write_tasks", type=Path, metavar="FOLDER", help="write task files, and route nothing")
    parser.add_argument("--model", help="base model, if not the one that the mixture names")
    parser.add_argument("--data_dir", help="folder with TASK/test.jsonl; default the Hub")
    parser.add_argument("--rows", type=int, default=100, help="prompts a task (default 100)")
    parser.add_argument("--unseen", nargs="*", default=[], help="tasks that no expert was trained for")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at once (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="which rows are drawn")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args(argv)
    if (asked.mixture is None) == (asked.write_tasks is None):
        parser.error("give a mixture, or --write_tasks FOLDER")
    if asked.write_tasks:
        write_tasks(asked.write_tasks)
        return
    model = MoaModel.from_pretrained(asked.model, asked.mixture)
    tokenizer = load_tokenizer(asked.model or model.moa_config.base_model)
    tasks = load_tasks(model.experts)
    found = [
        routed(model, tokenizer, form, replace(task, prompt=prompts.get(task.name, task.prompt)), asked)
        for form, prompts in FORMS.items()
        for task in tasks
        if not prompts or task.name in prompts
    ]
    if asked.unseen:
        found += [routed(model, tokenizer, "unseen", task, asked) for task in load_tasks(asked.unseen)]
    if asked.json:
        print(json.dumps([one.as_json() for one in found]))
    else:
        show(found)


if __name__ == "__main__":
    main()
