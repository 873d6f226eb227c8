"""A kept answer is read again for the very same question only, and never half."""

import copy
import json
from types import SimpleNamespace

import pytest

from moa.evaluation import kept


@pytest.fixture
def keep(base_model, tmp_path):
    """Ask for an answer; `model` and `question` may be others than usual."""

    def ask(answer, question="scores?", model=base_model):
        store = kept.Kept(tmp_path / "cells", SimpleNamespace(get_base_model=lambda: model))
        return store.get("base--sst2", [question], lambda: {"answer": answer})["answer"]

    return ask


def test_the_same_question_to_the_same_model_is_answered_once(keep, tmp_path):
    assert keep("first") == "first" and keep("second") == "first"
    assert [file.name for file in (tmp_path / "cells").iterdir()] == ["base--sst2.json"]


def test_another_question_another_base_and_another_version_are_asked_anew(keep, base, monkeypatch):
    assert keep("first") == "first"
    assert keep("second", question="scores of other rows?") == "second"
    assert keep("third", model=base) == "third"
    eager = copy.deepcopy(base)
    eager.set_attn_implementation("eager")
    assert keep("by another attention", model=eager) == "by another attention"
    monkeypatch.setattr(kept, "version", lambda package: "0.0.1" if package == "peft" else "1")
    assert keep("fourth", model=base) == "fourth"


@pytest.mark.parametrize("content", [b"", b'{"key": "0', b"[1, 2]", b"null", b"{}", b"\xff\xfe", b'{"key": 3}'])
def test_a_file_that_is_cut_short_or_somebody_elses_is_computed_again(keep, tmp_path, content):
    keep("first")
    (tmp_path / "cells" / "base--sst2.json").write_bytes(content)
    assert keep("second") == "second"
    assert json.loads((tmp_path / "cells" / "base--sst2.json").read_text())["answer"] == "second"


def test_an_answer_that_fails_leaves_what_was_there(keep, base, tmp_path):
    keep("first")
    with pytest.raises(TypeError):
        keep(object(), model=base)
    assert keep("second") == "first"
