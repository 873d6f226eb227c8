"""The table of the terminal: a row for each system, a column for each task, the headline at the end."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa.evaluation.routed import fallback_notes
from moa.evaluation.summary import (
    Interval,
    Normalised,
    Results,
    find_cell,
    headline_score,
    mean_nll,
    nll_interval,
    normalised,
)
from moa.evaluation.verdict import verdict

HEADINGS = {"lora": "LoRAs", "router": "other routers", "merge": "merges"}


def print_table(results: Results, console: Console | None = None) -> None:
    """Print as much of the table as the terminal is wide for, then the notes and the verdict.

    A task's column holds the headline score (0 to 100) and, where there is room, the right answer's negative
    log-likelihood beside it. In a terminal too narrow for the tasks only the headline columns are printed.
    """
    console = console or Console()
    summary = normalised(results)
    endless = console.options.update(width=10_000)
    for scores, nlls in ((True, True), (True, False), (False, False)):
        table = _table(results, summary, scores=scores, nlls=nlls)
        if console.measure(table, options=endless).maximum <= console.width:
            break
    console.print(table)
    for note in notes(results, summary):
        console.print(Text(note, style="dim"))
    if not scores:
        console.print(Text("A wider terminal shows the score on each task.", style="dim"))
    console.print(Text(f"\n{verdict(results)}", style="bold"))


def notes(results: Results, summary: Mapping[str, Normalised]) -> Iterator[str]:
    """What must be known beside the numbers: which base model, how many rows, what is left out of the means."""
    weights = results["base_weights"]
    yield f"Base model: {results['base_model']}, {weights['dtype']}, fingerprint {weights['fingerprint'][:12]}."
    yield from results["remarks"]
    yield from fallback_notes(results.get("fallback"))
    counts = [task["examples"] for task in results["tasks"].values()]
    if counts and all(count == counts[0] for count in counts):
        yield "Examples a task: " + ", ".join(f"{n} {kind}" for kind, n in counts[0].items()) + "."
    reasons = {pair: None for system in summary.values() for pair in system["refused"].items()}
    for task, reason in reasons:
        yield f"{task} is left out: {reason}."


def grouped(results: Results) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """The systems in reading order, as (heading or "", systems): base, LoRAs, oracle, mixture, routers, merges."""
    for kind in ("base", "lora", "oracle", "moa", "router", "merge"):
        systems = [system for system in results["systems"] if system["kind"] == kind]
        if systems:
            yield HEADINGS.get(kind, ""), systems


def short_name(system: Mapping[str, Any]) -> str:
    """The name without its kind: `merge:ties` -> `ties`."""
    return system["name"].split(":", 1)[-1]


def winners(results: Results, task: str) -> set[str]:
    """The best of the mixture and the merges on a task; several where they tie."""
    rivals = [system["name"] for system in results["systems"] if system["kind"] in ("moa", "merge")]
    scores = {name: headline_score(results, name, task) for name in rivals}
    best = max((score for score in scores.values() if score is not None), default=None)
    return {name for name, score in scores.items() if score is not None and score == best}


def _table(results: Results, summary: Mapping[str, Normalised], *, scores: bool, nlls: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1 if nlls else 0), collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    tasks = list(results["tasks"]) if scores else []
    best = {task: winners(results, task) for task in tasks}
    for task in tasks:
        table.add_column(task.replace("_", "_\n"), justify="right", vertical="bottom", no_wrap=True)
    table.add_column("% of own\nLoRA", justify="right", no_wrap=True)
    table.add_column("mean\nNLL", justify="right", no_wrap=True)
    for heading, systems in grouped(results):
        if heading:
            table.add_row(Text(heading, style="dim italic"))
        for system in systems:
            cells = [_score(results, system, task, nlls, best[task]) for task in tasks]
            table.add_row(_name(system, heading), *cells, *_headline(results, summary, system, wide=nlls))
        table.add_section()
    return table


def _name(system: Mapping[str, Any], heading: str) -> Text:
    return Text(f"  {short_name(system)}" if heading else system["name"])


def _score(results: Results, system: Mapping[str, Any], task: str, nlls: bool, best: set[str]) -> Text:
    cell, score = find_cell(results, system["name"], task), headline_score(results, system["name"], task)
    if cell is None or score is None:
        return Text("-", style="dim")
    own = system["kind"] == "lora" and short_name(system) == task
    text = Text(f"{score:.1f}", style="bold green" if system["name"] in best else "bold" if own else "")
    if nlls and cell.get("nll") is not None:
        text.append(f" {cell['nll']:.2f}", style="not bold dim default")
    return text


def _headline(
    results: Results, summary: Mapping[str, Normalised], system: Mapping[str, Any], *, wide: bool
) -> tuple[Text, Text]:
    score, interval = summary[system["name"]]["score"], summary[system["name"]]["ci"]
    text = Text("-" if score is None else f"{score:.1f}", style="bold")
    if interval is not None and system["kind"] != "oracle":
        low, high = interval
        text.append(f" {low:.1f}–{high:.1f}" if wide else f" ±{(high - low) / 2:.1f}", style="not bold")
    nll, around = mean_nll(results, system["name"]), nll_interval(results, system["name"])
    likelihood = Text("-" if nll is None else f"{nll:.2f}", style="dim")
    if around is not None and wide:
        likelihood.append(f" {around[0]:.2f}–{around[1]:.2f}")
    return text, likelihood


def markdown(results: Results) -> str:
    """The whole table in Markdown: score / negative log-likelihood in each cell, intervals of 95 % in brackets."""
    summary, tasks = normalised(results), results["tasks"]
    heads = ["", *(f"{task} ({found['headline']})" for task, found in tasks.items())]
    lines = [[*heads, "% of own LoRA (95 %)", "mean NLL (95 %)"], ["---"] * (len(heads) + 2)]
    for _, systems in grouped(results):
        for system in systems:
            name = system["name"]
            cells = (find_cell(results, name, task) for task in tasks)
            scores = (headline_score(results, name, task) for task in tasks)
            score, nll = summary[name]["score"], mean_nll(results, name)
            lines.append(
                [
                    f"{name} ({system['note']})" if system["note"] else name,
                    *("-" if s is None else _cell(s, c.get("nll")) for c, s in zip(cells, scores, strict=True)),
                    "-" if score is None else f"{score:.1f}{_bracket(summary[name]['ci'], 1)}",
                    "-" if nll is None else f"{nll:.3f}{_bracket(nll_interval(results, name), 3)}",
                ]
            )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *notes(results, summary), verdict(results)]) + "\n"


def _cell(score: float, nll: float | None) -> str:
    return f"{score:.1f}" if nll is None else f"{score:.1f} / {nll:.2f}"


def _bracket(interval: Interval | None, digits: int) -> str:
    return "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
