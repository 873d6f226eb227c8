"""What an evaluation leaves behind: a table, a JSON file and one HTML page that needs nothing else.

The results are one dictionary, the content of results.json:

    {"created": ISO time, "seed": int, "versions": {package: version}, "machine": str,
     "base_model": name of the one that was loaded,
     "attention": the implementation that answered,
     "base_weights": {"dtype": "bfloat16", "fingerprint": sha256 of `moa.fingerprint`}, "source": str,
     "remarks": [sentence that a reader must know],
     "tasks": {task: {"metric": "accuracy", "headline": "accuracy", "settings": how it is computed (optional),
                      "examples": {"each": 60, "for a LoRA of another task": 24}}},
     "systems": [{"name": "merge:ties", "kind": base | lora | oracle | moa | router | merge, "note": str}],
     "cells": [{"system": str, "task": str, "n": int, "scores": {"accuracy": 81.7, ...},   # 0 to 100
                "nll": nats | null, "generated": {"accuracy": 80.0, "unparsable": 1.7} | null,
                "per_example": [headline score of each example], "seconds": 3.1}],
     "router": {"accuracy": 0 to 1, "interval": [low, high] (95 %), "n": 420, "names": [...], "confusion": [[...]],
                "tasks": {name: {"accuracy": ..., "interval": ..., "n": 60}},
                "calibration": a `moa.calibration.Calibration`} | null,
     "fallback": {task: {"n": 60, "merged": prompts that ran the merged adapter, "base": the base model,
                         "own": whether the task has a LoRA}} | null,   # null: every prompt is trusted to a LoRA
     "costs": [{"system": str, "extra_parameters": int, "rank": int,
                "prefill_overhead": share of a prefill}] | null}
"""

import json
from importlib.resources import files
from pathlib import Path

from moa.evaluation.files import write_whole
from moa.evaluation.summary import Results, normalised
from moa.evaluation.table import markdown, print_table
from moa.evaluation.verdict import verdict

__all__ = ["normalised", "print_table", "verdict", "write_html", "write_json", "write_markdown"]


def write_json(results: Results, path: str | Path) -> Path:
    """Write results.json whole or not at all.

    Raises:
        ValueError: when a score is NaN or infinite, which JSON cannot hold.
    """
    try:
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} was not written: a score is NaN or infinite ({error})") from None
    return write_whole(text + "\n", Path(path))


def write_markdown(results: Results, path: str | Path) -> Path:
    """Write the table, its notes and the verdict in Markdown, to paste into a README or an issue."""
    return write_whole(markdown(results), Path(path))


def write_html(results: Results, path: str | Path) -> Path:
    """Write one page with the verdict, plots, tables and settings inside; it asks nothing of the network."""
    import jinja2

    from moa.evaluation import plots
    from moa.evaluation.summary import find_cell, headline_score, mean_nll
    from moa.evaluation.table import grouped, notes, short_name, winners
    from moa.evaluation.verdict import cost_words

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("moa.evaluation").joinpath("report.html.j2").read_text("utf-8"))
    summary = normalised(results)
    page = template.render(
        results=results,
        summary=summary,
        verdict=verdict(results),
        notes=list(notes(results, summary)),
        groups=list(grouped(results)),
        best={task: winners(results, task) for task in results["tasks"]},
        plots=plots,
        cell=find_cell,
        score=headline_score,
        nll=mean_nll,
        short_name=short_name,
        cost_words=cost_words,
    )
    return write_whole(page, Path(path))
