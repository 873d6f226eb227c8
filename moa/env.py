"""`moa env`: versions and hardware, to paste into a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from moa.errors import OneLineParser

PACKAGES = (
    "moa-peft",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "evaluate",
    "safetensors",
    "huggingface_hub",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "kernels",
)


def environment() -> dict[str, str]:
    """Names and versions of what matters to a bug report."""
    import torch

    from moa.attention import default_device, resolve
    from moa.precision import computes_slowly

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["cpu, bfloat16"] = "no instructions, auto is float32" if computes_slowly(torch.bfloat16) else "fast"
    found["cuda"] = torch.version.cuda or "not in this torch"
    for index in range(torch.cuda.device_count()):
        found[f"gpu {index}"] = torch.cuda.get_device_name(index)
    for name, packing in (("attention", False), ("attention, packed", True)):
        found[name] = resolve(device=default_device(), dtype=torch.bfloat16, packing=packing)
    return found


def main(argv: list[str] | None = None) -> None:
    """Print one line for each fact."""
    OneLineParser(prog="moa env", description=__doc__).parse_args(argv)
    facts = environment()
    width = max(map(len, facts))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
