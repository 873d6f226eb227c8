"""What --dtype auto saves on a CPU without bfloat16 instructions: the bundled model in float32 beside bfloat16.

    python benchmarks/precision.py
    python benchmarks/precision.py --model Qwen/Qwen2-0.5B --batch 16 --tokens 128 --threads 8

CPU time of one prefill and of one decode step from its cache, median of the rounds; the two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from moa.base_model import load_base_model
from moa.precision import computes_slowly

NAMES = ("float32", "bfloat16")
STEPS = 4


def seconds(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Of a prefill, and of a decode step."""
    start = time.process_time()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill, start = time.process_time() - start, time.process_time()
    for _ in range(STEPS):
        model(input_ids=ids[:, -1:], past_key_values=out.past_key_values)
    return prefill, (time.process_time() - start) / STEPS


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default 4)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a prompt (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    models = {name: load_base_model(asked.model, dtype=name) for name in NAMES}
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for _ in range(asked.rounds):
        for name, model in models.items():
            ids = torch.randint(model.config.vocab_size, (asked.batch, asked.tokens), generator=generator)
            found[name].append(seconds(model, ids))
    medians = {name: [statistics.median(phase) for phase in zip(*times, strict=True)] for name, times in found.items()}
    slow = "has no" if computes_slowly(torch.bfloat16) else "has"
    table = Table(title=f"CPU seconds on a CPU that {slow} bfloat16 instructions", title_justify="left")
    for heading in ("", "prefill", "decode step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, times in medians.items():
        table.add_row(name, *(f"{time:.3f}" for time in times))
    ratios = (slower / faster for slower, faster in zip(medians["bfloat16"], medians["float32"], strict=True))
    table.add_row("bfloat16 / float32", *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
