"""When two names mean one base model."""

import subprocess
import sys
from pathlib import Path

import pytest

from moa.base_model import BUNDLED_MODEL, same_base


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A working folder with a/tiny, a copy of it, a different b/tiny, and two folders without a config."""
    monkeypatch.chdir(tmp_path)
    for folder, config in {"a/tiny": "{}", "copy/other-name": "{}", "b/tiny": '{"n": 2}', "c/tiny": None}.items():
        Path(folder).mkdir(parents=True)
        if config is not None:
            Path(folder, "config.json").write_text(config)
    Path("d/tiny").mkdir(parents=True)
    Path("link").symlink_to("c/tiny")
    return tmp_path


def test_two_folders_of_one_last_name_are_not_one_model(models):
    assert not same_base("a/tiny", "b/tiny")
    assert not same_base("c/tiny", "a/tiny")
    assert not same_base("c/tiny", "d/tiny")


def test_a_folder_is_itself_however_it_is_spelt_and_its_copy_is_the_same_model(models):
    assert same_base("a/tiny", str(models / "a" / "tiny"))
    assert same_base("./a/tiny/", "a/tiny")
    assert same_base("link", "c/tiny")
    assert same_base("a/tiny", "copy/other-name")


def test_a_repository_and_a_folder_of_its_name_are_one_model(models):
    assert same_base("owner/tiny", "a/tiny")
    assert same_base("/on/another/machine/tiny", "owner/tiny")
    assert not same_base("owner/tiny", "copy/other-name")


def test_two_repositories_are_two_models(models):
    assert same_base("owner/tiny", "owner/tiny")
    assert not same_base("owner/tiny", "other/tiny")


def test_the_bundled_model_is_the_folder_it_is_converted_into_and_its_repository(tmp_path):
    converted = tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"
    for name in (str(converted), "HuggingFaceTB/SmolLM2-135M-Instruct", BUNDLED_MODEL):
        assert same_base(BUNDLED_MODEL, name) and same_base(name, BUNDLED_MODEL)
    assert not same_base(BUNDLED_MODEL, "HuggingFaceTB/SmolLM2-360M-Instruct")


def test_comparing_names_loads_nothing_heavy():
    program = "import sys, moa.base_model as m; m.same_base('a/b', 'c/b'); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "peft"} & set(out.split())
