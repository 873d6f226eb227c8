"""What a report says of where a merge is from, and of layers that come to nothing."""

import shutil

import pytest

from moa.merging import merge
from moa.merging.cli import main


def test_a_merge_is_made_again_from_another_folder_after_all_moved_together(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merge([folder.name for folder in folders], output="out")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in [*(folder.name for folder in folders), "out"]:
        shutil.move(tmp_path / name, moved / name)
    main(["--config", str(moved / "out"), "--output", str(moved / "again")])
    for file in (moved / "out").iterdir():
        assert file.read_bytes() == (moved / "again" / file.name).read_bytes()


def test_an_adapter_whose_alpha_changed_is_not_the_adapter_that_was_merged(folders, edit_config, tmp_path, refusal):
    merge(folders, output=tmp_path / "out")
    edit_config(folders[0], lora_alpha=800)
    said = refusal(main, ["--config", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert "its config_sha256 is" in said
    assert not (tmp_path / "again").exists()


def test_updates_that_cancel_are_told(adapters):
    assert merge([adapters[0], adapters[0]], weights=[1, -1]).report.emptied == sorted(adapters[0].modules)
    assert merge(adapters[:2], weights=[1, -1]).report.emptied == []
    trimmed = merge(adapters[:2], "ctm", rank=2, density=0.2)  # floor(0.2 * 4) entries of each core
    assert trimmed.report.emptied == sorted(trimmed.modules)


def test_an_output_without_a_name_is_refused(folders):
    with pytest.raises(ValueError, match="the output folder is an empty path"):
        merge(folders, output="")
