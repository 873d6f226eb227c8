"""SVD merge of 7 rank-8 adapters with Qwen2-1.5B's attention shapes, from disk to disk, beside PEFT's.

    python benchmarks/merge_svd.py
    python benchmarks/merge_svd.py --peft_modules 8 --threads 2

Ours runs all 112 layers in a process of its own: seconds from the call to the written folder, and peak memory
above the interpreter with torch loaded. PEFT's `add_weighted_adapter(combination_type="svd")` decomposes the
dense matrix of every layer, so it is timed on a few layers of the same shapes and scaled to all of them; both
results are compared on those layers.
"""

import argparse
import json
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, RANK, ADAPTERS = 28, 8, 7
SHAPES = {"q_proj": (1536, 1536), "k_proj": (256, 1536), "v_proj": (256, 1536), "o_proj": (1536, 1536)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft_modules", type=int, default=4, help="layers that PEFT merges (default: 4)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="processes that run ours; the median is shown")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    if asked.ours:
        return measure_ours(asked.ours)
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder))
        command = [sys.executable, __file__, "--ours", folder, "--threads", str(asked.threads)]
        runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(asked.repeats)]
        ours = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        theirs = measure_peft(Path(folder), asked.peft_modules)
    modules = LAYERS * len(SHAPES)
    scaled = theirs["seconds"]
    print(f"{ADAPTERS} adapters of rank {RANK}, {modules} layers, {asked.threads} threads, torch {torch.__version__}")
    print(f"ours   {ours['seconds']:8.2f} s   {ours['megabytes']:.0f} MB above the interpreter with torch loaded")
    print(f"PEFT   {scaled:8.1f} s   {asked.peft_modules} layers measured, scaled to {modules} by their shapes")
    print(f"ratio  {scaled / ours['seconds']:8.0f}     largest relative difference {theirs['difference']:.1e}")


def layer_name(index: int, projection: str) -> str:
    return f"model.layers.{index}.self_attn.{projection}"


def write_adapters(folder: Path) -> None:
    import torch

    from moa.adapters import write_adapter
    from moa.low_rank import LowRank

    generator = torch.Generator().manual_seed(0)
    for i in range(ADAPTERS):
        modules = {
            layer_name(layer, projection): LowRank(
                torch.randn(o, RANK, generator=generator) / math.sqrt(o),
                torch.randn(RANK, n, generator=generator) / math.sqrt(n),
            )
            for layer in range(LAYERS)
            for projection, (o, n) in SHAPES.items()
        }
        write_adapter(folder / f"adapter{i}", modules, base_model="qwen2-1.5b-shapes", dtype=torch.float32)


def measure_ours(folder: Path) -> None:
    from moa.merging import merge

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    shutil.rmtree(folder / "merged", ignore_errors=True)
    before, start = peak(), time.perf_counter()
    merge([folder / f"adapter{i}" for i in range(ADAPTERS)], "svd", output=folder / "merged")
    print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": peak() - before}))


def measure_peft(folder: Path, count: int) -> dict[str, float]:
    """Seconds that PEFT needs for all layers, from `count` of them, and how far its result is from ours."""
    import torch
    from peft import LoraConfig, get_peft_model

    from moa.adapters import add_to_model, from_model, read_adapter

    names = [layer_name(layer, projection) for layer in range(LAYERS) for projection in SHAPES][:count]
    model = torch.nn.Module()
    for name in names:
        o, n = SHAPES[name.rsplit(".", 1)[1]]
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rsplit(".", 1)[1], torch.nn.Linear(n, o, bias=False))
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=names), adapter_name="unused")
    chosen = [f"adapter{i}" for i in range(ADAPTERS)]
    for name in chosen:
        modules = read_adapter(folder / name).modules
        add_to_model(model, name, {module: modules[module] for module in names})
    start = time.perf_counter()
    model.add_weighted_adapter(chosen, [1 / ADAPTERS] * ADAPTERS, "merged", combination_type="svd", svd_rank=RANK)
    seconds = time.perf_counter() - start
    theirs, ours = from_model(model, "merged").modules, read_adapter(folder / "merged").modules
    difference = max(
        float((ours[name].delta() - theirs[name].delta()).norm() / theirs[name].delta().norm()) for name in names
    )
    work = {p: o * n * min(o, n) for p, (o, n) in SHAPES.items()}  # of one dense SVD
    share = sum(work[name.rsplit(".", 1)[1]] for name in names) / (LAYERS * sum(work.values()))
    return {"seconds": seconds / share, "difference": difference}


if __name__ == "__main__":
    main()
