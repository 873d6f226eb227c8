"""The same merges by PEFT and by mergekit, timed on a model's narrowest layers and scaled to all of them.

PEFT's `*_svd` form and decompose the dense matrix of every layer (here with `svd_full_matrices=False`, its faster
way): o n min(o, n) a layer. Its `cat` and `linear` stay in the factors: o + n. mergekit's functions act on dense
matrices and leave them dense: o n. Neither is charged for reading or writing, nor mergekit for full models, which it
needs.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from merge_inputs import Shape, adapter_folders

from moa.adapters import add_to_model, read_adapter

PEFT = {
    "svd": "svd",
    "ties": "ties_svd",
    "dare_linear": "dare_linear_svd",
    "dare_ties": "dare_ties_svd",
    "magnitude": "magnitude_prune_svd",
    "concatenation": "cat",
    "factor_sum": "linear",
}
DENSITIES = {"ties": 0.2, "magnitude": 0.2, "dare_linear": 0.5, "dare_ties": 0.5}


def peer_seconds(folder: Path, method: str, shape: Shape, count: int) -> dict[str, float | None]:
    """Seconds of PEFT and mergekit for all layers, None where they have no such method or `count` is 0."""
    names = list(shape.narrowest(count))
    if not names:
        return {"peft": None, "mergekit": None}
    peft_work = _svd_work if PEFT.get(method, "").endswith("svd") else lambda o, n: o + n
    return {
        "peft": _scaled(measure_peft(folder, method, shape, names), shape, names, peft_work),
        "mergekit": _scaled(measure_mergekit(folder, method, names), shape, names, lambda o, n: o * n),
    }


def _svd_work(o: int, n: int) -> int:
    return o * n * min(o, n)


def _scaled(
    seconds: float | None, shape: Shape, names: Sequence[str], work: Callable[[int, int], int]
) -> float | None:
    if seconds is None:
        return None
    sizes = shape.modules()
    return seconds * sum(work(*size) for size in sizes.values()) / sum(work(*sizes[name]) for name in names)


def measure_peft(folder: Path, method: str, shape: Shape, names: Sequence[str]) -> float | None:
    """Seconds for PEFT's merge of these layers."""
    if method not in PEFT:
        return None
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        _linear_layers(shape, names), LoraConfig(r=shape.rank, target_modules=list(names)), adapter_name="unused"
    )
    sources = adapter_folders(folder)
    for source in sources:
        modules = read_adapter(source).modules
        add_to_model(model, source.name, {name: modules[name] for name in names})
    options = {"combination_type": PEFT[method], "density": DENSITIES.get(method)}
    if PEFT[method].endswith("svd"):
        options |= {"svd_rank": shape.rank, "svd_full_matrices": False}
    weights = [1 / len(sources)] * len(sources)
    start = time.perf_counter()
    model.add_weighted_adapter([source.name for source in sources], weights, "merged", **options)
    return time.perf_counter() - start


def _linear_layers(shape: Shape, names: Sequence[str]) -> torch.nn.Module:
    """A model that has these layers and nothing else."""
    model = torch.nn.Module()
    for name in names:
        *parts, last = name.split(".")
        parent = model
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        o, n = shape.modules()[name]
        parent.add_module(last, torch.nn.Linear(n, o, bias=False))
    return model


def measure_mergekit(folder: Path, method: str, names: Sequence[str]) -> float | None:
    """Seconds for mergekit's functions on the dense updates of these layers."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    l1 = RescaleNorm.l1
    known: dict[str, tuple[SparsificationMethod, dict, bool]] = {
        "magnitude": (SparsificationMethod.magnitude, {"density": 0.2}, False),
        "ties": (SparsificationMethod.magnitude, {"density": 0.2}, True),
        "dare_linear": (SparsificationMethod.random, {"density": 0.5, "rescale_norm": l1}, False),
        "dare_ties": (SparsificationMethod.random, {"density": 0.5, "rescale_norm": l1}, True),
        "della": (SparsificationMethod.della_magprune, {"density": 0.5, "epsilon": 0.1, "rescale_norm": l1}, True),
        "breadcrumbs": (SparsificationMethod.magnitude_outliers, {"density": 0.9, "gamma": 0.01}, False),
    }
    if method not in known:
        return None
    how, options, elects = known[method]
    sources = [read_adapter(source).modules for source in adapter_folders(folder)]
    start = time.perf_counter()
    for name in names:
        kept = [sparsify(source[name].delta() / len(sources), method=how, **options) for source in sources]
        deltas = torch.stack(kept)
        (deltas * get_mask(deltas, "sum")).sum(0) if elects else deltas.sum(0)
    return time.perf_counter() - start
