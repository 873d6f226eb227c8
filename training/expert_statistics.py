"""Each adapter reads rows of its own task, once, and what its layers saw is stored beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence

from moa.adapters import Adapter, read_adapter
from moa.base_model import load_tokenizer
from moa.merging.collecting import collect
from moa.merging.statistics import STATISTICS_FILE, Statistics, read_statistics, write_statistics
from moa.model import MoaModel
from moa.tasks import Example
from moa.training.record import text_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def collect_statistics(
    adapters: Mapping[str, str],
    examples: Mapping[str, Sequence[Example]],
    model_name: str,
    *,
    fisher: bool = False,
    max_length: int = 1024,
    batch_size: int = 16,
    check_base: bool = True,
    overwrite: bool = False,
) -> None:
    """Write merge_statistics.safetensors into each adapter's folder, for all layers that any of them changes.

    An adapter that leaves a layer as it is still says, by what it reads there, how much it minds a change.

    Args:
        adapters: task to the folder of its adapter.
        examples: task to the rows that its adapter reads, prompt and answer.
        fisher: also collect gradients of the answers' likelihood.
        overwrite: replace statistics that were collected from other rows, or with other settings.

    Raises:
        ValueError: an adapter has other statistics already, or does not fit the base model.
    """
    read = {name: read_adapter(folder, name) for name, folder in adapters.items()}
    modules = sorted({module for adapter in read.values() for module in adapter.shapes})
    about = {
        name: {
            "adapter_sha256": adapter.sha256,
            "base_model": model_name,
            "rows": len(examples[name]),
            "text_sha256": text_sha256(example.prompt + example.answer for example in examples[name]),
            "max_length": max_length,
            "fisher": fisher,
        }
        for name, adapter in read.items()
    }
    paths = {name: a.path for name, a in read.items() if overwrite or not _kept(a, about[name], modules)}
    if not paths:
        return
    model = MoaModel.from_adapters(model_name, paths, check_base=check_base)
    tokenizer = load_tokenizer(model_name)
    for position, (name, path) in enumerate(paths.items(), start=1):
        rows = [tokenised(tokenizer, example, max_length) for example in examples[name]]
        title = f"adapter {position} of {len(paths)}: {name}"
        found = read_rows(model, name, modules, rows, fisher=fisher, batch_size=batch_size, title=title)
        _tell(write_statistics(path / STATISTICS_FILE, found, about[name]), found, len(rows))


def _kept(adapter: Adapter, about: Mapping[str, Any], modules: Sequence[str]) -> bool:
    """Whether the adapter has these very statistics already; a ValueError if it has others."""
    file = adapter.path / STATISTICS_FILE
    if not file.is_file():
        return False
    found = read_statistics(file)
    changed = [name for name in about if found.about.get(name) != about[name]]
    if not set(modules) <= set(found):
        changed.append("layers")
    if changed:
        raise ValueError(
            f"{file} was collected otherwise (its {', '.join(changed)} differ): pass --overwrite to replace it"
        )
    print(f"kept {file}: it was collected from these rows", flush=True)
    return True


def _tell(file: Path, found: Statistics, rows: int) -> None:
    tokens = max(stored["tokens"] for stored in found.layers.values())
    size = file.stat().st_size / 1e6
    print(f"{file}: {len(found)} layers, {rows} rows, {tokens} tokens, {size:.1f} MB", flush=True)


Row = tuple[list[int], list[int]]


def tokenised(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Row:
    """Tokens and labels as adapters are trained on them: prompt, answer and the end, loss on the last two."""
    prompt = len(tokenizer(example.prompt)["input_ids"])
    ids = tokenizer(example.prompt + example.answer)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    labels = [-100] * prompt + ids[prompt:]
    return ids[:max_length], labels[:max_length]


def read_rows(
    model: MoaModel,
    name: str,
    modules: Sequence[str],
    rows: Sequence[Row],
    *,
    fisher: bool,
    batch_size: int,
    title: str,
) -> Statistics:
    """One pass of one expert over its rows, in batches of like lengths, with a progress bar."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    base = model.get_base_model()
    head = base.get_output_embeddings()
    settings: dict[str, Any] = {"use_cache": False}
    if not fisher and all(base.get_submodule(module) is not head for module in modules):
        settings["logits_to_keep"] = 1  # nobody reads the logits
    shown = track(batches, description=title, transient=True)
    with model.using(name):
        return collect(base, modules, (_padded(batch, model.device) | settings for batch in shown), fisher=fisher)


def _padded(batch: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """One tensor each of ids, mask and labels, padded on the right, where no token before reads it."""
    ids, labels = ([torch.tensor(part) for part in column] for column in zip(*batch, strict=True))
    mask = [torch.ones_like(row) for row in ids]
    columns = {"input_ids": (ids, 0), "attention_mask": (mask, 0), "labels": (labels, -100)}
    return {
        name: pad_sequence(rows, batch_first=True, padding_value=fill).to(device)
        for name, (rows, fill) in columns.items()
    }
