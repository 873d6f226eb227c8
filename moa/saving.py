"""A mixture on disk: one folder with three readers.

moa/                         root: the fallback, a plain LoRA adapter (stock PEFT, vLLM)
  adapter_config.json, adapter_model.safetensors
  sst2/ squad/ ...           each expert, a plain LoRA adapter (stock PEFT, vLLM)
  moa_config.json            experts, routing, checksums
  moa_router.safetensors     the router
  README.md                  the model card
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moa.adapters import WEIGHTS_FILE, file_sha256
from moa.base_model import load_base_model
from moa.card import mixture_card
from moa.config import CONFIG_NAME, FALLBACK, MoaConfig
from moa.router import SequenceRouter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moa.model import MoaModel

ROUTER_NAME = "moa_router.safetensors"
PACKAGES = ("torch", "transformers", "peft", "moa-peft")


def save_mixture(
    model: MoaModel, directory: Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
) -> None:
    """Write the folder beside `directory`, then move it there: what stood there before survives a failure.

    Raises:
        ValueError: `directory` is a file, or a folder that holds something else than a mixture.
    """
    _check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        written = Path(scratch) / "mixture"
        write_mixture(model, written, **kwargs)
        directory.mkdir(exist_ok=True)
        for entry in sorted(written.iterdir()):
            _replace(entry, directory / entry.name)
    if push_to_hub:
        from moa.push import push_mixture

        push_mixture(model, repo_id or directory.name)


def _check_destination(directory: Path) -> None:
    if directory.is_file():
        raise ValueError(f"cannot save the mixture to {directory}: it is a file, give a folder")
    if directory.is_dir():
        ours = (directory / CONFIG_NAME).is_file() or not any(directory.glob("adapter_*"))
        if not ours:
            raise ValueError(f"cannot save the mixture to {directory}: it holds another adapter, give a new folder")


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def write_mixture(model: MoaModel, directory: Path, **kwargs: Any) -> None:
    """Write a new folder with everything that a mixture is; the caller moves it where it belongs."""
    if FALLBACK not in model.peft_config:
        model.set_fallback()
    kwargs.pop("selected_adapters", None)
    PeftModelForCausalLM.save_pretrained(model, str(directory), selected_adapters=[*model.experts, FALLBACK], **kwargs)
    config = model.moa_config
    config.versions = {package: version(package) for package in PACKAGES}
    config.sha256 = {name: file_sha256(directory / name / WEIGHTS_FILE) for name in model.experts}
    config.sha256[""] = file_sha256(directory / WEIGHTS_FILE)
    if model.moa_router is not None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.moa_router.state_dict().items()}
        save_file(state, directory / ROUTER_NAME)
        config.sha256[ROUTER_NAME] = file_sha256(directory / ROUTER_NAME)
    describe_mixture(model, directory)


def describe_mixture(model: MoaModel, directory: Path) -> None:
    """Write `moa_config.json` and the model card, also later, when there are scores to show."""
    (directory / CONFIG_NAME).write_text(model.moa_config.to_json())
    (directory / "README.md").write_text(mixture_card(model.moa_config, expert_ranks(model)))


def expert_ranks(model: MoaModel) -> dict[str, int]:
    """Rank of each expert, for the card."""
    return {name: model.peft_config[name].r for name in model.experts}


def load_mixture(
    cls: type[MoaModel],
    base: PreTrainedModel | str | None,
    source: str | Path,
    *,
    check_base: bool = True,
    **hub: Any,
) -> MoaModel:
    """See `MoaModel.from_pretrained`."""
    directory = _local_folder(source, **hub)
    config = MoaConfig.from_json(directory / CONFIG_NAME)
    _check_unchanged(directory, config)
    model = cls.from_adapters(
        load_base_model(config.base_model) if base is None else base,
        {name: directory / name for name in config.experts},
        router_layer=config.router_layer,
        check_base=check_base,
    )
    model.moa_config = config
    model.load_adapter(str(directory), FALLBACK)
    model.requires_grad_(False)
    if ROUTER_NAME in config.sha256:
        model.set_router(_read_router(directory / ROUTER_NAME))
    return model.eval()


def _local_folder(source: str | Path, **hub: Any) -> Path:
    if Path(source).is_dir():
        if not (Path(source) / CONFIG_NAME).is_file():
            raise ValueError(f"{source} is no saved mixture (it has no {CONFIG_NAME}): load a plain adapter with PEFT")
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(str(source), **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither a folder nor a Hub repository that could be downloaded "
            f"({str(error).splitlines()[0]}): check the name, your token and the network, and run it again"
        ) from error
    if not (directory / CONFIG_NAME).is_file():
        raise ValueError(f"the repository {source!r} is no saved mixture: it has no {CONFIG_NAME}")
    return directory


def _check_unchanged(directory: Path, config: MoaConfig) -> None:
    for name, expected in config.sha256.items():
        file = directory / name if name == ROUTER_NAME else directory / name / WEIGHTS_FILE
        if not file.is_file():
            raise ValueError(f"the mixture lacks {file}: the folder is incomplete, save or download it again")
        if file_sha256(file) != expected:
            raise ValueError(
                f"{file} was changed after the mixture was saved (its sha256 differs from {CONFIG_NAME}): the router "
                "and the scores belong to the old file, so fit the router again on the new adapters"
            )


def _read_router(file: Path) -> SequenceRouter:
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is no readable safetensors file ({error}): save or download the mixture again"
        ) from error
    experts, width = state["head.weight"].shape
    router = SequenceRouter(width, experts)
    router.load_state_dict(state)
    return router
