"""Random adapters in memory and on disk, and dense references in float64."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moa.adapters import Adapter, write_adapter
from moa.low_rank import LowRank

# A square layer, a flat one and a wide one.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 24),
    "model.layers.0.self_attn.v_proj": (12, 24),
    "model.layers.0.mlp.down_proj": (24, 40),
}


def random_adapter(name, rank, *, seed, lacking=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
    modules = {module: LowRank(draw(o, rank), draw(rank, n)) for module, (o, n) in SHAPES.items() if module != lacking}
    return Adapter(name=name, base_model="tiny/base", modules=modules, dtype=dtype)


@pytest.fixture
def adapters():
    """Three adapters of ranks 2, 3 and 4; "b" shares a direction with "a", and "c" lacks a layer."""
    a = random_adapter("a", 2, seed=1)
    b = random_adapter("b", 3, seed=2)
    c = random_adapter("c", 4, seed=3, lacking="model.layers.0.mlp.down_proj")
    for module, update in b.modules.items():
        update.A[0] = a.modules[module].A[0]
    return [a, b, c]


@pytest.fixture
def equal_rank_adapters():
    return [random_adapter(name, 3, seed=seed) for seed, name in enumerate("abc", start=11)]


@pytest.fixture
def folders(tmp_path, equal_rank_adapters):
    """Three adapters of rank 3 in folders, float32."""
    return [
        write_adapter(tmp_path / a.name, a.modules, base_model=a.base_model, dtype=torch.float32)
        for a in equal_rank_adapters
    ]


@pytest.fixture
def edit_config():
    """Change entries of a folder's adapter_config.json."""

    def edit(folder, **changes):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return folder

    return edit


@pytest.fixture
def edit_weights():
    """Replace a folder's tensors by what a function makes of them."""

    def edit(folder, change):
        from safetensors.torch import load_file

        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)
        return folder

    return edit


@pytest.fixture
def dense_sum():
    """sum_i w_i delta_i of one layer, float64, from the factors alone."""

    def total(adapters, weights, module):
        present = [(a.modules[module], w) for a, w in zip(adapters, weights, strict=True) if module in a.modules]
        return sum(w * (u.B.double() @ u.A.double()) for u, w in present)

    return total
