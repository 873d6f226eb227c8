"""Aliases of YAML: shared values are fine, those that blow up are refused in one sentence wherever a file is read."""

import pytest
import yaml

from moa.tasks.definition import read_task
from moa.yaml_nodes import LARGEST, composed
from moa.yaml_options import read_mapping, read_options

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
LONG = f"a: &a {'ha' * 1000}\nb: [{', '.join(['*a'] * 1000)}]\n"


@pytest.mark.parametrize("read", [read_mapping, read_options, read_task])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "aliases (*name) stand for more than 1,000,000 characters"),
        (MERGED, "aliases (*name) stand for more than 1,000,000 characters"),
        (LONG, "aliases (*name) stand for more than 1,000,000 characters"),
        ("a: &a [1, *a]\n", "an alias (*name) of what it is itself part of"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: " + "[" * 101 + "]" * 101, "nested too deeply"),
        ("a: " + "{? " * 300 + "x" + "}" * 300, "nested too deeply"),
    ],
)
def test_a_text_that_blows_up_is_refused_by_everything_that_reads_one(read, text, said, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ValueError) as refusal:
        read(str(tmp_path / "file.yaml"))
    assert said in str(refusal.value) and "file.yaml" in str(refusal.value) and len(str(refusal.value)) < 400


def test_values_may_be_shared_and_a_text_without_aliases_may_be_long(tmp_path):
    (tmp_path / "file.yaml").write_text("a: &a [1, {b: 2}]\nc: [*a, *a]\nd: *a\n")
    assert read_mapping(str(tmp_path / "file.yaml")) == {
        "a": [1, {"b": 2}],
        "c": [[1, {"b": 2}], [1, {"b": 2}]],
        "d": [1, {"b": 2}],
    }
    assert composed(f"a: {'x' * (2 * LARGEST)}", yaml.SafeLoader) is not None
    assert composed("", yaml.SafeLoader) is None
