"""When two names mean one base model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moa.base_model import BUNDLED_MODEL, COMPARED, same_base


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


@pytest.fixture
def weights(models):
    """Put tensors into one of the folders, one file each or all in one."""
    drawn = torch.Generator().manual_seed(0)
    tensors = {
        "model.norm.weight": torch.randn(8, generator=drawn),
        "model.embed.weight": torch.randn(COMPARED // 2, 8, generator=drawn).bfloat16(),
        "model.scale": torch.tensor(0.5),
        "model.empty": torch.zeros(0, 3),
    }

    def put(folder, files=1, **changed):
        changed = tensors | {f"model.{name.replace('_', '.')}": tensor for name, tensor in changed.items()}
        for index in range(files):
            part = {name: changed[name] for name in sorted(changed)[index::files]}
            save_file(part, f"{folder}/model-{index}.safetensors" if files > 1 else f"{folder}/model.safetensors")
        return tensors

    return put


def test_a_copy_has_the_same_tensors_however_they_are_cut_into_files(weights):
    weights("a/tiny")
    assert same_base("a/tiny", "copy/other-name")  # where no weights are, the config decides
    weights("copy/other-name", files=3)
    assert same_base("a/tiny", "copy/other-name") and same_base("copy/other-name", "a/tiny")


@pytest.mark.parametrize(
    "change",
    [
        lambda of: {"norm_weight": of["model.norm.weight"] + torch.eye(8)[7] * 1e-6},
        lambda of: {"embed_weight": of["model.embed.weight"] * 1.01},
        lambda of: {"embed_weight": of["model.embed.weight"].float()},
        lambda of: {"embed_weight": of["model.embed.weight"].view(8, -1)},
        lambda of: {"scale": torch.tensor(0.25)},
        lambda of: {"head_weight": torch.ones(2)},
    ],
    ids=["small tensor", "large tensor", "dtype", "shape", "number", "one more"],
)
def test_a_fine_tune_with_the_config_of_its_base_model_is_another_model(weights, change):
    weights("copy/other-name", **change(weights("a/tiny")))
    assert not same_base("a/tiny", "copy/other-name") and not same_base("copy/other-name", "a/tiny")


def test_damaged_weights_are_one_sentence(weights):
    weights("a/tiny")
    Path("copy/other-name/model.safetensors").write_bytes(Path("a/tiny/model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"other-name/model.safetensors is damaged or incomplete .*: copy or"):
        same_base("a/tiny", "copy/other-name")


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
