"""Element-wise merges of 7 rank-8 adapters with Qwen2-1.5B's shapes, from disk to disk, beside PEFT and mergekit.

    python benchmarks/merge_elementwise.py
    python benchmarks/merge_elementwise.py --layers 2 --modules q_proj k_proj --methods ties --threads 1

Ours merges every linear layer in a process of its own: seconds from the call to the written folder, peak memory
above the interpreter with torch loaded, and the share of the energy that the rank of the result keeps. TIES is
run with thresholds over the whole model. PEFT's `*_svd` forms and decomposes the dense matrix of every layer
(here with its faster `svd_full_matrices=False`), and mergekit's functions act on dense matrices and leave them
dense. Both are timed on a few layers and scaled to all: mergekit by entries, PEFT by the work o n min(o, n) of
its SVDs. Neither is charged for reading or writing, nor mergekit for full models, which it needs.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

RANK, ADAPTERS, DENSITY = 8, 7, 0.5
SHAPES = {
    "q_proj": (1536, 1536),
    "k_proj": (256, 1536),
    "v_proj": (256, 1536),
    "o_proj": (1536, 1536),
    "gate_proj": (8960, 1536),
    "up_proj": (8960, 1536),
    "down_proj": (1536, 8960),
}
OPTIONS = {method: {"scope": "model"} for method in ("magnitude", "ties", "breadcrumbs")}
PEFT = {"ties": "ties_svd", "dare_linear": "dare_linear_svd", "dare_ties": "dare_ties_svd"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["ties", "dare_linear", "dare_ties", "della"])
    parser.add_argument("--layers", type=int, default=28, help="blocks of the transformer (default: 28)")
    parser.add_argument("--modules", nargs="+", default=list(SHAPES), choices=SHAPES, help="default: all")
    parser.add_argument("--peer_modules", nargs="*", default=["k_proj", "q_proj"], choices=SHAPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    if asked.ours:
        return measure_ours(asked.ours, asked.methods[0])
    names = [layer_name(layer, module) for layer in range(asked.layers) for module in asked.modules]
    entries = sum(math.prod(shape_of(name)) for name in names)
    size = f"{len(names)} layers, {entries / 1e9:.2f}e9 entries"
    print(f"{ADAPTERS} adapters of rank {RANK}, {size}, {asked.threads} threads, torch {torch.__version__}")
    print(f"peers measured on {', '.join(asked.peer_modules)} of one block and scaled")
    print(f"{'method':12} {'seconds':>8} {'MB':>6} {'energy kept':>12} {'PEFT s':>9} {'mergekit s':>11}")
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), names)
        for method in asked.methods:
            command = [sys.executable, __file__, "--ours", folder, "--methods", method]
            ours = json.loads(subprocess.check_output([*command, "--threads", str(asked.threads)], text=True))
            peers = [layer_name(0, module) for module in asked.peer_modules]
            theirs = [scaled(measure(Path(folder), method, peers), peers, names, work) for measure, work in PEERS]
            shown = " ".join(
                f"{s:{width}.0f}" if s else f"{'-':>{width}}" for s, width in zip(theirs, (9, 11), strict=True)
            )
            print(
                f"{method:12} {ours['seconds']:8.1f} {ours['megabytes']:6.0f} {ours['kept']:12.1%} {shown}", flush=True
            )


def layer_name(index: int, module: str) -> str:
    return f"model.layers.{index}.{'mlp' if module.split('_')[0] in ('gate', 'up', 'down') else 'self_attn'}.{module}"


def shape_of(name: str) -> tuple[int, int]:
    return SHAPES[name.rsplit(".", 1)[1]]


def write_adapters(folder: Path, names: list[str]) -> None:
    import torch

    from moa.adapters import write_adapter
    from moa.low_rank import LowRank

    generator = torch.Generator().manual_seed(0)
    for i in range(ADAPTERS):
        modules = {}
        for name in names:
            o, n = shape_of(name)
            B, A = torch.randn(o, RANK, generator=generator), torch.randn(RANK, n, generator=generator)
            modules[name] = LowRank(B / math.sqrt(o), A / math.sqrt(n))
        write_adapter(folder / f"adapter{i}", modules, base_model="qwen2-1.5b-shapes", dtype=torch.float32)


def measure_ours(folder: Path, method: str) -> None:
    from moa.merging import merge

    shutil.rmtree(folder / "merged", ignore_errors=True)
    sources = [folder / f"adapter{i}" for i in range(ADAPTERS)]
    before, start = peak(), time.perf_counter()
    result = merge(sources, method, output=folder / "merged", **OPTIONS.get(method, {}))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": peak() - before, "kept": 1 - result.report.energy_dropped}))


def peak() -> float:
    """Megabytes that this process held at most; rusage's number would include the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure_mergekit(folder: Path, method: str, names: list[str]) -> float | None:
    """Seconds for mergekit's functions on the dense updates of these layers."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    l1 = RescaleNorm.l1
    known: dict[str, tuple[SparsificationMethod, dict, bool]] = {
        "ties": (SparsificationMethod.magnitude, {"density": 0.2}, True),
        "dare_linear": (SparsificationMethod.random, {"density": DENSITY, "rescale_norm": l1}, False),
        "dare_ties": (SparsificationMethod.random, {"density": DENSITY, "rescale_norm": l1}, True),
        "della": (SparsificationMethod.della_magprune, {"density": DENSITY, "epsilon": 0.1, "rescale_norm": l1}, True),
        "breadcrumbs": (SparsificationMethod.magnitude_outliers, {"density": 0.9, "gamma": 0.01}, False),
    }
    if method not in known:
        return None
    how, options, elects = known[method]
    import torch

    sources = read_sources(folder)
    start = time.perf_counter()
    for name in names:
        kept = [sparsify(source[name].delta() / ADAPTERS, method=how, **options) for source in sources]
        deltas = torch.stack(kept)
        (deltas * get_mask(deltas, "sum")).sum(0) if elects else deltas.sum(0)
    return time.perf_counter() - start


def measure_peft(folder: Path, method: str, names: list[str]) -> float | None:
    """Seconds for PEFT's merge of these layers."""
    if method not in PEFT:
        return None
    import torch
    from peft import LoraConfig, get_peft_model

    from moa.adapters import add_to_model

    model = torch.nn.Module()
    for name in names:
        *parts, last = name.split(".")
        parent = model
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        o, n = shape_of(name)
        parent.add_module(last, torch.nn.Linear(n, o, bias=False))
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=names), adapter_name="unused")
    chosen = [f"adapter{i}" for i in range(ADAPTERS)]
    for adapter, modules in zip(chosen, read_sources(folder), strict=True):
        add_to_model(model, adapter, {name: modules[name] for name in names})
    options = {"svd_rank": RANK, "svd_full_matrices": False, "density": 0.2 if method == "ties" else DENSITY}
    start = time.perf_counter()
    model.add_weighted_adapter(chosen, [1 / ADAPTERS] * ADAPTERS, "merged", combination_type=PEFT[method], **options)
    return time.perf_counter() - start


def read_sources(folder: Path) -> list:
    from moa.adapters import read_adapter

    return [read_adapter(folder / f"adapter{i}").modules for i in range(ADAPTERS)]


def scaled(
    seconds: float | None, measured: list[str], names: list[str], work: Callable[[int, int], int]
) -> float | None:
    """Seconds for all layers from those for a few."""
    if seconds is None or not measured:
        return None
    return seconds * sum(work(*shape_of(name)) for name in names) / sum(work(*shape_of(name)) for name in measured)


PEERS = [(measure_peft, lambda o, n: o * n * min(o, n)), (measure_mergekit, lambda o, n: o * n)]


if __name__ == "__main__":
    main()
