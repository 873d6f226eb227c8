"""What the fit of a router tells: every candidate, how sure the accuracy is, what the labels look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from moa.calibration import BINS
from moa.intervals import Share, share_of
from moa.training.router_fit import FittedRouter

REPORT_NAME = "router_report.json"


def report(fitted: FittedRouter, experts: Sequence[str]) -> dict[str, Any]:
    """All of it as JSON; losses and likelihoods in nats, intervals of 95 % (Wilson)."""
    judged, noise = fitted.judged, fitted.noise
    found = {
        "chosen": asdict(judged.candidate),
        "objective": fitted.config.objective,
        **_share(judged.right[: fitted.written]),
        "plain": _share(judged.right[fitted.written :]) if fitted.config.plain_prompts else None,
        "nll": judged.nll,
        "temperature": judged.temperature,
        "experts": {
            name: _share(judged.right[: fitted.written][fitted.labels[: fitted.written] == place])
            for place, name in enumerate(experts)
        },
        "compared": [asdict(one.candidate) | {"accuracy": one.accuracy, "nll": one.nll} for one in fitted.compared],
        "depths": [asdict(one.candidate) | {"accuracy": one.accuracy, "nll": one.nll} for one in fitted.depths],
        "label_noise": {
            "share": noise.share,
            "checked": noise.checked,
            "suspects": noise.suspects,
            "unchecked": noise.unchecked,
        },
        "calibration": asdict(fitted.config.calibration),
        "conformal": asdict(fitted.config.conformal),
        "abstention": fitted.config.abstention and asdict(fitted.config.abstention),
        "least_rate": fitted.config.abstention and fitted.strangeness[fitted.config.abstention.score].least,
        "left_out_auroc": {score: found.auroc for score, found in fitted.strangeness.items()},
    }
    if fitted.losses is not None:
        written = slice(fitted.written)
        found["answer_loss"] = _answer_losses(fitted.losses, judged.chosen[written], fitted.labels[written])
    return found


def write_report(found: Mapping[str, Any], directory: Path) -> None:
    (directory / REPORT_NAME).write_text(json.dumps(found, indent=2) + "\n")


def show_report(found: Mapping[str, Any], console: Console) -> None:
    """Print the candidates, the chosen one's accuracy for each expert, and what could not be trusted."""
    console.print(_candidates(found))
    console.print(_experts(found))
    if loss := found.get("answer_loss"):
        console.print(
            f"answers of held-out examples, nats a token: the router's experts {loss['router']:.3f}, their own "
            f"{loss['own']:.3f}, the best of all {loss['best']:.3f}",
            soft_wrap=True,
        )
    if plain := found["plain"]:
        low, high = plain["interval"]
        console.print(
            f"without their templates, the fields alone: accuracy {plain['accuracy']:.3f} (95 % interval {low:.3f} to "
            f"{high:.3f}) on {plain['n']} held-out prompts",
            soft_wrap=True,
        )
    for sentence in [*doubts(found), *remarks(found)]:
        console.print(sentence, soft_wrap=True)


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What rests on little, and which labels look wrong, each as one sentence."""
    noise = found["label_noise"]
    sentences = [
        f"the layers from {one['layer']} on have a router of their own: accuracy {one['accuracy']:.3f}"
        for one in found["depths"]
    ]
    if noise["suspects"]:
        each = ", ".join(f"{name} {len(places)}" for name, places in noise["suspects"].items())
        sentences.append(
            f"label noise: {100 * noise['share']:.1f} % of {noise['checked']} training prompts look like another "
            f"expert's ({each}); their places stand in {REPORT_NAME}, and all were kept"
        )
    limits, prompts = found["abstention"], found["calibration"]["prompts"]
    if limits is not None and limits["rate"] == found["least_rate"]:
        sentences.append(
            f"{prompts} held-out prompts promise no smaller share of strange own ones than "
            f"{100 * limits['rate']:.1f} %: give more with --validation_rows"
        )
    for name in noise["unchecked"]:
        sentences.append(f"{name} has one training prompt: whether its label is right could not be checked")
    for name, one in found["experts"].items():
        if one["n"] < 2:
            sentences.append(f"{name} has {one['n'] or 'no'} held-out prompt: its accuracy says almost nothing")
    return sentences


def doubts(found: Mapping[str, Any]) -> list[str]:
    """How far to trust the router, and what becomes of prompts that no expert is for; each as one sentence."""
    calibration, limits, sets = found["calibration"], found["abstention"], found["conformal"]
    never = ", and so never two" if sets["floor"] > 0.5 else ""
    sentences = [
        f"expected calibration error {calibration['ece']:.3f} ({BINS} bins of equal width), area under the "
        f"risk-coverage curve {calibration['aurc']:.4f}, on {calibration['prompts']} held-out prompts",
        f"--routing conformal, for {100 * sets['coverage']:.0f} % with the right expert in the mix, takes experts of "
        f"{sets['floor']:.3f} probability or more{never}",
    ]
    if limits is None:
        return [*sentences, "no prompt is too strange for the experts: --ood none"]
    aurocs = ", ".join(f"{score} {auroc:.3f}" for score, auroc in found["left_out_auroc"].items())
    return [
        *sentences,
        f"prompts of {limits['score']} above {limits['merged_above']:.4g} run the merged adapter, above "
        f"{limits['base_above']:.4g} the base model; {100 * limits['rate']:.1f} % of own prompts may",
        f"how well it tells prompts of a task that is left out from own ones (AUROC): {aurocs}",
    ]


def _candidates(found: Mapping[str, Any]) -> Table:
    table = Table(title="routers compared on held-out prompts", title_justify="left")
    for heading in ("layer", "pooling", "head", "accuracy", "nll", ""):
        table.add_column(heading, justify="right" if heading in ("layer", "accuracy", "nll") else "left")
    for one in found["compared"]:
        chosen = all(one[name] == value for name, value in found["chosen"].items())
        table.add_row(
            str(one["layer"]),
            one["pooling"],
            one["head"],
            f"{one['accuracy']:.3f}",
            f"{one['nll']:.4f}",
            "chosen" if chosen else "",
            style="bold" if chosen else None,
        )
    return table


def _experts(found: Mapping[str, Any]) -> Table:
    right = "its own prompts go to it" if found["objective"] != "utility" else "the best answer is found"
    table = Table(title=f"how often {right}", title_justify="left")
    for heading in ("expert", "prompts", "accuracy", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "expert" else "right")
    for name, one in [*found["experts"].items(), ("all", found)]:
        low, high = one["interval"]
        table.add_row(name, str(one["n"]), f"{one['accuracy']:.3f}", f"{low:.3f} to {high:.3f}")
    return table


def _share(right: Tensor) -> Share:
    return share_of(int(right.sum()), len(right))


def _answer_losses(losses: Tensor, chosen: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean over examples of the loss under the router's expert, the example's own, and the best one."""
    return {
        "router": float(losses.gather(1, chosen[:, None]).mean()),
        "own": float(losses.gather(1, labels[:, None]).mean()),
        "best": float(losses.min(dim=1).values.mean()),
    }
