"""The command table: every command is listed, found, and imported only when called."""

import importlib
import os
import signal
import subprocess
import sys
import types
import warnings

import pytest

from moa.cli import COMMANDS, entry_point, main
from moa.errors import OneLineParser


def test_help_lists_every_command_with_examples(capsys):
    main(["--help"])
    page = capsys.readouterr().out
    assert all(f"  {command} " in page for command in COMMANDS)
    assert "examples:\n  moa merge" in page
    assert max(map(len, page.splitlines())) <= 100


def test_a_command_gets_the_rest_of_the_line(monkeypatch):
    calls = []
    fake = types.SimpleNamespace(main=calls.append)
    monkeypatch.setattr(importlib, "import_module", lambda name: {"moa.merging.cli": fake}[name])
    main(["merge", "A", "--rank", "3"])
    assert calls == [["A", "--rank", "3"]]


def test_an_unknown_command_gets_the_nearest_one_and_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["mrge"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: moa has no command 'mrge'") and line.endswith("did you mean 'merge'?")


def test_ctrl_c_while_a_command_is_imported_is_one_word(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["merge"])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_more_ctrl_c_while_python_shuts_down_are_no_traceback():
    program = """
import atexit, importlib, os, signal, sys
from moa import cli

def interrupted(name):
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), print("shut down")))
importlib.import_module = interrupted
sys.argv = ["moa", "merge"]
cli.entry_point()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "shut down\n", "interrupted\n")


def test_ctrl_c_goes_on_to_work_where_a_command_ended_otherwise(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["moa", "mrge"])
    with pytest.raises(SystemExit):
        entry_point()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("printed", ["'word\\n'", "'word\\n' * 100_000"])
@pytest.mark.parametrize("ends", ["", "; raise SystemExit(0)"])
def test_a_reader_that_stops_reading_ends_the_command_without_a_word(printed, ends):
    program = f"import sys; from moa.errors import run; run(lambda: exec({f'sys.stdout.write({printed}){ends}'!r}))()"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()  # it has gone before the first word
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    writer = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, env=buffered, check=False)
    reader.stdin.close()
    assert (writer.returncode, writer.stderr) == (1, b"")


def test_a_command_without_an_output_ends_well():
    command = f"{sys.executable} -c 'import moa.cli; moa.cli.main([\"--help\"])' >&-"
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=True).stderr == b""


def test_help_imports_nothing_heavy():
    program = "import sys, moa.cli; moa.cli.main(['--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "peft", "rich", "numpy"} & set(out.split())


def test_env_prints_versions(capsys):
    main(["env"])
    facts = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert facts["python"] == sys.version.split()[0]
    assert {"torch", "peft", "transformers", "moa-peft"} <= facts.keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("methods --jsn", "unknown option --jsn; did you mean '--json'?"),
        ("push --metod ties", "unknown option --metod; did you mean '--method'?"),
        ("push mixture me/repo --fuse adapter", "unknown option --fuse; did you mean '--fused'?"),
        ("env --jsn", "unknown option --jsn (--help lists all)"),
    ],
)
def test_a_misspelt_option_of_any_command_gets_the_nearest_one_in_full(line, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert message in sentence


def test_what_follows_two_dashes_is_no_option(capsys):
    parser = OneLineParser()
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--word"]).words == ["--word"]


def test_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("moa-peft ")


def test_a_command_leaves_warnings_as_they_were_shown(capsys):
    usual, filters = warnings.formatwarning, list(warnings.filters)
    main(["--version"])
    assert warnings.formatwarning is usual and warnings.filters == filters


def test_what_libraries_say_to_each_other_is_not_told_to_the_user():
    script = (
        "import warnings\nfrom moa.errors import run\n@run\ndef main():\n"
        "    warnings.warn('`is_gradient_checkpointing` is deprecated and will be removed in v6.', FutureWarning)\n"
        "    warnings.warn('this is yours to mend', UserWarning)\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: this is yours to mend\n"
