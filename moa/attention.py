"""Which attention a model runs with: the fastest that the GPU, the installed packages and the model allow.

    load_base_model(name)                                # attn_implementation="auto"
    set_attention(model, "flash_attention_2")            # a model that is loaded already
    resolve("auto", device="cuda", dtype=torch.bfloat16)

On CUDA in float16 or bfloat16, the first of these that is there: FlashAttention 4 (compute capability 9 and up), 3
(capability 9), 2 (8 and up) as packages, the same as kernels of the Hub, and for packed rows the one inside torch,
`torch_varlen` (moa/varlen.py). Everywhere else `sdpa`. FlashAttention is never a requirement.
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moa.errors import nearest, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = "auto"
SDPA = "sdpa"
TORCH_VARLEN = "torch_varlen"
CHOSEN_AT = ((4, operator.ge, 9), (3, operator.eq, 9), (2, operator.ge, 8))
"""Version of FlashAttention, and the major CUDA compute capabilities that it is chosen for; best first."""
NOT_TO_BE_HAD = (ImportError, OSError, RuntimeError, ValueError)
"""What a package that is broken, a Hub that is out of reach or a model without support raises."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """What decides which attention can run.

    Attributes:
        capability: CUDA compute capability of the GPU, such as (9, 0); None without CUDA.
        packages: versions of FlashAttention that are installed, by transformers' own checks.
        kernels: whether the package `kernels` is installed in a version that this transformers takes.
        torch_flash: whether torch was built with FlashAttention.
    """

    capability: tuple[int, int] | None = None
    packages: frozenset[int] = frozenset()
    kernels: bool = False
    torch_flash: bool = False

    @classmethod
    def here(cls, device: torch.device | str) -> Machine:
        """What this device and these packages allow; nothing is loaded and nothing downloaded."""
        from transformers.utils import import_utils

        if torch.device(device).type != "cuda" or torch.version.cuda is None:  # ROCm counts capabilities otherwise
            return cls()
        return cls(
            capability=torch.cuda.get_device_capability(device),
            packages=frozenset(v for v in (2, 3, 4) if getattr(import_utils, f"is_flash_attn_{v}_available")()),
            kernels=import_utils.is_kernels_available(),
            torch_flash=torch.backends.cuda.is_flash_attention_available(),
        )

    @property
    def runs_torch_varlen(self) -> bool:
        """Whether torch's own variable-length attention has a kernel here."""
        return self.capability is not None and self.capability >= (8, 0) and self.torch_flash


def default_device() -> str:
    """Where `load_base_model` puts a model."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve(
    requested: str = AUTO,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packing: bool = False,
    machine: Machine | None = None,
) -> str:
    """The name of the attention to ask transformers for.

    Args:
        requested: `auto`, or a name as in `from_pretrained`, which wins.
        dtype: what the model computes in.
        packing: whether rows will hold several sequences one after the other, without padding.
        machine: what can run; default what `Machine.here` finds.

    Raises:
        ValueError: the requested attention does not exist, or cannot run on this machine.
    """
    machine = machine or Machine.here(device)
    if requested == AUTO:
        return candidates(dtype, packing, machine)[0]
    check_attention(requested, device, machine)
    return requested


def candidates(dtype: torch.dtype, packing: bool, machine: Machine) -> list[str]:
    """What may run here, best first; the last, `sdpa`, always does."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

    if machine.capability is None or dtype not in (torch.float16, torch.bfloat16):
        return [SDPA]
    fitting = [version for version, compare, major in CHOSEN_AT if compare(machine.capability[0], major)]
    found = [f"flash_attention_{version}" for version in fitting if version in machine.packages]
    if machine.kernels:
        found += [FLASH_ATTN_KERNEL_FALLBACK[f"flash_attention_{version}"] for version in fitting]
    if packing and machine.runs_torch_varlen:
        found.append(TORCH_VARLEN)
    return [*found, SDPA]


def check_attention(requested: str, device: torch.device | str | None = None, machine: Machine | None = None) -> None:
    """Refuse, before a model is loaded, an attention that does not exist or that this machine cannot run.

    Args:
        device: where the model will be; default `default_device()`.

    Raises:
        ValueError: as `resolve`.
    """
    if requested == AUTO:
        return
    from transformers.integrations.hub_kernels import is_kernel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {AUTO, "eager", TORCH_VARLEN, *ALL_ATTENTION_FUNCTIONS.valid_keys()}
    if requested not in known and not is_kernel(requested):
        names = ", ".join(sorted(name for name in known if "|" not in name))
        raise ValueError(
            f"no attention is called {requested!r}{nearest(requested, known)}: choose one of {names}, or a kernel of "
            "the Hub as owner/name"
        )
    device = torch.device(device or default_device())
    reason = _obstacle(requested, device, machine or Machine.here(device))
    if reason:
        raise ValueError(_cannot_run(requested, reason))


def set_attention(model: PreTrainedModel, requested: str = AUTO, *, packing: bool = False) -> str:
    """Switch a loaded model to the attention that `resolve` names, and return what it now runs.

    With `auto`, what fails to load is passed over with a warning, and a model for which none of them can be had keeps
    what transformers gave it.

    Raises:
        ValueError: the requested attention does not exist, or cannot run on this machine or in this model.
    """
    machine = Machine.here(model.device)
    if requested == AUTO:
        for name in candidates(model.dtype, packing, machine)[:-1]:
            try:
                _switch(model, name)
                break
            except NOT_TO_BE_HAD as error:
                logger.warning("attention %s is passed over: %s", name, one_line(error))
    else:
        check_attention(requested, model.device, machine)
        try:
            _switch(model, requested)
        except NOT_TO_BE_HAD as error:
            raise ValueError(_cannot_run(requested, one_line(error))) from error
    logger.info("attention: %s (asked for %s)", attention_of(model), requested)
    return attention_of(model)


def attention_of(model: PreTrainedModel) -> str:
    """The name of the attention that a model runs."""
    return model.config._attn_implementation


def _switch(model: PreTrainedModel, name: str) -> None:
    before = attention_of(model)
    if name == TORCH_VARLEN:
        from moa.varlen import check_model

        check_model(model)  # importing the module has also made the name known
    model.set_attn_implementation(name)
    if attention_of(model) == before != name:  # transformers only warns
        raise ValueError(f"{type(model).__name__} has its {before} attention built in")


def _obstacle(requested: str, device: torch.device, machine: Machine) -> str | None:
    """Why the requested attention cannot run here; None where transformers has the last word."""
    flash = requested.startswith("flash_attention_")
    if device.type == "cpu" and (flash or requested == TORCH_VARLEN):
        return "it needs a GPU, and this is a CPU"
    if requested == TORCH_VARLEN and not machine.runs_torch_varlen:
        return "it needs CUDA with compute capability 8.0 or more, and a torch that was built with FlashAttention"
    if flash and machine.capability and int(requested[-1]) not in machine.packages and not machine.kernels:
        package = {"2": "flash-attn", "3": "flash-attn-3", "4": "flash-attn-4"}[requested[-1]]
        return f"the package {package} is not installed"
    return None


def _cannot_run(requested: str, reason: str) -> str:
    return f"attention {requested!r} cannot run here ({reason}): choose another, or auto for the best that can"
