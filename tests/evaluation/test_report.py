import json
import random
import re
from copy import deepcopy
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from moa.evaluation.comparison import card_scores, other_scores
from moa.evaluation.report import normalised, print_table, verdict, write_html, write_json
from moa.evaluation.summary import difference, mean_nll, nll_interval
from moa.evaluation.table import markdown

TASKS = {
    "cnn_dailymail": ("rouge", "rougeLsum"),
    "wmt14": ("bleu", "bleu"),
    "squad": ("squad", "f1"),
    "sst2": ("accuracy", "accuracy"),
    "mnli": ("accuracy", "accuracy"),
    "paws": ("accuracy", "accuracy"),
    "piqa": ("accuracy", "accuracy"),
}
MERGES = ["average", "concatenation", "weighted_sum", "factor_sum", "svd", "ties"]


def make_cell(system, task, rows, headline="accuracy", nll=0.5):
    return {
        "system": system,
        "task": task,
        "n": len(rows),
        "scores": {headline: float(np.mean(rows))},
        "nll": nll,
        "generated": None,
        "per_example": rows,
        "seconds": 1.0,
    }


def make_results(cells, tasks, systems):
    """Results of made-up numbers: nothing was measured."""
    return {
        "created": "2026-01-02T03:04:05+00:00",
        "seed": 7,
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "base_model": "a made-up model <b>",
        "base_weights": {"dtype": "bfloat16", "fingerprint": "0123456789abcdef"},
        "remarks": [],
        "source": "made-up rows",
        "machine": "a made-up machine",
        "tasks": {
            task: {
                "metric": metric,
                "headline": headline,
                "settings": f"{metric} as made up",
                "examples": {"each": 60, "for a LoRA of another task": 24},
            }
            for task, (metric, headline) in tasks.items()
        },
        "systems": [{"name": name, "kind": name.split(":")[0], "note": ""} for name in systems],
        "cells": cells,
        "router": None,
        "costs": None,
    }


@pytest.fixture(scope="module")
def seven():
    """Seven tasks and sixteen systems with made-up scores: LoRAs good at home, merges in between."""
    rng = random.Random(0)
    systems = ["base", *(f"lora:{t}" for t in TASKS), "oracle", "moa", *(f"merge:{m}" for m in MERGES)]
    level = {"base": 0.45, "oracle": 1.0, "moa": 0.98}
    level.update({f"merge:{merge}": 0.55 + 0.04 * index for index, merge in enumerate(MERGES)})
    cells = []
    for system in systems:
        for index, (task, (_, headline)) in enumerate(TASKS.items()):
            home = system in (f"lora:{task}", "oracle")
            share = 1.0 if home else level.get(system, rng.uniform(0.4, 0.8))
            away = system.startswith("lora") and not home
            rows = random.Random(task)
            scores = [min(100.0, (60 + 5 * index) * share * rows.uniform(0.5, 1.5)) for _ in range(24 if away else 60)]
            cells.append(make_cell(system, task, scores, headline, nll=2.2 - 1.9 * share))
    results = make_results(cells, TASKS, systems)
    results["systems"][-1]["note"] = "scale 0.43 chosen on validation"
    confusion = np.diag([60] * len(TASKS))
    confusion[-1, 0] = 3
    first, second, *_ = TASKS
    share = {"accuracy": 0.993, "interval": [0.979, 0.998], "n": 423}
    results["router"] = {
        **share,
        "names": list(TASKS),
        "tasks": dict.fromkeys(TASKS, share),
        "confusion": confusion.tolist(),
        "calibration": {"prompts": 423, "ece": 0.0123, "aurc": 0.0004, "risks": [0.0] * 19 + [0.007]},
    }
    results["fallback"] = {
        first: {"n": 60, "merged": 3, "base": 0, "own": True},
        second: {"n": 40, "merged": 0, "base": 1, "own": True},
        "weather": {"n": 60, "merged": 30, "base": 15, "own": False},
    }
    results["costs"] = [
        {"system": "moa", "extra_parameters": 3_234_567, "rank": 56, "prefill_overhead": 0.21},
        {"system": "merge:ties", "extra_parameters": 460_800, "rank": 8, "prefill_overhead": 0.0},
    ]
    return results


@pytest.fixture
def two():
    """Two tasks worked by hand: merge:svd keeps 50/100 of one and 30/60 of the other."""
    half, most = [0.0, 100.0] * 20, [100.0, 20.0] * 20
    cells = [
        make_cell("base", "a", [0.0] * 30 + [100.0] * 10),
        make_cell("base", "b", [10.0] * 40),
        make_cell("oracle", "a", [100.0] * 40),
        make_cell("oracle", "b", most),
        make_cell("moa", "a", [100.0] * 40),
        make_cell("moa", "b", most),
        make_cell("merge:svd", "a", half),
        make_cell("merge:svd", "b", [50.0, 10.0] * 20),
    ]
    tasks = {"a": ("accuracy", "accuracy"), "b": ("squad", "accuracy")}
    return make_results(cells, tasks, ["base", "oracle", "moa", "merge:svd"])


def without(results, system, task):
    copy = deepcopy(results)
    copy["cells"] = [c for c in copy["cells"] if (c["system"], c["task"]) != (system, task)]
    return copy


def cell_of(results, system, task):
    return next(c for c in results["cells"] if (c["system"], c["task"]) == (system, task))


def printed(results, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        print_table(results, console)
    return capture.get()


def test_a_score_is_the_mean_over_tasks_of_its_share_of_the_oracle(two):
    scores = normalised(two)
    assert scores["merge:svd"]["score"] == pytest.approx((50 / 100 + 30 / 60) / 2 * 100)
    assert scores["merge:svd"]["per_task"] == pytest.approx({"a": 50, "b": 50})
    assert scores["base"]["score"] == pytest.approx((25 / 100 + 10 / 60) / 2 * 100)


def test_the_oracle_and_what_equals_it_score_one_hundred_without_any_doubt(two):
    scores = normalised(two)
    for system in ("oracle", "moa"):
        assert scores[system]["score"] == pytest.approx(100)
        assert scores[system]["ci"] == pytest.approx((100, 100))


def test_the_interval_is_that_of_the_mean_where_the_oracle_is_constant(two):
    one_task = without(without(two, "oracle", "b"), "moa", "b")
    low, high = normalised(one_task)["merge:svd"]["ci"]
    # 40 rows of 0 or 100 with mean 50: standard error 50 / sqrt(40), and 1.96 of them either side.
    assert (low, high) == pytest.approx((50 - 1.96 * 50 / 40**0.5, 50 + 1.96 * 50 / 40**0.5), abs=1.5)


def test_systems_scored_on_the_same_rows_are_resampled_together(two):
    """Half of every row of the oracle is half in every resample; only task a is uncertain."""
    low, high = normalised(two)["merge:svd"]["ci"]
    assert high - low == pytest.approx(2 * 1.96 * 50 / 40**0.5 / 2, abs=1.5)


def test_one_row_of_a_task_gives_no_interval(two):
    few = deepcopy(two)
    cell = next(cell for cell in few["cells"] if cell["system"] == "merge:svd")
    cell["per_example"], cell["nll_per_example"] = cell["per_example"][:1], [cell["nll"]]
    assert normalised(few)["merge:svd"]["ci"] is None and nll_interval(few, "merge:svd") is None
    assert normalised(few)["merge:svd"]["score"] is not None


def test_the_same_seed_gives_the_same_interval_and_another_seed_another(two):
    assert normalised(two) == normalised(deepcopy(two))
    assert normalised(two)["merge:svd"]["ci"] != normalised({**two, "seed": 8})["merge:svd"]["ci"]


def test_cells_with_fewer_rows_are_compared_too(two):
    cell = cell_of(two, "merge:svd", "b")
    cell["per_example"] = cell["per_example"][:10]
    low, high = normalised(two)["merge:svd"]["ci"]
    assert low < 50 < high


def test_without_scores_of_examples_there_is_a_score_but_no_interval(two):
    cell_of(two, "merge:svd", "a")["per_example"] = None
    scores = normalised(two)["merge:svd"]
    assert scores["score"] == pytest.approx(50) and scores["ci"] is None
    assert "of unknown uncertainty" in verdict(two)


def test_a_task_whose_own_lora_does_not_beat_the_base_is_left_out_with_the_reason(two):
    cell_of(two, "base", "b")["scores"]["accuracy"] = 60.0
    scores = normalised(two)
    assert scores["merge:svd"]["per_task"] == pytest.approx({"a": 50})
    assert scores["merge:svd"]["refused"] == {"b": "its own LoRA (60.0) is no better than the base model (60.0)"}
    assert "b is left out: its own LoRA (60.0) is no better" in printed(two, 120)


def test_a_task_whose_own_lora_scores_nothing_is_left_out_with_the_reason(two):
    cell_of(two, "oracle", "b")["scores"]["accuracy"] = 0.0
    assert normalised(two)["moa"]["refused"] == {"b": "its own LoRA scores 0.0"}


def test_when_no_task_can_be_divided_there_is_no_score_and_no_crash(two, tmp_path):
    for task in ("a", "b"):
        cell_of(two, "oracle", task)["scores"]["accuracy"] = 0.0
    assert normalised(two)["moa"] | {"refused": None} == {
        "score": None,
        "ci": None,
        "per_task": {},
        "refused": None,
    }
    assert verdict(two).startswith("No verdict: no score can be compared (a: its own LoRA scores 0.0;")
    assert "No verdict" in printed(two, 100)
    write_html(two, tmp_path / "report.html")


def test_a_system_that_was_not_scored_on_every_task_gets_no_mean(two):
    scores = normalised(without(two, "merge:svd", "b"))
    assert scores["merge:svd"]["score"] is None
    assert scores["merge:svd"]["refused"] == {"b": "merge:svd was not scored on it"}
    assert scores["moa"]["score"] == pytest.approx(100)


def test_a_score_that_is_no_mean_of_examples_keeps_its_place_inside_its_interval(two):
    for system in ("oracle", "merge:svd"):
        cell_of(two, system, "b")["scores"]["accuracy"] /= 3  # as corpus BLEU is to sentence BLEU
    cell_of(two, "merge:svd", "b")["scores"]["accuracy"] *= 1.2
    cell_of(two, "base", "b")["scores"]["accuracy"] = 1.0
    scores = normalised(two)["merge:svd"]
    assert scores["score"] == pytest.approx((50 + 60) / 2)
    assert np.mean(scores["ci"]) == pytest.approx(55, abs=1.5)


def test_the_interval_of_a_likelihood_is_that_of_its_mean_over_tasks():
    rng = np.random.default_rng(0)
    losses = {task: rng.exponential(size=400) for task in ("sst2", "mnli")}
    cells = [make_cell("base", task, [0.5] * 400, nll=rows.mean()) for task, rows in losses.items()]
    for cell, rows in zip(cells, losses.values(), strict=True):
        cell["nll_per_example"] = rows.tolist()
    results = make_results(cells, {task: TASKS[task] for task in losses}, ["base"])
    error = np.sqrt(sum(rows.var() / 400 for rows in losses.values())) / 2
    expected = mean_nll(results, "base") + 1.96 * error * np.array([-1, 1])
    assert nll_interval(results, "base") == pytest.approx(expected, abs=0.1 * error)
    del cells[0]["nll_per_example"]
    assert nll_interval(results, "base") is None


def test_the_markdown_table_has_a_row_for_each_system_and_says_what_the_terminal_says(seven):
    lines = markdown(seven).splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row[2:].split(" ")[0] for row in rows] == ["---", *(system["name"] for system in seven["systems"])]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert lines[-1] == verdict(seven)
    cell = next(c for c in seven["cells"] if (c["system"], c["task"]) == ("moa", "sst2"))
    assert f"{cell['scores']['accuracy']:.1f} / {cell['nll']:.2f}" in next(row for row in rows if "moa" in row)


def test_a_difference_is_paired(two):
    points, (low, high) = difference(two, "moa", "merge:svd")
    assert points == pytest.approx(50) and low < 50 < high
    assert difference(two, "merge:svd", "merge:svd") == (0, (0, 0))


def test_the_verdict_says_route_when_the_mixture_is_surely_ahead(seven):
    sentence = verdict(seven)
    assert re.match(r"Route: it keeps 98\.\d % .* more \(95 % interval \d+\.\d to \d+\.\d\) than ties, ", sentence)
    assert "the best of 6 merges" in sentence
    assert "routing adds 3.2 M parameters (rank 56) and 21.0 % of a prefill" in sentence
    assert sentence.endswith("ties adds 460.8 k parameters (rank 8).")


def test_the_verdict_says_merge_when_a_merge_is_surely_ahead(two):
    for cell in two["cells"]:
        cell["system"] = {"moa": "merge:svd", "merge:svd": "moa"}.get(cell["system"], cell["system"])
    sentence = verdict(two)
    assert sentence.startswith("Merge: svd, the only merge, keeps 100.0 % of what each task's own LoRA scores")
    assert re.search(r"50\.0 points more \(95 % interval \d+\.\d to \d+\.\d\) than routing", sentence)


def test_the_verdict_names_no_winner_when_the_interval_of_the_difference_includes_zero(two):
    for task in ("a", "b"):
        moa, svd = cell_of(two, "moa", task), cell_of(two, "merge:svd", task)
        svd["per_example"], svd["scores"] = moa["per_example"][::-1], moa["scores"]
    sentence = verdict(two)
    assert sentence.startswith("No clear winner: routing keeps 100.0 % and svd, the only merge, 100.0 %")
    assert re.search(
        r"a difference of [+-]0\.0 points whose 95 % interval \(-\d.* to \+\d.*\) includes zero", sentence
    )


@pytest.mark.parametrize(("kind", "word"), [("moa", "no mixture"), ("merge", "no merge")])
def test_there_is_no_verdict_without_both_sides(two, kind, word):
    two["systems"] = [system for system in two["systems"] if system["kind"] != kind]
    two["cells"] = [cell for cell in two["cells"] if not cell["system"].startswith(kind)]
    assert verdict(two) == f"No verdict: these results hold {word} to compare."


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_its_terminal_and_cuts_no_number(seven, width):
    text = printed(seven, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for name in ("base", "oracle", "moa", *MERGES, *TASKS):
        assert re.search(rf"^ *{name} ", text, re.MULTILINE)
    assert "% of own" in text


def test_a_wide_table_shows_likelihoods_a_narrow_one_scores_and_the_narrowest_the_headline(seven):
    base = f"{cell_of(seven, 'base', 'sst2')['scores']['accuracy']:.1f}"
    row = {width: re.search("^ *base .*$", printed(seven, width), re.MULTILINE)[0] for width in (120, 80, 50)}
    assert f"{base} 1.3" in row[120] and "–" in row[120]
    assert base in row[80] and f"{base} 1.3" not in row[80] and "±" in row[80]
    assert base not in row[50] and "±" in row[50]
    assert "A wider terminal" in printed(seven, 50) and "A wider terminal" not in printed(seven, 80)


def test_the_notes_name_the_base_model_that_answered_and_what_is_unusual(two, tmp_path):
    two["remarks"] = ["The mixture has no router."]
    page = write_html(two, tmp_path / "report.html").read_text()
    assert "Base model: a made-up model <b>, bfloat16, fingerprint 0123456789ab." in printed(two, 120)
    assert "bfloat16, fingerprint 0123456789ab." in page
    assert "The mixture has no router." in printed(two, 120) and "The mixture has no router." in page


def test_the_cards_scores_tell_the_scale_and_the_rows_they_were_measured_on(two):
    two["systems"][2]["note"], two["systems"][3]["note"] = "best expert", "scale 2 chosen on validation"
    assert card_scores(two) == pytest.approx(
        {
            "moa (best expert), share of the own LoRA's score, 60 rows a task": 1.0,
            "merge:svd (scale 2 chosen on validation), share of the own LoRA's score, 60 rows a task": 0.5,
        }
    )
    two["tasks"]["a"]["examples"]["each"] = 12
    assert all(name.endswith("12 to 60 rows a task") for name in card_scores(two))


def test_a_card_keeps_its_other_scores_and_drops_those_of_an_earlier_comparison():
    before = {"router accuracy on held-out prompts": 0.9, "merge:svd: share of the own LoRA's score": 0.6, "moa": 1.0}
    assert other_scores(before) == {"router accuracy on held-out prompts": 0.9}


def test_a_cell_that_is_missing_is_a_dash(two):
    row = re.search("^ *svd .*$", printed(without(two, "merge:svd", "b"), 120), re.MULTILINE)[0]
    assert row.split()[:5] == ["svd", "50.0", "0.50", "-", "-"]


def test_json_comes_back_as_it_was_and_leaves_nothing_beside_it(seven, tmp_path):
    path = write_json(seven, tmp_path / "new" / "results.json")
    assert json.loads(path.read_text()) == seven
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_score_that_json_cannot_hold_is_refused_and_the_old_file_stays(two, tmp_path):
    path = write_json(two, tmp_path / "results.json")
    before = path.read_text()
    two["cells"][0]["nll"] = float("nan")
    with pytest.raises(ValueError, match="a score is NaN or infinite"):
        write_json(two, path)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


class PageReader(HTMLParser):
    """Open tags that were never closed, every address, and every id."""

    VOID = {"meta", "link", "br", "img", "input", "hr"}

    def __init__(self):
        super().__init__()
        self.seen = SimpleNamespace(open=[], addresses=[], ids=[], text=[])

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.seen.open.append(tag)
        self.note(attributes)

    def handle_startendtag(self, tag, attributes):
        self.note(attributes)

    def handle_endtag(self, tag):
        assert self.seen.open.pop() == tag

    def handle_data(self, data):
        self.seen.text.append(data)

    def note(self, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.seen.addresses.append(value)
            if name == "id":
                self.seen.ids.append(value)


@pytest.fixture(scope="module")
def page(seven, tmp_path_factory):
    return write_html(seven, tmp_path_factory.mktemp("report") / "report.html").read_text()


def test_the_page_is_one_well_formed_file_that_asks_for_nothing_else(page):
    reader = PageReader()
    reader.feed(page)
    seen = reader.seen
    assert seen.open == [] and len(seen.ids) == len(set(seen.ids))
    outside = [address for address in seen.addresses if not address.startswith("data:")]
    assert {address[:1] for address in outside} == {"#"} and {a[1:] for a in outside} <= set(seen.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(seen.ids)
    assert not re.search(r"<script|<link|@import|url\((?!#)", page)


def test_the_page_holds_plots_tables_and_all_that_a_reader_must_know(page, seven):
    assert page.count("<svg") == 4 and "#010203" not in page and "currentColor" in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    for fact in (
        "seed 7",
        "torch 2.13.0",
        "peft 0.21.2",
        "made-up rows",
        "a made-up machine",
        "60 each, 24 for a LoRA of another task",
        "rouge as made up",
        "scale 0.43 chosen on validation",
        "99.3 % of 423 held-out prompts",
        "3.2 M parameters (rank 56)",
        "Expected calibration error 0.012, area under this curve 0.0004",
        "Of 100 prompts of tasks with a LoRA of their own 4.0 % fell back, 3.0 % to the merged adapter and 1.0 %",
        "of its 60 prompts 75.0 % fell back, 50.0 % to the merged adapter and 25.0 % to the base model",
        verdict(seven).replace("'", "&#39;"),
    ):
        assert fact in page


def test_the_page_escapes_what_it_is_given(page):
    assert "a made-up model &lt;b&gt;" in page and "made-up model <b>" not in page


def test_the_same_results_give_the_same_page(two, tmp_path):
    first, second = (write_html(two, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_page_without_loras_router_and_costs_leaves_their_sections_out(two, tmp_path):
    page = write_html(two, tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 and "Router" not in page and "What each costs" not in page
