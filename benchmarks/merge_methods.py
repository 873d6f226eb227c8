"""Every merge method from disk to disk: seconds, memory, error to float64 references; beside PEFT and mergekit.

    python benchmarks/merge_methods.py                                    # 7 rank-8 adapters, Qwen2-1.5B's shapes
    python benchmarks/merge_methods.py --methods ties dare_linear della --rank method --scope model
    python benchmarks/merge_methods.py --shape llama3-8b --methods svd knots tsv --peers 1
    python benchmarks/merge_methods.py --layers 2 --methods svd ties      # a small one
    python benchmarks/merge_methods.py --exponents --methods svd knots    # how time grows with layers and ranks

All linear layers, random adapters. Every method runs in a process of its own: seconds from the call to the written
folder, and peak memory above the interpreter with torch loaded. `kept` is the share of the energy that fitting into
the rank has kept. `error` is the largest relative error, on the narrowest layers, to a dense float64 version of the
paper's formulas (see `merge_references`); - for what no formula determines: random drops, k-means, trees, and weights
that are looked for. Methods that search or learn weights are given a judge that costs nothing, those that need
statistics made-up ones of two data sets; slerp merges two adapters. PEFT and mergekit are timed on the narrowest
layers and scaled to all (see `merge_peers`).
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from merge_inputs import SHAPES, Shape, write_adapters, write_data_sets
from merge_peers import peer_seconds
from merge_references import compare
from merge_run import measured
from rich.console import Console
from rich.progress import track

from moa.merging import methods
from moa.merging.registry import find_method

COLUMNS = {
    "method": "<16",
    "seconds": ">9.2f",
    "megabytes": ">10.0f",
    "rank": ">5.0f",
    "kept": ">7.1%",
    "error": ">9.1e",
    "peft": ">8.0f",
    "mergekit": ">9.0f",
}


def main() -> None:
    asked = parsed()
    torch.set_num_threads(asked.threads)
    shape = SHAPES[asked.shape]
    shape = shape._replace(layers=asked.layers or shape.layers)
    print(
        f"{shape.adapters} adapters of rank {shape.rank}, {asked.shape} shapes, {shape.layers} layers with "
        f"{len(shape.matrices())} matrices each, rank of the result: {asked.rank}, scope of a trim: {asked.scope}, "
        f"{asked.threads} threads, torch {torch.__version__}"
    )
    rows = growth(shape, asked) if asked.exponents else table(shape, asked)
    if asked.json:
        about = {"shape": {"name": asked.shape, **shape._asdict()}, "rank": asked.rank, "scope": asked.scope}
        about |= {"threads": asked.threads, "torch": torch.__version__}
        asked.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-1.5b")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()), metavar="METHOD")
    parser.add_argument(
        "--rank",
        default="adapters",
        help="of the result: a number, full, method (each method's own), or adapters (default: as one adapter has)",
    )
    parser.add_argument("--scope", choices=["module", "model"], default="module", help="for methods that have one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="processes for each method; the median is shown")
    parser.add_argument("--references", type=int, default=1, help="layers compared with a reference (default: 1)")
    parser.add_argument("--peers", type=int, default=2, help="layers that PEFT and mergekit merge (default: 2)")
    parser.add_argument("--exponents", action="store_true", help="only fit how time grows with layers and with ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args()


def table(shape: Shape, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print one row for each method."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, shape, asked.methods)
        size = next(folder.glob("*/adapter_model.safetensors")).stat().st_size
        print(f"one adapter: {size / 2**20:.0f} MB; peers measured on {asked.peers} layers and scaled")
        print("".join(f"{title:{width.split('.')[0]}}" for title, width in COLUMNS.items()), flush=True)
        for method in progress(asked.methods, "merging"):
            row = {"method": method, **run(folder, method, shape, asked)}
            row["error"] = compare(folder, method, shape, asked.references) if asked.references else None
            row |= peer_seconds(folder, method, shape, asked.peers)
            print("".join(shown(row[column], width) for column, width in COLUMNS.items()), flush=True)
            rows.append(row)
    return rows


def growth(shape: Shape, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the slopes of log time against log layers, and against log R at one layer's sizes."""
    by_layers = [shape._replace(layers=count) for count in (1, 2, 4, 8)]
    by_rank = [shape._replace(layers=2, rank=rank) for rank in (4, 8, 16, 32)]
    seconds: dict[tuple[str, Shape], float] = {}
    for size in progress([*by_layers, *by_rank], "merging"):
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name), size, asked.methods)
            for method in asked.methods:
                seconds[method, size] = run(Path(name), method, size, asked)["seconds"]
    layers, ranks = [size.layers for size in by_layers], [size.rank * size.adapters for size in by_rank]
    titles = f"with layers {layers}", f"with R {ranks}"
    print(f"{'method':16}{titles[0]:>28}{titles[1]:>32}")
    rows = []
    for method in asked.methods:
        linear = slope(layers, [seconds[method, size] for size in by_layers])
        quadratic = slope(ranks, [seconds[method, size] for size in by_rank])
        print(f"{method:16}{linear:>28.2f}{quadratic:>32.2f}")
        rows.append({"method": method, "with_layers": linear, "with_R": quadratic})
    return rows


def prepare(folder: Path, shape: Shape, asked: Sequence[str]) -> None:
    write_adapters(folder, shape, progress)
    if any("statistics" in find_method(method).needs for method in asked):
        write_data_sets(folder, shape)


def run(folder: Path, method: str, shape: Shape, asked: argparse.Namespace) -> dict[str, float]:
    rank = {"adapters": shape.rank, "method": None}.get(asked.rank, asked.rank)
    return measured(folder, method, rank=rank, scope=asked.scope, threads=asked.threads, repeats=asked.repeats)


def progress(things: Sequence, description: str) -> Iterable:
    return track(things, description, console=Console(stderr=True), transient=True)


def shown(value: float | str | None, width: str) -> str:
    return f"{'-':{width.split('.')[0]}}" if value is None else f"{value:{width}}"


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(s) for s in seconds]).slope


if __name__ == "__main__":
    main()
