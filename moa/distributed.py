"""Say what a launch really started, and refuse when it is not what was asked.

On a machine without an accelerator `accelerate launch --num_processes 2` starts one process, and an FSDP config runs
plain data parallelism, both without a message; `torchrun --nproc_per_node 2` starts what it says.
"""

from __future__ import annotations

import os

from accelerate import PartialState
from accelerate.utils import DistributedType

SHARDED = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}


def check_launch(num_processes: int | None = None) -> None:
    """Print the processes that run, such as "world size 2, strategy DDP (gloo), device cpu".

    Args:
        num_processes: how many the user wants; None accepts any number.

    Raises:
        ValueError: another number runs, or the launcher was asked for sharding that is not in force.
    """
    state = PartialState()
    running = state.num_processes
    wanted = int(os.environ.get("WORLD_SIZE", running))
    if wanted != running:
        raise ValueError(
            f"the launcher started {wanted} processes, each of which runs alone: without an accelerator pass --use_cpu"
        )
    if num_processes is not None and running != num_processes:
        raise ValueError(
            f"--num_processes {num_processes} was asked, {running} run: start them with "
            f"'torchrun --nproc_per_node {num_processes} SCRIPT ...'"
        )
    # accelerate sets the address for several processes; a launcher that starts them also numbers them
    if running == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "the launcher was asked for several processes and started one, as accelerate does without an accelerator: "
            "start them with 'torchrun --nproc_per_node N SCRIPT ...', or launch with --num_processes 1"
        )
    for variable, asked in SHARDED.items():
        if os.environ.get(variable, "").lower() == "true" and state.distributed_type not in (
            asked,
            DistributedType.NO,
        ):
            raise ValueError(
                f"the launcher was asked for {asked.value}, {state.distributed_type.value} is in force: "
                "sharding needs an accelerator, launch without it here"
            )
    state.print(f"world size {running}, strategy {_strategy(state)}, device {state.device}", flush=True)


def _strategy(state: PartialState) -> str:
    if state.num_processes == 1:
        return "single process"
    return f"DDP ({state.backend})" if "MULTI" in state.distributed_type.value else state.distributed_type.value
