"""`moa push`: a saved mixture, or one adapter or model fused from it, to the Hub."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moa.errors import OneLineParser, run

if TYPE_CHECKING:
    from moa.model import MoaModel

EXAMPLES = """examples:
  moa push outputs/moa me/my-mixture
  moa push outputs/moa me/my-merge --fused adapter --method ties --weights 1 1 0.5 --scale 0.8
  moa push outputs/moa me/my-model --fused model --private
"""


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="moa push",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("mixture", help="folder of a saved mixture")
    add("repo_id", help="repository on the Hub, such as me/my-mixture; made if it is not there")
    add("--fused", choices=("adapter", "model"), help="push the fallback alone, or folded into the base model")
    add("--method", help="merge the experts anew by this method first ('moa methods' lists them)")
    add("--weights", nargs="+", type=float, help="with --method: one for each expert (default: 1/N each)")
    add("--rank", type=int, help="with --method: rank of the merge (default: the method's own)")
    add("--scale", type=float, help="with --method: factor on the merge (default: 1.0)")
    add(
        *("--no_check_base", "--no-check-base"),
        dest="check_base",
        action="store_false",
        help="accept adapters of other base models",
    )
    add("--private", action="store_true", help="make the repository private")
    add("--commit_message", help="message of the commit")
    return parser


@run
def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    options = {name: getattr(arguments, name) for name in ("weights", "rank", "scale")}
    given = {name: value for name, value in options.items() if value is not None}
    if given and arguments.method is None:
        raise ValueError(f"--{next(iter(given))} belongs to a new merge: name its --method too")
    from moa.model import MoaModel

    model = MoaModel.from_pretrained(None, arguments.mixture, check_base=arguments.check_base)
    if arguments.method is not None:
        model.set_fallback(arguments.method, **given)
    address = model.push_to_hub(
        arguments.repo_id,
        fused=arguments.fused,
        private=arguments.private or None,
        commit_message=arguments.commit_message,
    )
    print(f"pushed to {address}")


def push_mixture(
    model: MoaModel,
    repo_id: str,
    *,
    fused: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """See `MoaModel.push_to_hub`.

    Raises:
        ValueError: `fused` is neither None, "adapter" nor "model".
    """
    if fused not in (None, "adapter", "model"):
        raise ValueError(f"fused={fused!r} does not exist: choose 'adapter', 'model', or leave it out for the mixture")
    from huggingface_hub import HfApi

    from moa.saving import write_mixture

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="moa-push-") as scratch:
        folder = Path(scratch) / "push"
        write_mixture(model, folder)
        if fused is not None:
            folder = _fuse(model, folder, fused)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload {fused or 'mixture of LoRAs'}",
        )
    return str(commit.commit_url)


def _fuse(model: MoaModel, mixture: Path, form: str) -> Path:
    """From a written mixture: its root adapter alone, or the base model with that adapter folded in."""
    from peft import PeftModelForCausalLM

    from moa.adapters import WEIGHTS_FILE
    from moa.base_model import load_base_model, load_tokenizer
    from moa.card import fused_card
    from moa.saving import expert_ranks

    fused = mixture.parent / "fused"
    fused.mkdir()
    if form == "adapter":
        for name in ("adapter_config.json", WEIGHTS_FILE):
            shutil.copy2(mixture / name, fused / name)
    else:
        base = load_base_model(model.moa_config.base_model, dtype=None)
        PeftModelForCausalLM.from_pretrained(base, str(mixture)).merge_and_unload().save_pretrained(fused)
        load_tokenizer(model.moa_config.base_model).save_pretrained(fused)
    (fused / "README.md").write_text(fused_card(model.moa_config, expert_ranks(model), form))
    return fused
