"""What attention costs a mixture, in a training step and in a forward over prompts; ratios in one run.

    python benchmarks/attention.py
    python benchmarks/attention.py --layers 24 --batch 16 --tokens 2048 --rounds 10       # on a GPU
    python benchmarks/attention.py --attn_implementation sdpa torch_varlen flash_attention_4

Sequences of a quarter of --tokens to all of them, one adapter each, in a padded batch and behind one another in one
packed row, routed sequence by sequence. A step is forward and backward, with gradients of all adapters; the layers
have the shapes of a real model and random weights. What cannot run here says why. All losses are of the same rows:
they agree but for rounding.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from routing_models import SHAPES, VOCABULARY, Bench
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moa import MoaModel
from moa.attention import SDPA, TORCH_VARLEN, attention_of, set_attention

IMPLEMENTATIONS = ("eager", SDPA, TORCH_VARLEN, "flash_attention_2", "flash_attention_3", "flash_attention_4")
LAYOUTS = ("padded", "packed")
FIRST = ("padded", SDPA)
"""What the others are compared with."""


class Run(NamedTuple):
    train: float
    forward: float
    megabytes: float
    loss: float


def rows(asked: argparse.Namespace) -> list[list[int]]:
    draw = random.Random(asked.seed)
    lengths = [draw.randint(asked.tokens // 4, asked.tokens) for _ in range(asked.batch)]
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def batch_of(sequences: list[list[int]], layout: str, device: str) -> dict[str, Tensor | int]:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=layout == "packed")
    batch = collate([{"input_ids": row} for row in sequences])
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def once(model: MoaModel, batch: dict, owners: list[str], *, train: bool) -> tuple[float, float]:
    """Seconds and the loss."""
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with model.pinned(owners), torch.set_grad_enabled(train):
        loss = model(**batch, use_cache=False).loss
        if train:
            loss.backward()
    wait()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds, float(loss.detach())


def measure(model: MoaModel, asked: argparse.Namespace, layout: str, owners: list[str]) -> Run:
    batch, cuda = batch_of(rows(asked), layout, str(model.device)), model.device.type == "cuda"
    once(model, batch, owners, train=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    train, losses = zip(*(once(model, batch, owners, train=True) for _ in range(asked.rounds)), strict=True)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    forward = [once(model, batch, owners, train=False)[0] for _ in range(asked.rounds)]
    return Run(statistics.median(train), statistics.median(forward), peak / 2**20, losses[-1])


def run_all(asked: argparse.Namespace) -> tuple[dict[tuple[str, str], Run], dict[str, list[str]]]:
    """The ways that run, and why the others do not."""
    found, refused = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(asked, asked.adapters, Path(folder))
        model = MoaModel.from_adapters(bench.base(), bench.paths, check_base=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        ways = [FIRST, *((layout, name) for name in asked.attn_implementation for layout in LAYOUTS)]
        for layout, name in track(list(dict.fromkeys(ways)), console=Console(stderr=True), description="attention"):
            try:
                set_attention(model.get_base_model(), name, packing=layout == "packed")
                assert attention_of(model.get_base_model()) == name
                found[layout, name] = measure(model, asked, layout, bench.rows)
            except Exception as error:  # kernels raise what they like; a way that fails is a finding
                if (layout, name) == FIRST:
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                refused.setdefault(reason, []).append(f"{layout} {name}")
                model.zero_grad(set_to_none=True)
    return found, refused


def show(found: dict[tuple[str, str], Run], refused: dict[str, list[str]], asked: argparse.Namespace) -> None:
    tokens, first = sum(map(len, rows(asked))), found[FIRST]
    console = Console(width=110)
    model, adapters = f"{asked.shape}, {asked.layers} layers", f"{asked.adapters} adapters of rank {asked.rank}"
    table = Table(title=f"{asked.batch} sequences, {tokens} tokens; {model}, {adapters}")
    for column in ("rows", "attention", "training tokens/s", "ratio", "forward tokens/s", "ratio", "peak MB", "loss"):
        table.add_column(column, justify="left" if column in ("rows", "attention") else "right")
    for (layout, name), run in found.items():
        speeds = (
            text
            for seconds, other in ((run.train, first.train), (run.forward, first.forward))
            for text in (f"{tokens / seconds:.0f}", f"{other / seconds:.2f}")
        )
        table.add_row(layout, name, *speeds, f"{run.megabytes:.0f}" if run.megabytes else "-", f"{run.loss:.4f}")
    console.print(table)
    for reason, ways in refused.items():
        console.print(f"{', '.join(ways)}: {reason}", highlight=False)


def asked_for() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("--attn_implementation", nargs="+", default=list(IMPLEMENTATIONS), help="default all")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b", help="layer shapes (default qwen2-0.5b)")
    parser.add_argument("--layers", default=2, help="layers of the model (default 2)", **whole)
    parser.add_argument("--adapters", default=7, help="adapters (default 7)", **whole)
    parser.add_argument("--rank", default=8, help="rank of each (default 8)", **whole)
    parser.add_argument("--all_linear", action="store_true", help="adapt every linear layer, not attention alone")
    parser.add_argument("--batch", default=8, help="sequences (default 8)", **whole)
    parser.add_argument("--tokens", default=128, help="tokens of the longest sequence (default 128)", **whole)
    parser.add_argument("--rounds", default=3, help="times that each way runs (default 3)", **whole)
    parser.add_argument("--seed", default=0, help="of lengths and tokens", **whole)
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    if min(asked.layers, asked.adapters, asked.rank, asked.batch, asked.rounds) < 1 or asked.tokens < 16:
        parser.error("counts start at 1, and --tokens at 16")
    asked.device = asked.dtype = asked.first_layer = None
    return asked


def main() -> None:
    asked = asked_for()
    found, refused = run_all(asked)
    if asked.json:
        ways = {f"{layout}, {name}": run._asdict() for (layout, name), run in found.items()}
        print(json.dumps({"settings": vars(asked), "ways": ways, "not_run": refused}))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {asked.shape}, {asked.layers} layers"
    )
    show(found, refused, asked)


if __name__ == "__main__":
    main()
