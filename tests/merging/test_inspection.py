"""`moa inspect`: tables, JSON, a folder with a picture, and one sentence for bad input."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from moa.merging.geometry import geometry
from moa.merging.geometry_picture import draw
from moa.merging.inspection import main, tables

Q = "model.layers.0.self_attn.q_proj"


def printed(found, width=120):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables(found), highlight=False)
    return console.export_text()


def test_the_console_shows_adapters_pairs_and_a_suggestion(folders, capsys):
    main([*map(str, folders), "--weights", "1", "-0.5", "1"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("adapters", "cosine", "input overlap", "sign conflict", "-0.5"))
    assert "the weighted sum cancels" in out and "suggestion:" in out


def test_json_is_what_the_function_returns_and_nothing_else(folders, capsys):
    main([*map(str, folders), "--weights", "1", "0.5", "1", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(geometry(folders, [1, 0.5, 1]).to_dict()))


def test_an_adapter_that_took_part_of_the_base_is_compared_by_what_its_training_changed(
    folders, edit_config, edit_weights, tmp_path, capsys
):
    norm = float(geometry(folders).whole.norms[0])
    before = tmp_path / "before"
    shutil.copytree(folders[0], before)
    edit_weights(before, lambda tensors: {k: t * 0.25 if "lora_B" in k else t for k, t in tensors.items()})
    edit_config(folders[0], init_lora_weights="pissa")
    main([*map(str, folders), "--initial", f"a={before}", "--json"])
    assert json.loads(capsys.readouterr().out)["whole"]["norms"][0] == pytest.approx(0.75 * norm)


def test_output_is_a_folder_with_the_numbers_and_a_picture(folders, tmp_path, capsys):
    main([*map(str, folders), "--output", str(tmp_path / "new" / "out")])
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["out"]
    assert sorted(file.name for file in (tmp_path / "new" / "out").iterdir()) == ["geometry.json", "geometry.png"]
    stored = json.loads((tmp_path / "new" / "out" / "geometry.json").read_text())
    assert stored["names"] == ["a", "b", "c"] and len(stored["layers"]) == 3
    picture = imread(tmp_path / "new" / "out" / "geometry.png")
    assert picture.shape[0] > 500 and len(np.unique(picture[..., 0])) > 20


def test_the_picture_holds_the_numbers_in_the_order_of_the_tree(adapters):
    found = geometry([adapters[0], adapters[2], adapters[0]])
    cosines, signs, overlaps, mean, largest, groups, cancelled = draw(found).axes
    order = [label.get_text() for label in cosines.get_yticklabels()]
    for panel in (signs, overlaps, mean, largest):
        assert order == [label.get_text() for label in panel.get_yticklabels()]
    assert order == [label.get_text() for label in sorted(groups.get_yticklabels(), key=lambda t: t.get_position()[1])]
    assert groups.yaxis_inverted() and cosines.yaxis_inverted()  # both from top to bottom
    texts = {text.get_position(): text.get_text() for text in cosines.texts}
    column, row = order.index("a"), order.index("a#2")
    assert abs(column - row) == 1 and texts[column, row] == "1.00" and (row, row) not in texts
    assert [line.get_label() for line in cancelled.lines] == ["down_proj", "q_proj", "v_proj", "if orthogonal"]


@pytest.mark.parametrize(
    ("panel", "above", "below", "digits"),
    [
        (1, "sign_conflict", "sign_conflict", 2),
        (2, "input_overlap", "output_overlap", 2),
        (3, "input_mean_angle", "output_mean_angle", 1),
        (4, "input_largest_angle", "output_largest_angle", 1),
    ],
)
def test_inputs_stand_above_the_diagonal_and_outputs_below(panel, above, below, digits, adapters):
    found = geometry(adapters)
    axes = draw(found).axes[panel]
    names = [label.get_text() for label in axes.get_yticklabels()]
    got = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(got) == 6
    for (column, row), text in got.items():
        expected = getattr(found.whole, above if column > row else below)
        place = found.names.index(names[row]), found.names.index(names[column])
        assert text == f"{float(expected[place]):.{digits}f}"


def test_the_line_where_adapters_agree_is_in_the_picture_even_if_all_do(adapters):
    groups = draw(geometry([adapters[0], adapters[0]])).axes[5]
    left, right = groups.get_xlim()
    assert left > 0.9 > right


def test_what_is_undefined_is_a_dash(adapters):
    alone = replace(
        adapters[2], name="alone", modules={"other": adapters[2].modules["model.layers.0.self_attn.q_proj"]}
    )
    found = geometry([adapters[0], alone])
    row, angles = (line for line in printed(found).splitlines() if "a " in line and "alone" in line)
    assert "0.000" in row and row.count("- ") == 3 and angles.count("- ") == 4
    draw(found)


def test_of_many_pairs_only_the_most_and_least_alike_are_shown(adapters):
    many = printed(geometry([adapters[index % 3] for index in range(9)]))
    assert "the 14 pairs most alike and the 14 least (--json has all)" in many
    assert many.count("1.000 │         1.000 │          1.000") == 9


def test_the_angles_of_each_pair_are_shown_in_degrees_and_fit_a_narrow_console(adapters):
    found = geometry(adapters)
    _, angles = printed(found, width=80).split("their principal angles, in degrees")
    (row,) = (line for line in angles.splitlines() if line.startswith("│ a ") and " b " in line)
    got = [float(cell) for cell in row.strip("│ ").split("│")[2:]]
    whole = found.whole
    of = (whole.input_mean_angle, whole.input_largest_angle, whole.output_mean_angle, whole.output_largest_angle)
    assert got == [round(float(one[0, 1]), 1) for one in of]
    assert got[0] < got[1] and 0 < got[0] < 90  # a and b share a direction of their inputs
    assert "input_largest_angle" in found.to_dict()["whole"]


def test_layers_that_cancel_more_than_orthogonal_ones_are_named(adapters):
    found = geometry(adapters, [1, -1, 1])
    excess = {m: of.cancellation - of.cancellation_if_orthogonal for m, of in found.layers.items()}
    worst = max(excess, key=excess.get)
    text = printed(found, width=400)
    assert excess[worst] > 0
    assert f"more than orthogonal updates would in {worst} ({found.layers[worst].cancellation:.1%})" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: words[:1], "geometry compares adapters and needs at least two, got 1"),
        (lambda words: [*words, "nowhere"], "there is no adapter folder nowhere: check the path"),
        (lambda words: [*words, "--weights", "1"], "weights must be one for each adapter: got 1 for 3 adapters"),
        (lambda words: [*words, "--weigths", "1"], "unknown option --weigths; did you mean '--weights'?"),
        (lambda words: [*words, "--output", words[0]], "exists already: choose another output folder"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(change, message, folders, refusal):
    assert message in refusal(main, change([*map(str, folders)]))


def test_adapters_of_other_base_models_are_refused_unless_told_otherwise(folders, edit_config, refusal, capsys):
    edit_config(folders[1], base_model_name_or_path="other/base")
    assert "'tiny/base'" in refusal(main, [*map(str, folders)])
    main([*map(str, folders), "--no-check-base"])
    assert "suggestion" in capsys.readouterr().out


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:\n  moa inspect" in capsys.readouterr().out
