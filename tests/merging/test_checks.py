"""Adapters that do not belong together are refused before anything is merged."""

from dataclasses import replace

import pytest

from moa.adapters import AdapterError
from moa.merging import merge
from moa.merging.checks import check_same_base
from moa.merging.cli import main


def of_type(adapter, task_type):
    return replace(adapter, config={"task_type": task_type})


def test_adapters_of_two_task_types_are_refused_unless_told_otherwise(adapters):
    mixed = [of_type(adapters[0], "CAUSAL_LM"), adapters[1], of_type(adapters[2], "SEQ_CLS")]
    with pytest.raises(AdapterError, match=r"adapter 'a' is for CAUSAL_LM and 'c' for SEQ_CLS: .* check_base=False"):
        merge(mixed)
    assert merge(mixed, check_base=False).task_type is None


def test_a_task_type_that_is_not_known_stands_in_nobodys_way(adapters):
    check_same_base([of_type(adapters[0], "CAUSAL_LM"), of_type(adapters[1], None), adapters[2]])
    check_same_base([of_type(adapters[0], "CAUSAL_LM"), of_type(adapters[1], "CAUSAL_LM")])
    check_same_base([of_type(adapters[0], None)])


def test_the_command_line_refuses_two_task_types_in_one_sentence(folders, edit_config, refusal, tmp_path):
    for folder, task_type in zip(folders, ("CAUSAL_LM", "CAUSAL_LM", "SEQ_CLS"), strict=True):
        edit_config(folder, task_type=task_type)
    words = [*map(str, folders), "--output", str(tmp_path / "out")]
    assert "adapter 'a' is for CAUSAL_LM and 'c' for SEQ_CLS" in refusal(main, words)
    main([*words, "--no-check-base"])
    assert (tmp_path / "out").is_dir()
