"""What routers read of prompts, computed once and kept in the user's cache, from where it is memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.base_model import cache_dir
from moa.fingerprint import fingerprint
from moa.prefix import prompt_states
from moa.router import POOLINGS
from moa.router_checks import check_prompts_have_tokens


class PromptFeatures:
    """Features of some prompts, at any layer.

    Args:
        base_model: whose hidden states they are; it must run without adapters while they are computed.
        prompts: their texts.
        batch_size: prompts at once; changes nothing but the speed.

    Raises:
        ValueError: a prompt without a token.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        batch_size: int = 16,
    ):
        self.base_model, self.tokenizer, self.prompts = base_model, tokenizer, list(prompts)
        self.batch_size = batch_size
        ids = tokenizer(self.prompts)["input_ids"]
        check_prompts_have_tokens(self.prompts, ids)
        read = [fingerprint(base_model), len(tokenizer), ids]
        self._folder = cache_dir() / "features" / hashlib.sha256(json.dumps(read).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, layers: Sequence[int]) -> int:
        """Compute the pooled features of these layers, in one pass to the deepest that the cache lacks.

        Returns:
            How many prompts were read: none if the cache has them all.
        """
        missing = [layer for layer in layers if not self._pooled(layer).is_file()]
        if not missing:
            return 0
        found: dict[tuple[int, str], list[Tensor]] = {(layer, name): [] for layer in missing for name in POOLINGS}
        for states, mask in self._pass(missing):
            for layer, of_layer in zip(missing, states, strict=True):
                for name, pool in POOLINGS.items():
                    found[layer, name].append(pool(of_layer, mask).cpu())
        for layer in missing:
            tensors = {name: torch.cat(found[layer, name])[self._places()] for name in POOLINGS}
            _write(self._pooled(layer), tensors)
        return len(self)

    def pooled(self, layer: int, pooling: str) -> Float[Tensor, "prompts hidden"]:
        """The prompts' features under a pooling that has nothing to learn, in fp32."""
        self.read([layer])
        with safe_open(self._pooled(layer), framework="pt") as file:
            return file.get_tensor(pooling)

    def states(self, layer: int) -> tuple[Float[Tensor, "tokens hidden"], ...]:
        """The hidden states of each prompt's tokens, for a pooling that learns; one pass if the cache lacks them."""
        path = self._folder / f"layer-{layer}-tokens.safetensors"
        if not path.is_file():
            rows: list[Tensor] = []
            for (states,), mask in self._pass([layer]):
                rows += [row[real].cpu() for row, real in zip(states, mask, strict=True)]
            rows = [rows[place] for place in self._places()]
            _write(path, {"states": torch.cat(rows), "tokens": torch.tensor([len(row) for row in rows])})
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("states").split(file.get_tensor("tokens").tolist())

    def _pooled(self, layer: int) -> Path:
        return self._folder / f"layer-{layer}.safetensors"

    def _order(self) -> list[int]:
        """The prompts by length, so that a batch has little padding."""
        return sorted(range(len(self)), key=lambda index: len(self.prompts[index]))

    def _places(self) -> list[int]:
        """Where in that order each prompt is."""
        return torch.tensor(self._order()).argsort().tolist()

    def _pass(self, layers: Sequence[int]) -> Iterator[tuple[list[Tensor], Tensor]]:
        """The states entering `layers` and their mask, for each batch of prompts."""
        order = self._order()
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        title = f"reading {len(self)} prompts up to layer {max(layers)}"
        for chosen in track(batches, description=title, transient=True):
            texts = [self.prompts[index] for index in chosen]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.base_model.device)
            mask = batch["attention_mask"]
            yield prompt_states(self.base_model, layers, batch["input_ids"], mask), mask.bool()


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    save_file(dict(tensors), scratch)
    scratch.replace(file)
