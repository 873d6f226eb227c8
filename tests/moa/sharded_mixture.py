"""One of two processes of tests/moa/test_sharded.py: shard a mixture, and write what it computes beside the whole."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from moa.model import MoaModel

TOKENS = torch.tensor([[3, 4, 5, 6, 7], [9, 10, 11, 12, 13], [3, 9, 20, 21, 22], [15, 16, 17, 18, 19]])
LABELS = TOKENS.clone()
LABELS[:, :3] = -100


def load(folder, checkpointing=False):
    model = MoaModel.from_pretrained(None, folder / "mixture")
    model.moa_router.requires_grad_(True)
    model.set_requires_grad(["cats", "films"])
    model.moa_config.routing = "soft"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def shard(model, mesh):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("generate", "route"):
        register_fsdp_forward_method(model, method)
    return model


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()


def gradients(folder, mesh, rank, checkpointing):
    """The mean loss over both processes' rows and its gradients, whole and sharded."""
    told = {}
    whole = load(folder, checkpointing)
    loss = whole(input_ids=TOKENS, labels=LABELS).loss  # as many answer tokens in each half of the rows
    loss.backward()
    told["expected/loss"] = loss.detach()
    told |= {f"expected/{name}": one.grad for name, one in whole.named_parameters() if one.grad is not None}

    sharded = shard(load(folder, checkpointing), mesh)
    part = slice(2 * rank, 2 * rank + 2)
    loss = sharded(input_ids=TOKENS[part], labels=LABELS[part]).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    told["sharded/loss"] = mean / 2
    told |= {f"sharded/{name}": full(one.grad) for name, one in sharded.named_parameters() if one.grad is not None}
    return {name: one.clone() for name, one in told.items()}, whole, sharded


@torch.no_grad()
def generations(folder, whole, sharded, rank):
    """The tokens and the routes of this process's own prompts, whole and sharded."""
    prompts = TOKENS[2 * rank : 2 * rank + 2]
    options = {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
    }
    told = {}
    for name, model in (("expected", whole.eval()), ("sharded", sharded.eval())):
        told[name] = model.generate(input_ids=prompts, **options)
        told[f"{name}_logits"] = model.route(prompts).logits.contiguous()
    save_file(told, folder / f"generated_{rank}.safetensors")


def step(folder, whole, sharded, rank):
    """Cats alone before and after a step of plain gradient descent; then save the sharded mixture."""
    tokens = TOKENS[:1, :4]
    told = {}
    with torch.no_grad(), sharded.pinned(["cats"]):
        told["before"] = sharded(tokens).logits
    for model in (whole, sharded):
        trained = [one for one in model.parameters() if one.requires_grad]
        torch.optim.SGD(trained, lr=0.5).step()
    for name, model in (("expected", whole), ("sharded", sharded)):
        with torch.no_grad(), model.pinned(["cats"]):
            told[name] = model(tokens).logits
    told["router"] = full(sharded.moa_router.head.weight).clone()  # its storage is given back below
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file(told, folder / "stepped.safetensors")
        sharded.save_pretrained(folder / "saved", state_dict=state)


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    for name, checkpointing in (("checkpointed", True), ("whole", False)):
        told, whole, sharded = gradients(folder, mesh, rank, checkpointing)
        if rank == 0:
            save_file(told, folder / f"{name}.safetensors")
    generations(folder, whole, sharded, rank)
    step(folder, whole, sharded, rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
