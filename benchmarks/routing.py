"""What routing costs: MoaModel beside one active PEFT adapter and every other way that PEFT has; ratios in one run.

    python benchmarks/routing.py
    python benchmarks/routing.py --rank 16 --all_linear --rounds 9
    python benchmarks/routing.py --adapters 2 7 30 100 --ways one moa moa_all --rounds 9
    python benchmarks/routing.py --first_layer 1 --ways one moa moa_routed     # routing in flight, no prefix pass
    python benchmarks/routing.py --shape qwen2-1.5b --layers 28 --batch 32 --tokens 512 --decode 128 --graphs  # GPU
    python benchmarks/routing.py --shape qwen2-0.5b --layers 24 --batch 32 --tokens 512 --compile              # GPU

Layer shapes are those of real models, weights are random, which costs the same time. Prefill is one forward over the
prompts, decode one more token from their cache. The ways take turns in random order, and each round's ratio is to the
single adapter of the same round; medians are printed, and tokens a second of the single adapter. The same command runs
on a CPU (fp32) and on a GPU (bf16), where --graphs records the decode step as a CUDA graph: from Python, launching its
kernels takes longer than running them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from routing_models import SHAPES, VOCABULARY, Bench
from transformers import DynamicCache, StaticCache

WAYS = {
    "base": "base model alone",
    "one": "one active adapter (PEFT)",
    "names": "adapter_names (PEFT)",
    "xlora": "X-LoRA (PEFT)",
    "arrow": "Arrow (PEFT)",
    "moa": "MoaModel, hard",
    "moa_all": "MoaModel, hard, all factors",
    "moa_own": "MoaModel, hard, own factors",
    "moa_soft": "MoaModel, soft",
    "moa_routed": "MoaModel, routing the prompts",
}
NO_CACHE = {"xlora": "X-LoRA refuses a cache", "moa_routed": "a route is kept while decoding"}
WARM_UP = 4  # times that decoding runs before it is recorded, or timed when compiled


class Way:
    """One way to run the batch: its prefill, and a decode step from its own cache."""

    def __init__(self, bench: Bench, way: str, stack: ExitStack):
        self.asked, self.device, self.cached = bench.asked, bench.device, way not in NO_CACHE
        model, self.options = bench.build(way, stack)
        self.config = model.config
        self.model = model
        self.stepping = torch.compile(model, mode="reduce-overhead") if self.asked.compile else model
        generator = torch.Generator().manual_seed(self.asked.seed)
        ids = torch.randint(0, VOCABULARY, (self.asked.batch, self.asked.tokens), generator=generator)
        self.ids = ids.to(self.device)
        self.prefill()
        if self.cached:
            self.fill()
            self.step = self._recorded() if self.asked.graphs else self._step
            for _ in range(WARM_UP if self.asked.compile else 1):
                self.decode()

    def run(self, model: Callable, ids: torch.Tensor, **more: object) -> object:
        with torch.no_grad():
            return model(input_ids=ids, **self.options, **more)

    def prefill(self) -> float:
        return self._seconds(lambda: self.run(self.model, self.ids, use_cache=False, logits_to_keep=1))

    def fill(self) -> None:
        length = self.asked.tokens + max(self.asked.decode, WARM_UP)
        static = self.asked.compile or self.asked.graphs
        self.cache = StaticCache(config=self.config, max_cache_len=length) if static else DynamicCache()
        self.run(self.model, self.ids, past_key_values=self.cache, logits_to_keep=1)

    def decode(self) -> float:
        def steps() -> None:
            for _ in range(self.asked.decode):
                self.step()

        seconds = self._seconds(steps)
        self._rewind()
        return seconds

    def _step(self) -> None:
        self.run(self.stepping, self.ids[:, -1:], past_key_values=self.cache)

    def _recorded(self) -> Callable[[], None]:
        """The decode step as a CUDA graph, recorded after it has run on a stream of its own."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP - 1):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._rewind()
        return graph.replay

    def _rewind(self) -> None:
        """Let the cache end with the prompt again."""
        if isinstance(self.cache, StaticCache):
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.asked.tokens)
        else:
            self.cache.crop(-self.asked.decode)

    def _seconds(self, step: Callable[[], object]) -> float:
        clock = time.process_time if self.asked.clock == "cpu" else time.perf_counter
        self._wait()
        start = clock()
        step()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def built(asked: argparse.Namespace, adapters: int) -> Iterator[tuple[dict[str, Way], dict[str, str]]]:
    """The ways that run, and why the others do not."""
    found, refused = {}, {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        bench = Bench(asked, adapters, Path(scratch))
        for way in asked.ways:
            try:
                found[way] = Way(bench, way, stack)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                if way in ("one", "moa"):
                    raise
                refused[way] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        yield found, refused


def measure(asked: argparse.Namespace, adapters: int) -> dict[str, object]:
    """Median ratios of every way to the single adapter, prefill and decode."""
    order = random.Random(asked.seed)
    with built(asked, adapters) as (found, refused), Progress(*Progress.get_default_columns()) as progress:
        seconds: dict[str, dict[str, list[float]]] = {way: {"prefill": [], "decode": []} for way in found}
        bar = progress.add_task(f"{adapters} adapters", total=asked.rounds * len(found))
        for _ in range(asked.rounds):
            for way in order.sample(list(found), len(found)):
                seconds[way]["prefill"].append(found[way].prefill())
                if found[way].cached:
                    seconds[way]["decode"].append(found[way].decode())
                progress.advance(bar)
    one = seconds["one"]
    ratios = {
        way: {
            phase: statistics.median(time / single for time, single in zip(times, one[phase], strict=True))
            for phase, times in phases.items()
            if times
        }
        for way, phases in seconds.items()
    }
    per_second = {
        "prefill": asked.batch * asked.tokens / statistics.median(one["prefill"]),
        "decode": asked.batch * asked.decode / statistics.median(one["decode"]),
    }
    return {"adapters": adapters, "ratios": ratios, "tokens_per_second_of_one": per_second, "not_run": refused}


def show(result: dict[str, object], asked: argparse.Namespace) -> None:
    console = Console(width=110)
    if "moa_routed" in result["ratios"]:
        k, depth = asked.router_layer, asked.layers
        console.print(f"a prefix pass reads {k} of {depth} layers: k / L = {k / depth:.3f}", highlight=False)
    rank = f"rank {asked.rank}, {'all linear layers' if asked.all_linear else 'attention'}"
    table = Table(title=f"{result['adapters']} adapters of {rank}: time, one active adapter = 1")
    for column in ("", "prefill", "decode"):
        table.add_column(column, justify="left" if not column else "right")
    for way, ratios in result["ratios"].items():
        table.add_row(WAYS[way], *(f"{ratios[p]:.2f}" if p in ratios else "-" for p in ("prefill", "decode")))
    console.print(table)
    for way, reason in {**{w: NO_CACHE[w] for w in result["ratios"] if w in NO_CACHE}, **result["not_run"]}.items():
        console.print(f"{WAYS[way]}: {reason}", highlight=False)
    speed = result["tokens_per_second_of_one"]
    console.print(f"one adapter: {speed['prefill']:.0f} tokens/s prefill, {speed['decode']:.0f} tokens/s decode")


def asked_for(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--adapters", nargs="+", default=[7], help="how many adapters, one table each (default 7)", **whole
    )
    parser.add_argument("--rank", default=8, help="rank of each (default 8)", **whole)
    parser.add_argument("--all_linear", action="store_true", help="adapt every linear layer, not attention alone")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b", help="layer shapes (default qwen2-0.5b)")
    parser.add_argument("--layers", default=4, help="layers of the model (default 4)", **whole)
    parser.add_argument(
        "--router_layer", help="layers of the prefix pass (default a quarter of them, as a mixture's)", **whole
    )
    parser.add_argument(
        "--first_layer",
        default=0,
        help="the adapters' first layer; from --router_layer on, routing is in flight",
        **whole,
    )
    parser.add_argument("--batch", default=16, help="sequences (default 16)", **whole)
    parser.add_argument("--tokens", default=64, help="tokens of a prompt (default 64)", **whole)
    parser.add_argument("--decode", default=8, help="decode steps a round (default 8)", **whole)
    parser.add_argument("--rounds", default=15, help="rounds (default 15)", **whole)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default all; one is always there")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--autocast_adapter_dtype",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="adapters in float32 on a base in half precision, PEFT's default",
    )
    parser.add_argument("--graphs", action="store_true", help="on a GPU: decode from a CUDA graph and a static cache")
    parser.add_argument(
        "--compile", action="store_true", help="on a GPU: torch.compile of the decode step, with CUDA graphs"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu on a machine that others use too"
    )
    parser.add_argument("--seed", default=0, help="of prompts, rows and the order of the ways", **whole)
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args(argv)
    for option in ("rank", "layers", "batch", "tokens", "decode", "rounds"):
        if getattr(asked, option) < 1:
            parser.error(f"--{option} must be at least 1, got {getattr(asked, option)}")
    asked.router_layer = asked.router_layer or max(1, asked.layers // 4)
    if not 1 <= asked.router_layer <= asked.layers:
        parser.error(f"--router_layer must be 1 to --layers, got {asked.router_layer} of {asked.layers}")
    if asked.graphs and asked.compile:
        parser.error("--graphs records the model as it is, --compile compiles it: give one")
    if asked.graphs and (asked.device == "cpu" or not torch.cuda.is_available()):
        parser.error("--graphs needs a GPU")
    if min(asked.adapters) < 1:
        parser.error(f"--adapters must be at least 1, got {min(asked.adapters)}")
    asked.ways = [way for way in WAYS if way in (*asked.ways, "one")]
    return asked


def main(argv: list[str] | None = None) -> None:
    asked = asked_for(argv)
    results = [measure(asked, adapters) for adapters in asked.adapters]
    if asked.json:
        print(json.dumps({"settings": vars(asked), "results": results}))
        return
    on_gpu = asked.device != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {asked.clock} time")
    for result in results:
        show(result, asked)


if __name__ == "__main__":
    main()
