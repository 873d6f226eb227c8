"""The models that routing.py and attention.py run: layers of real shapes with random weights, and their adapters."""

from __future__ import annotations

import argparse
import random
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import ArrowConfig, LoraConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import moa.blocks
from moa import MoaModel
from moa.router import SequenceRouter
from moa.routing import Routing

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "qwen2-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    "qwen2-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
VOCABULARY = 8192


class Bench:
    """Models of one shape with the same adapters, built one at a time.

    Their base models are separate, and share their weights in memory: a product may take a tenth more or less time for
    where its matrix lies.
    """

    def __init__(self, asked: argparse.Namespace, adapters: int, folder: Path):
        self.asked, self.folder = asked, folder
        self.device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, asked.dtype or ("bfloat16" if self.device == "cuda" else "float32"))
        self.names = [f"a{index}" for index in range(adapters)]
        self.rows = [self.names[row % adapters] for row in range(asked.batch)]
        random.Random(asked.seed).shuffle(self.rows)
        self.paths = {name: folder / name for name in self.names}
        self.weights = self._random_base().state_dict()
        self._write_adapters()

    def base(self) -> Qwen2ForCausalLM:
        model = self._random_base()
        model.load_state_dict(self.weights, assign=True)
        return model

    def _random_base(self) -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        config = Qwen2Config(vocab_size=VOCABULARY, num_hidden_layers=self.asked.layers, **SHAPES[self.asked.shape])
        with torch.device(self.device):
            return Qwen2ForCausalLM(config).to(self.dtype).eval()

    def _write_adapters(self) -> None:
        targets = [*ATTENTION, *(MLP if self.asked.all_linear else [])]
        layers = range(self.asked.first_layer, self.asked.layers) if self.asked.first_layer else None
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.asked.rank,
            target_modules=targets,
            layers_to_transform=layers and list(layers),
        )
        model = get_peft_model(self.base(), config, adapter_name=self.names[0])
        for name in self.names[1:]:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(self.folder)

    def peft(self, names: list[str]) -> PeftModel:
        kept = {"autocast_adapter_dtype": self.asked.autocast_adapter_dtype}
        model = PeftModel.from_pretrained(self.base(), self.paths[names[0]], adapter_name=names[0], **kept)
        for name in names[1:]:
            model.load_adapter(self.paths[name], name, **kept)
        return model.eval()

    def xlora(self) -> torch.nn.Module:
        adapters = {str(place): str(path) for place, path in enumerate(self.paths.values())}
        base = self.base()
        base.config.use_cache = False
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=adapters)
        return get_peft_model(base, config).to(self.device, self.dtype).eval()

    def mixture(self, way: str, stack: ExitStack) -> MoaModel:
        thresholds = {"moa_all": 10**9, "moa_own": 0}
        usual, moa.blocks.GROUPED_FROM = moa.blocks.GROUPED_FROM, thresholds.get(way, moa.blocks.GROUPED_FROM)
        model = MoaModel.from_adapters(
            self.base(),
            self.paths,
            check_base=False,
            router_layer=self.asked.router_layer,
            autocast_adapter_dtype=self.asked.autocast_adapter_dtype,
        )
        if way == "moa_routed":
            model.set_router(SequenceRouter(model.config.hidden_size, len(self.names)))
        else:
            routing = self.rows if way != "moa_soft" else _uniform(self.asked.batch, len(self.names))
            stack.enter_context(model.pinned(routing))  # stacks the factors, while the threshold holds
            stack.enter_context(model.route_state.set(steady=object()))  # as generate does
        moa.blocks.GROUPED_FROM = usual
        return model

    def build(self, way: str, stack: ExitStack) -> tuple[torch.nn.Module, dict[str, object]]:
        if way == "base":
            return self.base(), {}
        if way == "one":
            return self.peft(self.names[:1]), {}
        if way == "names":
            return self.peft(self.names), {"adapter_names": self.rows}
        if way == "xlora":
            return self.xlora(), {}
        if way == "arrow":
            paths = [str(path) for path in self.paths.values()]
            return create_arrow_model(self.base(), paths, ArrowConfig(top_k=min(2, len(paths)))).eval(), {}
        return self.mixture(way, stack), {}


def _uniform(rows: int, experts: int) -> Routing:
    return Routing(torch.full((rows, experts), 1 / experts))
