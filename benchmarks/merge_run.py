"""One merge in a process of its own, as the merge benchmarks time it: seconds and peak memory, printed as JSON.

    python benchmarks/merge_run.py FOLDER METHOD --rank 8 --threads 2

Seconds go from the call to the written folder; megabytes are the peak above the interpreter with torch loaded.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from merge_inputs import RandomObjective, adapter_folders, statistics_files

from moa.adapters import read_adapter
from moa.merging import merge
from moa.merging.registry import MergeMethod, find_method

MERGED = "merged"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("method")
    parser.add_argument("--rank")
    parser.add_argument("--scope", default="module")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shutil.rmtree(asked.folder / MERGED, ignore_errors=True)
    method = find_method(asked.method)
    sources, given = inputs(asked.folder, method, asked.scope)
    rank = int(asked.rank) if asked.rank and asked.rank.isdigit() else asked.rank
    before, start = peak(), time.perf_counter()
    result = merge(sources, method.name, rank=rank, output=asked.folder / MERGED, **given)
    seconds = time.perf_counter() - start
    kept = 1 - result.report.energy_dropped
    ranks = [update.rank for update in result.modules.values()]
    print(json.dumps({"seconds": seconds, "megabytes": peak() - before, "kept": kept, "rank": max(ranks)}))


def inputs(folder: Path, method: MergeMethod, scope: str) -> tuple[list[Path], dict[str, Any]]:
    """The adapters that a method merges, all of them or the two that slerp takes, and what it is given beside them."""
    sources = adapter_folders(folder)[: 2 if method.name == "slerp" else None]
    given: dict[str, Any] = {"scope": scope} if "scope" in method.options else {}
    if "statistics" in method.needs:
        given["statistics"] = statistics_files(folder, len(sources))
    if "objective" in method.needs:
        given["objective"] = RandomObjective(
            [source.name for source in sources], list(read_adapter(sources[0]).shapes)
        )
    return sources, given


def peak() -> float:
    """Megabytes that this process held at most; rusage's number would include the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measured(
    folder: Path, method: str, *, rank: int | str | None, scope: str, threads: int, repeats: int
) -> dict[str, float]:
    """Medians of what processes of their own measure. Methods that take no rank are asked for none."""
    command = [sys.executable, __file__, str(folder), method, "--scope", scope, "--threads", str(threads)]
    if rank is not None and "rank" in find_method(method).parameters:
        command += ["--rank", str(rank)]
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    main()
