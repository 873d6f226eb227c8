"""`moa push`: a saved mixture, or one adapter or model fused from it, to the Hub."""

from __future__ import annotations

import argparse

from moa.errors import run

EXAMPLES = """examples:
  moa push outputs/moa me/my-mixture
  moa push outputs/moa me/my-merge --fused adapter --method ties
  moa push outputs/moa me/my-model --fused model --private
"""


@run
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="moa push",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mixture", help="folder of a saved mixture")
    parser.add_argument("repo_id", help="repository on the Hub, such as me/my-mixture; made if it is not there")
    parser.add_argument(
        "--fused", choices=("adapter", "model"), help="push the fallback alone, or folded into the base model"
    )
    parser.add_argument("--method", help="merge the experts anew by this method first ('moa methods' lists them)")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--commit_message", help="message of the commit")
    arguments = parser.parse_args(argv)
    from moa.model import MoaModel

    model = MoaModel.from_pretrained(None, arguments.mixture)
    if arguments.method is not None:
        model.set_fallback(arguments.method)
    address = model.push_to_hub(
        arguments.repo_id,
        fused=arguments.fused,
        private=arguments.private or None,
        commit_message=arguments.commit_message,
    )
    print(f"pushed to {address}")
