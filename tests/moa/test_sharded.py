"""FSDP2: a mixture sharded over two processes computes what the whole one computes, forward and backward."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moa.model import MoaModel
from moa.router import SequenceRouter

SCRIPT = Path(__file__).parent / "sharded_mixture.py"


@pytest.fixture(scope="module")
def folder(base_folder, adapters, tmp_path_factory):
    """A saved mixture, and what two processes made of it."""
    folder = tmp_path_factory.mktemp("sharded")
    model = MoaModel.from_adapters(str(base_folder), adapters)
    torch.manual_seed(0)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight, std=0.3)
    model.set_router(router)
    model.save_pretrained(folder / "mixture")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder


@pytest.mark.parametrize("checkpointing", ["whole", "checkpointed"])
def test_losses_and_gradients_of_different_batches_equal_those_of_the_whole_model(folder, checkpointing):
    told = load_file(folder / f"{checkpointing}.safetensors")
    whole = {name.removeprefix("expected/"): one for name, one in told.items() if name.startswith("expected/")}
    assert len(whole) > 10 and all(whole[name].abs().sum() > 0 for name in ("moa_router.head.weight", "loss"))
    for name, expected in whole.items():
        torch.testing.assert_close(told[f"sharded/{name}"], expected, rtol=1e-4, atol=1e-6)


def test_each_process_generates_what_the_whole_model_would(folder):
    for rank in (0, 1):
        told = load_file(folder / f"generated_{rank}.safetensors")
        assert torch.equal(told["sharded"], told["expected"])
        torch.testing.assert_close(told["sharded_logits"], told["expected_logits"], rtol=1e-4, atol=1e-5)


def test_what_the_experts_are_now_is_what_runs_after_a_step(folder):
    told = load_file(folder / "stepped.safetensors")
    assert not torch.allclose(told["before"], told["sharded"])
    torch.testing.assert_close(told["sharded"], told["expected"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_factors_that_change_as_fsdp_changes_them_are_seen(base_folder, adapters):
    model = MoaModel.from_adapters(str(base_folder), adapters)
    model.set_requires_grad(["cats"])
    tokens = torch.tensor([[3, 4, 5, 6]])
    with model.pinned(["cats"]):
        before = model(tokens).logits
        trained = [one for one in model.parameters() if one.requires_grad]
        with torch.autograd._unsafe_preserve_version_counter(tuple(trained)):  # as FSDP2 writes what it gathered
            for one in trained:
                one.mul_(2)
        assert not torch.allclose(model(tokens).logits, before)


def test_a_sharded_mixture_without_a_fallback_is_not_saved(base_folder, adapters, tmp_path):
    model = MoaModel.from_adapters(str(base_folder), adapters)
    with pytest.raises(ValueError, match=r"a state_dict holds no fallback.*call model.set_fallback\(\) before"):
        model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()


def test_saving_gathers_whole_tensors(folder, base_folder):
    stepped = load_file(folder / "stepped.safetensors")
    saved = MoaModel.from_pretrained(str(base_folder), folder / "saved")
    with torch.no_grad(), saved.pinned(["cats"]):
        torch.testing.assert_close(
            saved(torch.tensor([[3, 4, 5, 6]])).logits, stepped["sharded"], rtol=1e-4, atol=1e-5
        )
    router = load_file(folder / "saved" / "moa_router.safetensors")
    torch.testing.assert_close(router["head.weight"], stepped["router"])
