"""A mixed batch through MoaModel, beside one active PEFT adapter and PEFT's own `adapter_names`; ratios in one run.

    python benchmarks/mixed_batch.py
    python benchmarks/mixed_batch.py --batch 16 --adapters 7 --rank 16 --all_linear --rounds 20

The model has Qwen2-0.5B's layer shapes and random weights, which cost the same time as trained ones. Prefill is one
forward over the prompts, decode one more token from their cache. The four ways take turns in random order, and each
round's ratio is to the single adapter of the same round; medians are printed.
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
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from moa import MoaModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def base(layers: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config).eval()


def write_adapters(folder: Path, names: list[str], layers: int, rank: int, targets: list[str] | str) -> None:
    model = get_peft_model(
        base(layers), LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets), adapter_name=names[0]
    )
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets))
    for key, parameter in model.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)


def measure(step: Callable[[], object], prepare: Callable[[], None] = lambda: None, repeats: int = 1) -> float:
    total = 0.0
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        step()
        total += time.perf_counter() - start
    return total


class Way:
    """One way to run the batch: its prefill, and a decode step from its own cache."""

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, **forward: object):
        self.model, self.ids, self.forward = model, ids, forward
        self.cache = DynamicCache(config=model.config)
        self.logits = self.run(ids, past_key_values=self.cache).logits

    def run(self, ids: torch.Tensor, **more: object) -> object:
        with torch.no_grad():
            return self.model(input_ids=ids, **self.forward, **more)

    def prefill(self) -> float:
        return measure(lambda: self.run(self.ids, use_cache=False))

    def decode(self, steps: int) -> float:
        token = self.ids[:, -1:]
        seconds = measure(lambda: self.run(token, past_key_values=self.cache), repeats=steps)
        self.cache.crop(-steps)
        return seconds


@contextmanager
def ways(arguments: argparse.Namespace) -> Iterator[dict[str, Way]]:
    names = [f"a{i}" for i in range(arguments.adapters)]
    rows = [names[i % len(names)] for i in range(arguments.batch)]
    ids = torch.randint(0, 8192, (arguments.batch, arguments.tokens))
    targets = "all-linear" if arguments.all_linear else ATTENTION
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_adapters(folder, names, arguments.layers, arguments.rank, targets)
        one = PeftModel.from_pretrained(base(arguments.layers), folder / names[0], adapter_name=names[0]).eval()
        several = PeftModel.from_pretrained(base(arguments.layers), folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            several.load_adapter(folder / name, name)
        mixture = MoaModel.from_adapters(
            base(arguments.layers), {name: folder / name for name in names}, check_base=False
        )
        with mixture.pinned(rows):
            yield {
                "base model": Way(base(arguments.layers), ids),
                "one adapter (PEFT)": Way(one, ids),
                "adapter_names (PEFT)": Way(several.eval(), ids, adapter_names=rows),
                "MoaModel": Way(mixture, ids),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="sequences (default 16)")
    parser.add_argument("--adapters", type=int, default=7, help="adapters in the batch (default 7)")
    parser.add_argument("--rank", type=int, default=8, help="rank of each (default 8)")
    parser.add_argument("--all_linear", action="store_true", help="adapt every linear layer, not attention alone")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default 4)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a prompt (default 64)")
    parser.add_argument("--decode", type=int, default=8, help="decode steps a round (default 8)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--seed", type=int, default=0, help="order of the ways in each round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    order = random.Random(arguments.seed)

    with ways(arguments) as found:
        difference = (found["MoaModel"].logits - found["adapter_names (PEFT)"].logits).abs().max().item()
        seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in found}
        for _ in range(arguments.rounds):
            for name in order.sample(list(found), len(found)):
                seconds[name]["prefill"].append(found[name].prefill())
                seconds[name]["decode"].append(found[name].decode(arguments.decode))
    one = seconds["one adapter (PEFT)"]
    table = {
        name: {
            phase: statistics.median(a / b for a, b in zip(times, one[phase], strict=True))
            for phase, times in phases.items()
        }
        for name, phases in seconds.items()
    }
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "ratios": table, "largest_logit_difference": difference}))
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {vars(arguments)}")
    print(f"{'ratio to one active adapter':30} prefill  decode")
    for name, ratios in table.items():
        print(f"{name:30} {ratios['prefill']:7.2f} {ratios['decode']:7.2f}")
    print(f"largest difference of logits between MoaModel and adapter_names: {difference:.1e}")


if __name__ == "__main__":
    main()
