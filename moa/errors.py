"""How an error reaches the person who can mend it: one sentence, the nearest valid name, exit status 2."""

import argparse
import difflib
import functools
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, ParamSpec, TypeVar

from safetensors import SafetensorError

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
BETWEEN_LIBRARIES = "`is_gradient_checkpointing` is deprecated"
"""Which warning is not for the user: PEFT asks transformers for what it has renamed, with every model."""
P = ParamSpec("P")
T = TypeVar("T")


def run(main: Callable[P, T]) -> Callable[P, T]:
    """Decorate an entry point: what the user can mend ends in one line and status 2, without a traceback.

    `ValueError` and `OSError` (a missing file, no network, a full disk) are for the user; any other exception is a bug
    of ours and keeps its traceback. A warning is one line, without its place in the source. Ctrl-C exits with 130, a
    reader of our output that has gone, as `head` does, with 1. `MOA_TRACEBACK=1` shows every traceback.
    """

    @functools.wraps(main)
    def entry_point(*args: P.args, **kwargs: P.kwargs) -> T:
        usual, warnings.formatwarning = warnings.formatwarning, _one_line_warning
        try:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=BETWEEN_LIBRARIES)
                    return main(*args, **kwargs)
            finally:
                warnings.formatwarning = usual
                print(end="", flush=True)  # at exit, where Python would flush, nothing could catch the error
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of the output goes nowhere
            raise SystemExit(1) from None
        except (ValueError, OSError) as error:
            refuse(error)
        except SafetensorError as error:
            refuse(
                OSError(f"a file could not be written or read ({error}): see that the disk has room, and run it again")
            )

    return entry_point


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose usage does not bury the one sentence that matters; options are spelt in full."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self._negative_number_matcher = NEGATIVE_NUMBER  # argparse's own takes -1e-3 for an option

    def parse_args(self, args=None, namespace=None):  # the signature of argparse, which has overloads
        """As argparse, but a misspelt option is named with the nearest one there is."""
        self.refuse_unknown_options(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def refuse_unknown_options(self, argv: Iterable[str]) -> None:
        """Before argparse, which would miss the required option that was misspelt, not the misspelling."""
        options = self._option_string_actions
        for word in itertools.takewhile(lambda word: word != "--", argv):
            name = word.split("=", 1)[0]
            if re.match(r"--?[A-Za-z]", name) and " " not in name and name not in options:
                self.error(f"unknown option {name}{nearest(name, options)} (--help lists all)")

    def error(self, message: str) -> NoReturn:
        refuse(ValueError(message))


def refuse(error: Exception) -> NoReturn:
    """End the process with `error: one sentence` on stderr and status 2."""
    if os.environ.get("MOA_TRACEBACK") == "1":
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2) from None


def one_line(error: BaseException) -> str:
    """An exception's message on one line; the operating system's own as `file: reason`."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """What an error says first; its kind, where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """The ending of an error about an unknown name: "; did you mean 'x'?", or nothing when none is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
