"""The `moa` command: one table from command to module, each imported only when its command is called."""

import importlib
import signal
import sys

from moa.errors import INTERRUPTED, nearest, run

COMMANDS = {
    "merge": ("moa.merging.cli", "merge LoRA adapters into one"),
    "inspect": ("moa.merging.inspection", "compare adapters and say which belong together"),
    "methods": ("moa.merging.catalog", "list the merge methods and their options"),
    "train-lora": ("moa.training.train_lora", "train one LoRA adapter per task"),
    "train-moa": ("moa.training.train_moa", "train the router over trained adapters"),
    "fit-router": ("moa.training.fit_router", "fit the router of a saved mixture anew"),
    "fit-gates": ("moa.training.fit_gates", "train gates by which each token of a mixture chooses its experts"),
    "grow": ("moa.training.grow", "add experts to a saved mixture, or remove some"),
    "statistics": ("moa.training.collect_statistics", "collect the input statistics that some merges need"),
    "evaluate": (
        "moa.evaluation.full_evaluation",
        "compare base, adapters, mixture and merges",
    ),
    "compose": ("moa.evaluation.compose", "merge experts that agree, route between the rest, at every budget"),
    "push": ("moa.push", "upload a mixture or a merge to the Hub"),
    "env": ("moa.env", "print versions and hardware, for a bug report"),
}
EXAMPLES = """\
examples:
  moa merge adapters/sst2 adapters/mnli --output merged
  moa merge adapters/sst2 adapters/mnli --method ties --density 0.3 --weights 1 0.5 --output merged
  moa methods
  moa train-lora --task sst2 --model Qwen/Qwen2-0.5B
"""


def entry_point() -> None:
    """`moa` as a process of its own: once Ctrl-C has ended it, another one does not disturb how Python shuts down."""
    try:
        main()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise


@run
def main(argv: list[str] | None = None) -> None:
    """Hand the rest of the line to a command's `main(argv)`; importing it takes seconds, so Ctrl-C may come then."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command in ("-V", "--version"):
        from importlib.metadata import version

        print(f"moa-peft {version('moa-peft')}")
    elif command in COMMANDS:
        importlib.import_module(COMMANDS[command][0]).main(rest)
    else:
        hint = nearest(command, COMMANDS)
        print(f"error: moa has no command {command!r}: it has {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        raise SystemExit(2)


def usage() -> str:
    """The help page."""
    lines = [f"  {command:<12}{what}" for command, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moa COMMAND [options]",
            "",
            "Route between LoRA adapters or merge them, and know which is worth it.",
            "",
            "commands:",
            *lines,
            "",
            "`moa COMMAND --help` explains a command.",
            "",
            EXAMPLES,
        ]
    ).rstrip()
