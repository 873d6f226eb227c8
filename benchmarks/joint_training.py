"""Training adapters in one run beside training them one after another; ratios in one run.

    python benchmarks/joint_training.py
    python benchmarks/joint_training.py --tasks 3 --batch 4 --tokens 96 --steps 2 --rounds 1
    python benchmarks/joint_training.py --shape qwen2-1.5b --tasks 7 --batch 32 --tokens 512 --rounds 5 --json
    python benchmarks/joint_training.py --tokens 256 --padding_free

The model has the shapes of a real one and random weights, which cost the same time as trained ones. The last 16 tokens
of a row are its answer; tasks have rows of a quarter of --tokens to all of them, give or take --spread of that.
Each way takes the same rows in the same steps, in a process of its own, in random order:

    alone        TRL's trainer, one adapter after another
    joint        all adapters, as many rows in a forward as alone, sorted by length over all tasks
    joint, wide  all adapters, the whole step in one forward: for a GPU; a CPU computes too many logits for it

Seconds are those of the steps after the first, without loading the model, which alone is done once a task. On a GPU
they are the clock's, on a CPU the process's own, which other programs do not disturb. Memory is the peak above the
loaded model. `moved` says how far the adapters ended from those of `alone`, as a share of how far training moved B.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from joint_training_run import ANSWER, SEED, SHAPES, measure
from rich.console import Console
from rich.progress import track

WAYS = ("alone", "joint", "joint, wide")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--shape", choices=SHAPES, default="qwen2-0.5b", help="shapes of the model (default qwen2-0.5b)"
    )
    found.add_argument("--layers", type=int, help="layers of the model (default all on a GPU, 4 on a CPU)")
    found.add_argument("--tasks", type=int, default=4, help="adapters (default 4)")
    found.add_argument("--batch", type=int, default=8, help="rows a step of each task (default 8)")
    found.add_argument("--tokens", type=int, default=128, help="tokens of a row of the longest task (default 128)")
    found.add_argument("--spread", type=float, default=0.5, help="how far rows of one task differ (default 0.5)")
    found.add_argument(
        "--pad_to_multiple_of",
        type=int,
        default=0,
        help="tokens, such as 64 on a GPU, where kernels prepare themselves for each new length (default 0: none)",
    )
    found.add_argument(
        "--padding_free", action="store_true", help="rows one behind another in all ways, with the attention for it"
    )
    found.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    found.add_argument("--all_linear", action="store_true", help="adapt every linear layer, not attention alone")
    found.add_argument("--steps", type=int, default=4, help="steps measured a task, after one that is not (default 4)")
    found.add_argument("--rounds", type=int, default=3, help="times that each way runs (default 3)")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    found.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return found


def main() -> None:
    arguments = parser().parse_args()
    if min(arguments.tasks, arguments.batch, arguments.steps, arguments.rounds) < 1 or arguments.tokens < 4 * ANSWER:
        parser().error(f"counts start at 1, and --tokens at {4 * ANSWER}")
    if not 0 <= arguments.spread < 1:
        parser().error(f"--spread is a share from 0 to 1, got {arguments.spread}")
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    order = random.Random(SEED)
    runs = [way for _ in range(arguments.rounds) for way in order.sample(WAYS, len(WAYS))]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        words = [word for word in sys.argv[1:] if word != "--json"]
        for way in track(runs, description="training", console=Console(stderr=True)):
            command = [sys.executable, __file__, *words, "--way", way, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
        moved = {way: distance(Path(folder), arguments.tasks, way) for way in WAYS}
    report(arguments, found, moved)


def distance(folder: Path, tasks: int, way: str) -> float:
    from safetensors.torch import load_file

    far = moved = 0.0
    for task in range(tasks):
        one, other = (load_file(folder / w / f"task{task}" / "adapter_model.safetensors") for w in ("alone", way))
        far += sum((one[name] - other[name]).square().sum().item() for name in one)
        moved += sum(tensor.square().sum().item() for name, tensor in one.items() if "lora_B" in name)
    return (far / moved) ** 0.5


def report(arguments: argparse.Namespace, found: dict[str, list[dict[str, Any]]], moved: dict[str, float]) -> None:
    table = {
        way: {
            "tokens_per_second": statistics.median(run["tokens"] / run["seconds"] for run in runs),
            "ratio": statistics.median(
                alone["seconds"] / run["seconds"] for alone, run in zip(found["alone"], runs, strict=True)
            ),
            "megabytes": statistics.median(run["megabytes"] for run in runs),
            "moved": moved[way],
        }
        for way, runs in found.items()
    }
    run = found["alone"][0]
    if arguments.json:
        asked = {name: value for name, value in vars(arguments).items() if name not in ("way", "folder", "json")}
        found_out = {name: run[name] for name in ("device", "torch", "attention")}
        print(json.dumps({"settings": {**asked, "layers": run["layers"]}, **found_out, "ways": table}))
        return
    print(f"{run['device']}, torch {run['torch']}, attention {run['attention']}; {arguments.shape},")
    print(f"{run['layers']} layers, {arguments.tasks} tasks, rank {arguments.rank}, {arguments.batch} rows a task and")
    print(f"step, the longest about {arguments.tokens} tokens{', without padding' * arguments.padding_free}")
    print(f"{'':12} tokens/s   times alone   peak MB   moved")
    for way, row in table.items():
        speed = f"{row['tokens_per_second']:8.0f} {row['ratio']:13.2f}"
        print(f"{way:12} {speed} {row['megabytes']:9.0f} {row['moved']:9.1e}")


if __name__ == "__main__":
    main()
