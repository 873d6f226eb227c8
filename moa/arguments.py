"""The door of every entry point: dataclasses from a command line and a YAML file, and nothing ignored.

`parse` is TRL's `TrlParser` (the idiom of `trl/scripts/sft.py`) made strict. Left alone, TrlParser drops
`--config=x.yaml` (with `=`), a misspelt YAML key and a misspelt option without a word, and trains to the end
on defaults. Here each is one sentence on stderr and exit status 2, before anything has run.

    @run
    def main(argv: list[str] | None = None) -> None:
        script, training = parse((ScriptArguments, SFTConfig), argv, examples="moa train-lora --task mnli")
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from textwrap import dedent, indent
from typing import Any, get_type_hints

from moa.errors import OneLineParser, nearest, refuse, run
from moa.yaml_options import environment_of, read_options, value_of

__all__ = ["indented", "parse", "run"]


def parse(
    dataclass_types: type | Iterable[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    examples: str | None = None,
    first: str | None = None,
) -> tuple[Any, ...]:
    """Fill one instance of each dataclass: defaults, then `--config FILE.yaml`, then the command line.

    A scalar in the YAML file means what the same text means on the command line, so `1e-3` is a number and an
    unquoted `no` stays the word, not `False`. Options are spelt `--data_dir` or `--data-dir`, in full. The
    file's `env:` block is put into `os.environ` before the dataclasses are made, as TRL does.

    Args:
        dataclass_types: one dataclass or several; their `field(metadata={"help": ...})` is the `--help` text.
        argv: the arguments without the program's name; `sys.argv[1:]` when None.
        examples: commands to copy, shown at the end of `--help`.
        first: the option that a word before all options belongs to.

    Raises:
        SystemExit: with status 2 and one sentence on stderr for whatever cannot be used as asked.
    """
    wanted = (dataclass_types,) if isinstance(dataclass_types, type) else tuple(dataclass_types)
    argv = list(sys.argv[1:] if argv is None else argv)
    if first and argv and not argv[0].startswith("-"):
        argv.insert(0, f"--{first}")
    parser, files = _parsers(wanted, prog=prog, description=description, epilog=_epilog(examples))
    try:
        parser.refuse_unknown_options(argv)
        environment = _apply_config(parser, wanted, files.parse_known_args(argv)[0].config or [])
        _refuse_leftovers(parser.parse_known_args(argv)[1])
        os.environ.update(environment)
        # HfArgumentParser would also read a file named after the script (train.args), if there is one.
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[: len(wanted)]
    except (ValueError, TypeError, OSError) as error:
        refuse(error)


def indented(doc: str | None) -> str:
    """The indented lines of a module's docstring, which are its commands to copy."""
    return "\n".join(line.strip() for line in (doc or "").splitlines() if line.startswith("    "))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside each option, and examples with the line breaks they were written with."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._StoreFalseAction):  # HfArgumentParser gives `--no_x` the help of `--x`
            return f"the same as --{action.dest} false"
        return super()._get_help_string(action) or ""


def _parsers(wanted: tuple[Any, ...], **texts: str | None) -> tuple[Any, argparse.ArgumentParser]:
    """The parser of everything, and one of `--config` alone, since the file sets the other's defaults."""
    from trl import TrlParser

    class Parser(OneLineParser, TrlParser):
        pass

    files = OneLineParser(add_help=False)
    files.add_argument(
        "--config",
        action="append",
        metavar="FILE.yaml",
        help="YAML file of options, one `name: value` a line; the command line wins over it",
    )
    usage = "%(prog)s [--config FILE.yaml] [--option value ...]"
    shared: dict[str, Any] = {
        "parents": [files],
        "usage": usage,
        "formatter_class": _Help,
    }
    return Parser(wanted, **shared, **texts), files


def _epilog(examples: str | None) -> str | None:
    return "examples:\n" + indent(dedent(examples).strip(), "  ") if examples else None


def _refuse_leftovers(words: Sequence[str]) -> None:
    if words:
        hint = "--config" if words[0].endswith((".yaml", ".yml")) else "--NAME"
        raise ValueError(f"{words[0]!r} belongs to no option: write {hint} {words[0]}")


def _apply_config(parser: Any, wanted: tuple[type, ...], files: Sequence[str]) -> dict[str, str]:
    """Make the file's values the parser's defaults; return the variables of its `env:` block."""
    if not files:
        return {}
    if len(files) > 1:
        raise ValueError(f"--config was given {len(files)} times ({', '.join(files)}): give one file")
    hints = {name: hint for one in wanted for name, hint in get_type_hints(one).items()}
    # Reversed, because `--no_x` follows `--x` and shares its name.
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest in hints}
    values: dict[str, Any] = {}
    environment: dict[str, str] = {}
    for key, node, where in read_options(files[0]):
        if key == "env":
            environment = environment_of(node, where)
        elif key in actions:
            values[key] = value_of(node, actions[key], hints[key], f"{where}: {key}")
        else:
            raise ValueError(f"{where}: unknown option {key!r}{nearest(key, actions)} (--help lists all)")
    parser.set_defaults_with_config(**values)
    return environment
