"""The command table: every command is listed, found, and imported only when called."""

import importlib
import subprocess
import sys
import types

import pytest

from moa.cli import COMMANDS, main


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


def test_help_imports_nothing_heavy():
    program = "import sys, moa.cli; moa.cli.main(['--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "peft", "rich", "numpy"} & set(out.split())


def test_env_prints_versions(capsys):
    main(["env"])
    facts = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert facts["python"] == sys.version.split()[0]
    assert {"torch", "peft", "transformers", "moa-peft"} <= facts.keys()


def test_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("moa-peft ")
