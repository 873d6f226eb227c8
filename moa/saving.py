"""A mixture on disk: one folder with three readers.

moa/                         root: the fallback, a plain LoRA adapter (stock PEFT, vLLM)
  adapter_config.json, adapter_model.safetensors
  sst2/ squad/ ...           each expert, a plain LoRA adapter (stock PEFT, vLLM)
  moa_config.json            experts, routing, checksums
  moa_router.safetensors     the router
  moa_gates.safetensors      the token gates, if it has some
  README.md                  the model card
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moa.adapters import file_sha256, from_model, settle_configs
from moa.base_model import load_base_model, same_base
from moa.card import mixture_card
from moa.config import CONFIG_NAME, FALLBACK, GATES_NAME, ROUTER_NAME, MoaConfig
from moa.hub import download
from moa.peft_checks import all_finite
from moa.router import SequenceRouter
from moa.strangeness import empty_detector
from moa.token_gates import TokenGates

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from moa.model import MoaModel

CARD_NAME = "README.md"
TRAINING_LEFT = re.compile(
    r"checkpoint-\d+|moa_training\.json|runs|logs|wandb|mlruns|trackio|events\.out\.tfevents\..*"
    r"|rng_state(_\d+)?\.pth|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|trainer_state\.json|training_args\.bin"
)
PACKAGES = ("torch", "transformers", "peft", "moa-peft")


def save_mixture(
    model: MoaModel, directory: Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
) -> None:
    """Write the folder beside `directory`, then move it there: what stood there before survives a failure.

    Of an earlier mixture only the files that its config lists are replaced or removed.

    Raises:
        ValueError: `directory` is a file, or a folder with other things than a mixture or what its training left.
    """
    if not kwargs.get("is_main_process", True):
        return
    earlier = _earlier_files(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        written = Path(scratch) / "mixture"
        write_mixture(model, written, **kwargs)
        files = sorted(str(file.relative_to(written)) for file in written.rglob("*") if file.is_file())
        _check_free(directory, set(files) - earlier)
        for file in files:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (written / file).replace(directory / file)
    for file in sorted(earlier - set(files)):
        _remove(directory / file, directory)
    if push_to_hub:
        from moa.push import push_mixture

        push_mixture(model, repo_id or directory.name)


def _earlier_files(directory: Path) -> set[str]:
    """The files of the mixture that stands in `directory`; none in a new folder or after a router's training."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cannot save the mixture to {directory}: it is a file, give a folder")
    if (directory / CONFIG_NAME).is_file():
        adapters = MoaConfig.from_json(directory / CONFIG_NAME).adapter_files()
        return {*adapters, ROUTER_NAME, GATES_NAME, CONFIG_NAME, CARD_NAME}
    held = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    for name in held:
        if not TRAINING_LEFT.fullmatch(name):
            raise ValueError(f"cannot save the mixture to {directory}: it holds {name!r}, give a new folder")
    return set()


def _check_free(directory: Path, files: set[str]) -> None:
    for file in sorted(files):
        if (directory / file).exists():
            raise ValueError(
                f"cannot save the mixture to {directory}: {file} there belongs to no earlier mixture, "
                "give a new folder or move it away"
            )


def _remove(file: Path, root: Path) -> None:
    file.unlink(missing_ok=True)
    if file.parent != root and file.parent.is_dir() and not any(file.parent.iterdir()):
        file.parent.rmdir()


def write_mixture(model: MoaModel, directory: Path, **kwargs: Any) -> None:
    """Write a new folder with everything that a mixture is; the caller moves it where it belongs.

    Raises:
        ValueError: `safe_serialization=False` was asked for, which would write pickles, or the `state_dict` of a
            sharded model was given that has no fallback.
    """
    if not kwargs.get("safe_serialization", True):
        raise ValueError("a mixture is saved as safetensors only, never as pickles: leave safe_serialization out")
    if FALLBACK not in model.peft_config:
        if kwargs.get("state_dict") is not None:
            raise ValueError(
                "a state_dict holds no fallback, for this mixture had none when it was taken: "
                "call model.set_fallback() before the training"
            )
        model.set_fallback()
    kwargs.pop("selected_adapters", None)
    settle_configs(model)
    PeftModelForCausalLM.save_pretrained(model, str(directory), selected_adapters=[*model.experts, FALLBACK], **kwargs)
    config = model.moa_config
    config.versions = {package: version(package) for package in PACKAGES}
    config.sha256 = {file: file_sha256(directory / file) for file in config.adapter_files()}
    held_parts = ("moa_router", ROUTER_NAME, model.moa_router), ("moa_gates", GATES_NAME, model.moa_gates)
    for part, name, held in held_parts:
        if held is not None:
            save_file(_state_of(model, part, kwargs.get("state_dict")), directory / name)
            config.sha256[name] = file_sha256(directory / name)
    describe_mixture(model, directory)


def _state_of(model: MoaModel, part: str, gathered: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of the router or the gates, from the gathered state of the whole model where that is sharded."""
    prefix = f"{part}."
    state = getattr(model, part).state_dict(prefix=prefix) if gathered is None else gathered
    return {
        name.removeprefix(prefix): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def describe_mixture(model: MoaModel, directory: Path) -> None:
    """Write `moa_config.json` and the model card, also later, when there are scores to show."""
    (directory / CONFIG_NAME).write_text(model.moa_config.to_json())
    (directory / CARD_NAME).write_text(mixture_card(model.moa_config, expert_ranks(model)))


def expert_ranks(model: MoaModel) -> dict[str, int]:
    """Largest rank that each expert has in a layer, for the card."""
    return {name: max(shape.r for shape in from_model(model, name).shapes.values()) for name in model.experts}


def load_mixture(
    cls: type[MoaModel],
    base: PreTrainedModel | str | Path | None,
    source: str | Path,
    *,
    check_base: bool = True,
    router: bool = True,
    autocast_adapter_dtype: bool = True,
    computing: Mapping[str, str],
    **hub: Any,
) -> MoaModel:
    """See `MoaModel.from_pretrained`."""
    directory = _local_folder(source, **hub)
    config = MoaConfig.from_json(directory / CONFIG_NAME)
    _check_unchanged(directory, config)
    if base is not None and not isinstance(base, str | Path):
        if any(value != "auto" for value in computing.values()):
            raise ValueError(
                "dtype and attn_implementation are for a base model that is loaded here, and a loaded one was given: "
                "load that one with them, or pass its name"
            )
    else:
        base = load_base_model(config.base_model if base is None else str(base), **computing)
    if check_base and config.base_model and not same_base(config.base_model, str(base.name_or_path)):
        raise ValueError(
            f"{source} is a mixture on {config.base_model!r}, this model is {str(base.name_or_path)!r}: "
            "load it on its own base, or pass check_base=False if they share weights"
        )
    model = cls.from_adapters(
        base,
        {name: directory / name for name in config.experts},
        router_layer=config.router.layer,
        check_base=check_base and config.check_base,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    config.router.layer = model.moa_config.router.layer
    model.moa_config = config
    model.load_adapter(str(directory), FALLBACK, autocast_adapter_dtype=autocast_adapter_dtype)
    model.requires_grad_(False)
    routed = router and ROUTER_NAME in config.sha256
    if routed:
        model.set_router(_read_router(directory / ROUTER_NAME, config), config.router, check_base=check_base)
    token = config.granularity == "token"
    if GATES_NAME in config.sha256 or (token and config.token_router == "gates"):
        model.moa_gates = _read_gates(model, directory)
    model.set_granularity(config.granularity if routed or token else "sequence", by=config.token_router)
    return model.eval()


def _local_folder(source: str | Path, **hub: Any) -> Path:
    if Path(source).is_dir():
        if not (Path(source) / CONFIG_NAME).is_file():
            raise ValueError(f"{source} is no saved mixture (it has no {CONFIG_NAME}): load a plain adapter with PEFT")
        return Path(source)
    directory = download(str(source), "mixture", **hub)
    if not (directory / CONFIG_NAME).is_file():
        raise ValueError(f"the repository {source!r} is no saved mixture: it has no {CONFIG_NAME}")
    return directory


def _check_unchanged(directory: Path, config: MoaConfig) -> None:
    routers = [name for name in (ROUTER_NAME, GATES_NAME) if name in config.sha256]
    for name in [*config.adapter_files(), *routers]:
        if name not in config.sha256:
            raise ValueError(f"{directory / CONFIG_NAME} has no sha256 of {name}: save or download the mixture again")
        if not (directory / name).is_file():
            raise ValueError(f"the mixture lacks {directory / name}: it is incomplete, save or download it again")
        if file_sha256(directory / name) != config.sha256[name]:
            raise ValueError(
                f"{directory / name} was changed after the mixture was saved (its sha256 differs from {CONFIG_NAME}): "
                "the router and the scores belong to the old file, so fit the router again on the new adapters"
            )


def _read_gates(model: MoaModel, directory: Path) -> TokenGates:
    file, gates = directory / GATES_NAME, TokenGates(model.get_base_model(), model.experts)
    try:
        gates.load_state_dict(load_file(file))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{file} does not hold the gates by which {CONFIG_NAME} routes tokens "
            f"({str(error).splitlines()[-1].strip()}): save or download the mixture again"
        ) from error
    if not all(map(all_finite, gates.state_dict().values())):
        raise ValueError(f"{file} holds NaN or infinite values: its training diverged, train the gates again")
    return gates.to(model.device).requires_grad_(False)


def _read_router(file: Path, config: MoaConfig) -> SequenceRouter:
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no readable safetensors file ({error}): save or download the mixture again"
        ) from error
    described = config.router
    if described.hidden_size is None:
        raise ValueError(f"{file} is a router, and {CONFIG_NAME} describes none: save or download the mixture again")
    router, *others = (
        SequenceRouter(
            described.hidden_size,
            len(config.experts),
            pooling=described.pooling,
            head=described.head,
            hidden_units=described.hidden_units,
            clusters=described.clusters,
        )
        for _ in range(1 + len(described.depths))
    )
    router.detector = empty_detector(state)
    for depth, other in zip(described.depths, others, strict=True):
        other.detector = empty_detector(state, f"others.{depth}.")
        router.others[str(depth)] = other
    try:
        router.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{file} is not the router that {CONFIG_NAME} describes ({str(error).splitlines()[-1].strip()}): "
            "save or download the mixture again"
        ) from error
    return router
