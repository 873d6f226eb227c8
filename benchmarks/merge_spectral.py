"""Spectral and clustered merges from disk to disk: seconds, memory, error to float64 references; beside PEFT's svd.

    python benchmarks/merge_spectral.py                                  # 7 rank-8 adapters, Qwen2-1.5B's shapes
    python benchmarks/merge_spectral.py --shape llama3-8b --methods svd knots tsv
    python benchmarks/merge_spectral.py --layers 2 --peft_modules 1      # a small one
    python benchmarks/merge_spectral.py --exponents                      # how time grows with layers and ranks

The adapters are random, which is the hardest case: no direction is stronger than another. Every method runs in a
process of its own over all linear layers: seconds from the call to the written folder, and peak memory above the
interpreter with torch loaded. The result is compared, for the narrowest layers, with a dense float64 version of
the paper's formulas, brought to the same rank. PEFT's
`add_weighted_adapter(combination_type="svd")` decomposes dense matrices, so it is timed on a few layers and scaled
to all by o n min(o, n).
"""

import argparse
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    kv: int
    layers: int
    adapters: int
    rank: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        h, m, kv = self.hidden, self.intermediate, self.kv
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        mlp = {"gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}
        return {
            **{f"self_attn.{name}": size for name, size in attention.items()},
            **{f"mlp.{name}": size for name, size in mlp.items()},
        }


SHAPES = {
    "qwen2-1.5b": Shape(1536, 8960, 256, layers=28, adapters=7, rank=8),
    "llama3-8b": Shape(4096, 14336, 1024, layers=32, adapters=8, rank=16),
}
METHODS = ["svd", "knots", "core_space", "tsv", "iso_c", "iso_cts", "ctm", "wudi", "pico", "lego", "lego_gauge_safe"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-1.5b")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the model's)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--rank",
        default="adapters",
        help="of the result: a number, full, method (each method's own), or adapters (default: as one adapter has)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="processes for each method; the median is shown")
    parser.add_argument("--references", type=int, default=1, help="layers compared with a reference (default: 1)")
    parser.add_argument("--peft_modules", type=int, default=2, help="layers that PEFT merges (default: 2)")
    parser.add_argument("--exponents", action="store_true", help="only fit how time grows with layers and with ranks")
    parser.add_argument("--ours", nargs=2, metavar=("FOLDER", "METHOD"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    shape = SHAPES[asked.shape]
    shape = shape._replace(layers=asked.layers or shape.layers)
    if asked.ours:
        return measure_ours(Path(asked.ours[0]), asked.ours[1], rank_of(asked.rank, shape))
    print(
        f"{shape.adapters} adapters of rank {shape.rank}, {asked.shape} shapes, {shape.layers} layers with "
        f"{len(shape.matrices())} matrices each, rank of the result: {asked.rank}, "
        f"{asked.threads} threads, torch {torch.__version__}"
    )
    if asked.exponents:
        return print_exponents(shape, asked)
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), shape)
        print(f"one adapter: {(Path(folder) / 'adapter0/adapter_model.safetensors').stat().st_size / 2**20:.0f} MB")
        print(f"{'method':<12}{'seconds':>9}{'MB':>8}{'rank':>6}{'error':>10}")
        for method in asked.methods:
            run = ours(Path(folder), method, asked)
            error, rank = compare(Path(folder), method, shape, asked.references)
            print(f"{method:<12}{run['seconds']:>9.2f}{run['megabytes']:>8.0f}{rank:>6}{error:>10.1e}", flush=True)
        if asked.peft_modules:
            seconds = measure_peft(Path(folder), shape, asked.peft_modules)
            print(f"{'PEFT svd':<12}{seconds:>9.0f}   {asked.peft_modules} layers measured, scaled by o n min(o, n)")


def rank_of(asked: str, shape: Shape) -> int | str | None:
    known = {"adapters": shape.rank, "method": None, "full": "full"}
    return known[asked] if asked in known else int(asked)


def module_names(shape: Shape) -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape.layers)
        for name, size in shape.matrices().items()
    }


def write_adapters(folder: Path, shape: Shape) -> None:
    import torch

    from moa.adapters import write_adapter
    from moa.low_rank import LowRank

    generator = torch.Generator().manual_seed(0)
    for i in range(shape.adapters):
        modules = {
            name: LowRank(
                torch.randn(o, shape.rank, generator=generator) / math.sqrt(o),
                torch.randn(shape.rank, n, generator=generator) / math.sqrt(n),
            )
            for name, (o, n) in module_names(shape).items()
        }
        write_adapter(folder / f"adapter{i}", modules, base_model="random", dtype=torch.float32)


def ours(folder: Path, method: str, asked: argparse.Namespace) -> dict[str, float]:
    """Medians of what processes of their own measure."""
    command = [sys.executable, __file__, "--ours", str(folder), method]
    command += ["--shape", asked.shape, "--rank", asked.rank, "--threads", str(asked.threads)]
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(asked.repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def measure_ours(folder: Path, method: str, rank: int | str | None) -> None:
    from moa.merging import merge

    def peak() -> float:  # not ru_maxrss, which a process inherits from the one that started it
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024

    shutil.rmtree(folder / "merged", ignore_errors=True)
    sources = sorted(folder.glob("adapter*"))
    before, start = peak(), time.perf_counter()
    merge(sources, method, rank=rank, output=folder / "merged")
    print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": peak() - before}))


def compare(folder: Path, method: str, shape: Shape, count: int) -> tuple[float, int]:
    """Largest relative error to the dense reference over the first narrowest layers, and the rank of the result."""
    import torch
    from dense_spectral import REFERENCES, cut

    from moa.adapters import read_adapter

    narrowest = sorted(module_names(shape).items(), key=lambda item: item[1][0] * item[1][1])[:count]
    sources = [read_adapter(folder / f"adapter{i}", dtype=torch.float64) for i in range(shape.adapters)]
    merged = read_adapter(folder / "merged", dtype=torch.float64)
    errors, rank = [0.0], merged.shapes[next(iter(merged.shapes))].r
    if method not in REFERENCES:  # k-means has no closed form
        return math.nan, rank
    for name, _ in narrowest:
        got = merged.modules[name]
        deltas = torch.stack([source.modules[name].delta() / shape.adapters for source in sources])
        expected = cut(REFERENCES[method](deltas, got.rank), got.rank)
        errors.append(float((got.delta() - expected).norm() / expected.norm()))
    return max(errors), rank


def measure_peft(folder: Path, shape: Shape, count: int) -> float:
    """Seconds that PEFT's svd needs for all layers, from `count` of them."""
    import torch
    from peft import LoraConfig, get_peft_model

    from moa.adapters import add_to_model, read_adapter

    sizes = module_names(shape)
    names = sorted(sizes, key=lambda name: math.prod(sizes[name]))[:count]
    model = torch.nn.Module()
    for name in names:
        o, n = sizes[name]
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rsplit(".", 1)[1], torch.nn.Linear(n, o, bias=False))
    model = get_peft_model(model, LoraConfig(r=shape.rank, target_modules=names), adapter_name="unused")
    chosen = [f"adapter{i}" for i in range(shape.adapters)]
    for name in chosen:
        modules = read_adapter(folder / name).modules
        add_to_model(model, name, {module: modules[module] for module in names})
    start = time.perf_counter()
    weights = [1 / shape.adapters] * shape.adapters
    model.add_weighted_adapter(chosen, weights, "merged", combination_type="svd", svd_rank=shape.rank)
    work = {name: o * n * min(o, n) for name, (o, n) in sizes.items()}  # of one dense SVD
    return (time.perf_counter() - start) * sum(work.values()) / sum(work[name] for name in names)


def print_exponents(shape: Shape, asked: argparse.Namespace) -> None:
    """The slopes of log time against log layers, and against log R at one layer's sizes."""
    layers = [shape._replace(layers=count) for count in (1, 2, 4, 8)]
    ranks = [shape._replace(layers=2, rank=rank) for rank in (4, 8, 16, 32)]
    print(f"{'method':<12}{'with layers ' + str([s.layers for s in layers]):>28}"
          f"{'with R ' + str([s.rank * s.adapters for s in ranks]):>32}")  # fmt: skip
    measured = {method: ([], []) for method in asked.methods}
    for column, sizes in enumerate((layers, ranks)):
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                write_adapters(Path(folder), size)
                for method in asked.methods:
                    measured[method][column].append(ours(Path(folder), method, asked)["seconds"])
    for method, (by_layers, by_rank) in measured.items():
        linear = slope([s.layers for s in layers], by_layers)
        quadratic = slope([s.rank * s.adapters for s in ranks], by_rank)
        print(f"{method:<12}{linear:>28.2f}{quadratic:>32.2f}", flush=True)


def slope(sizes: list[int], seconds: list[float]) -> float:
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(s) for s in seconds]).slope


if __name__ == "__main__":
    main()
