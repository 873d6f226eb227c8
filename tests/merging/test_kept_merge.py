"""`moa merge --state`: whatever came, went or was re-weighted is as a fresh merge; a refusal changes nothing."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from moa.adapters import read_adapter, write_adapter
from moa.merging import RankRule, merge
from moa.merging.cli import main
from moa.merging.incremental import MergeState
from moa.merging.kept_merge import merge_kept
from moa.merging.layers import no_progress
from moa.merging.state_files import held

WEIGHTS = ["0.7", "0.5", "-0.9"]


def dense(folder):
    return {m: u.B @ u.A for m, u in read_adapter(folder, dtype=torch.float64).modules.items()}


def assert_same_change(folder, expected, tolerance=1e-6):
    """Factors may differ, and the last digits of what float32 holds; the matrices do not."""
    got = dense(folder)
    assert got.keys() == expected.keys()
    for module, matrix in expected.items():
        assert (got[module] - matrix).norm() <= tolerance * matrix.norm(), module


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def by_svd(matrix, rank):
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def summed(folders, weights):
    changes = [dense(folder) for folder in folders]
    return {m: sum(w * change[m] for w, change in zip(weights, changes, strict=True)) for m in changes[0]}


@pytest.fixture
def command(tmp_path):
    """Run `moa merge --state`, and give back the folder that it wrote."""
    runs = iter(range(100))

    def run(*words):
        output = tmp_path / f"out{next(runs)}"
        main([*map(str, words), "--state", str(tmp_path / "kept"), "--output", str(output)])
        return output

    return run


@pytest.fixture
def kept(command, folders, tmp_path):
    """The folder of a state of "a" and "b" with weights of their own."""
    command(*folders[:2], "--weights", "0.7", "0.5")
    return tmp_path / "kept"


def test_a_new_state_is_merged_as_its_adapters_are(command, folders):
    assert_same_change(command(*folders, "--weights", *WEIGHTS, "--rank", "9"), summed(folders, [0.7, 0.5, -0.9]))


def test_adding_removing_and_reweighting_are_a_fresh_merge_of_what_is_left(command, folders, kept):
    added = command("--add", f"{folders[2]}=-0.9", "--rank", "9")
    assert_same_change(added, summed(folders, [0.7, 0.5, -0.9]))
    assert_same_change(command("--remove", "b", "--rank", "6"), summed(folders[::2], [0.7, -0.9]))
    assert_same_change(command("--reweight", "a=2", "c=-1e-1", "--rank", "6"), summed(folders[::2], [2, -0.1]))
    assert MergeState.load(kept).weights == {"a": 2.0, "c": -0.1}


def test_what_takes_several_values_may_be_given_several_times(command, folders, kept):
    words = ["--add", f"{folders[2]}=1", "--reweight", "a=3", "--reweight", "b=0.2", "--rank", "9"]
    assert_same_change(command(*words), summed(folders, [3, 0.2, 1]))
    assert_same_change(command("--remove", "a", "--remove", "b", "--rank", "3"), summed(folders[2:], [1]))


def test_all_changes_may_be_asked_for_at_once(command, folders, kept):
    output = command("--add", f"{folders[2]}=3", "--remove", "a", "--reweight", "b=0.25", "--rank", "6")
    assert_same_change(output, summed(folders[1:], [0.25, 3]))


def test_equal_weights_follow_the_number_of_members(command, folders):
    command(*folders[:2])
    assert_same_change(command("--add", folders[2], "--rank", "9"), summed(folders, [1 / 3] * 3))
    assert_same_change(command("--remove", "a", "--rank", "6"), summed(folders[1:], [1 / 2] * 2))


def test_every_time_another_method_with_its_options(command, folders, kept, tmp_path):
    words = ["--density", "0.5", "--rank", "4", "--scale", "2", "--restore-norm", "--dtype", "float64", "--seed", "3"]
    settings = {"rank": 4, "scale": 2, "restore_norm": True, "dtype": "float64", "seed": 3, "density": 0.5}
    for method in ("ties", "dare_ties"):
        output = command("--method", method, *words, "--name", "mine")
        fresh = merge(folders[:2], method, weights=[0.7, 0.5], name="mine", **settings)
        assert_same_change(output, {m: u.delta() for m, u in fresh.modules.items()}, tolerance=1e-10)
        report = json.loads((output / "merge_report.json").read_text())
        assert report["name"] == "mine" and report["options"] == fresh.report.options
        assert [source["sha256"] for source in report["sources"]] == [read_adapter(f).sha256 for f in folders[:2]]


def test_the_flags_of_a_rule_for_ranks_reach_it(command, folders, kept):
    output = command("--rank", "auto", "--rank-energy", "0.6", "--max-rank", "3")
    fresh = merge(folders[:2], rank=RankRule(energy=0.6, max_rank=3), weights=[0.7, 0.5])
    report = json.loads((output / "merge_report.json").read_text())
    assert report["rank"]["energy"] == 0.6
    got = {module: layer["rank"] for module, layer in report["layers"].items()}
    assert got == {module: layer.rank for module, layer in fresh.report.layers.items()}


def test_a_state_is_changed_without_writing_an_adapter(kept, tmp_path, capsys):
    main(["--state", str(kept), "--reweight", "a=5"])
    assert "no --output was given, so no adapter was written" in capsys.readouterr().out
    assert MergeState.load(kept).weights == {"a": 5.0, "b": 0.5}


def test_a_merge_of_a_state_can_be_made_again_from_the_adapters(command, folders, kept, tmp_path):
    output = command("--add", f"{folders[2]}=-0.9", "--rank", "9")
    main(["--config", str(output), "--output", str(tmp_path / "again")])
    assert_same_change(tmp_path / "again", dense(output))


def test_a_truncated_state_keeps_the_sum_at_its_rank_and_reports_the_bound(command, folders, tmp_path):
    output = command(*folders, "--weights", *WEIGHTS, "--state-rank", "9")
    assert_same_change(output, summed(folders, [0.7, 0.5, -0.9]))
    assert_same_change(command("--reweight", "c=0.4", "--remove", "a"), summed(folders[1:], [0.5, 0.4]))
    assert not (tmp_path / "kept" / "a").exists() and MergeState.load(tmp_path / "kept").rank == 9


def test_a_truncated_state_of_one_cut_is_the_best_of_its_rank(command, folders):
    output = command(folders[0], "--weights", "2", "--state-rank", "2")
    assert_same_change(output, {m: by_svd(2 * matrix, 2) for m, matrix in dense(folders[0]).items()})
    report = json.loads((output / "merge_report.json").read_text())
    for module, matrix in dense(folders[0]).items():
        S = torch.linalg.svdvals(2 * matrix)
        assert report["layers"][module]["facts"]["error_bound"] == pytest.approx(float(S[2:].norm() / S[:2].norm()))


def test_adapters_of_other_bases_are_let_in_once_that_was_said(command, folders, kept, edit_config, refusal, tmp_path):
    edit_config(folders[2], base_model_name_or_path="other/base")
    change = ["--add", f"{folders[2]}=1", "--rank", "9"]
    assert "'other/base'" in refusal(main, [*change, "--state", str(kept), "--output", str(tmp_path / "no")])
    assert_same_change(command(*change, "--no-check-base"), summed(folders, [0.7, 0.5, 1]))
    assert_same_change(command("--rank", "9"), summed(folders, [0.7, 0.5, 1]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{a}"], "holds a merge already: change it by --add, --remove and --reweight"),
        (["--weights", "1", "1"], "holds a merge already"),
        (["--state-rank", "4"], "holds a merge already"),
        (["--add", "{a}=1"], "the state has a member 'a' already"),
        (["--add", "{c}"], "the members have weights of their own: give 'c' one too"),
        (["--add", "{c}=nan"], "the weight of 'c' must be a finite number"),
        (["--add", "nowhere/at/all=1"], "nowhere/at/all"),
        (["--remove", "d"], "the state has no member 'd': it has a, b"),
        (["--remove", "a", "b"], "'b' is the only member"),
        (["--remove", "a", "--reweight", "a=1"], "the state has no member 'a'"),
        (["--reweight", "a"], "--reweight: must be NAME=VALUE, got 'a'"),
        (["--reweight", "a=much"], "--reweight: must be NAME=NUMBER, got 'a=much'"),
        (["--reweight", "=1"], "--reweight: must be NAME=VALUE, got '=1'"),
        (["--reweight", "d=1"], "the state has no member 'd'"),
        (["--reweight", "a=inf"], "the weight of 'a' must be a finite number"),
        (["--reweight", "a=0", "b=0"], "all weights are zero"),
        (["--reweight", "a=1", "b=2", "a=3"], "--reweight gives 'a' 2 weights"),
        (["--config", "recipe.yaml"], "a merge is kept from adapters, not from a recipe"),
        (["--remove", "a", "--method", "tie"], "there is no merge method 'tie'"),
        (["--method", "ties", "--normalise", "perhaps"], "normalise of ties must be one of mean, sum"),
        (["--remove", "a", "--density", "0.5"], "svd has no option 'density'"),
        (["--remove", "a", "--rank", "99"], "rank must be from 1 to 3"),
        (["--remove", "a", "--rank", "2", "--rank-energy", "0.5"], "--rank-energy tells --rank auto how to choose"),
        (["--remove", "a", "--rank-energy", "5"], "in (0, 1], got 5.0"),
        (["--remove", "a", "--scale", "1e300"], "beyond the range"),
        (["--remove", "a", "--initial", "b=c"], "--initial is not for a merge that is kept"),
        (["--model", "m", "--tasks", "sst2"], "--model is not for a merge that is kept"),
        (["--remove", "a", "--output", "{a}"], "exists already: choose another output folder"),
        (["--remove", "a", "--output", "{kept}"], "which holds the kept merge: choose another output folder"),
        (["--remove", "a", "--output", "{kept}/merged"], "which holds the kept merge: choose another output folder"),
    ],
)
def test_a_refusal_leaves_the_state_as_it_was_and_writes_nothing(words, said, folders, kept, refusal, tmp_path):
    before = everything_in(tmp_path)
    for place, path in {"{a}": folders[0], "{c}": folders[2], "{kept}": kept}.items():
        words = [word.replace(place, str(path)) for word in words]
    output = [] if "--output" in words else ["--output", str(tmp_path / "no")]
    assert said in refusal(main, ["--state", str(kept), *output, *words])
    assert everything_in(tmp_path) == before and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "holds no merge yet: name the adapters to keep there"),
        (["--remove", "a"], "holds no merge yet"),
        (["--add", "{a}"], "holds no merge yet"),
        (["{a}", "{b}", "--weights", "1"], "weights must be one for each adapter: got 1 for 2 adapters"),
        (["{a}", "--state-rank", "0"], "a whole number from 1, got 0"),
        (["{a}", "{b}", "--state-rank", "3", "--method", "ties"], "ties needs the members"),
        (["{a}", "{a}", "--method", "tie"], "there is no merge method 'tie'"),
        (["{a}", "--output", "{new}"], "which holds the kept merge: choose another output folder"),
    ],
)
def test_a_state_that_makes_no_sense_is_not_begun(words, said, folders, refusal, tmp_path):
    new = tmp_path / "new"
    for place, path in {"{a}": folders[0], "{b}": folders[1], "{new}": new}.items():
        words = [word.replace(place, str(path)) for word in words]
    output = [] if "--output" in words else ["--output", str(tmp_path / "no")]
    assert said in refusal(main, ["--state", str(new), *output, *words])
    assert not new.exists() and not (tmp_path / "no").exists()


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_written(folders, refusal, tmp_path):
    words = [str(folders[0]), "--output", str(tmp_path / "no")]
    said = refusal(main, [*words, "--state", str(folders[1])])
    assert "it holds 'adapter_config.json', give a new folder" in said and not (tmp_path / "no").exists()
    said = refusal(main, [*words, "--state", str(folders[1] / "adapter_config.json")])
    assert "it is a file, give a folder" in said and not (tmp_path / "no").exists()


@pytest.mark.parametrize("change", [["--add", "x"], ["--remove", "x"], ["--reweight", "x=1"], ["--state-rank", "2"]])
def test_changes_without_a_state_are_refused(change, folders, refusal, tmp_path):
    said = refusal(main, [str(folders[0]), "--output", str(tmp_path / "no"), *change])
    assert f"{change[0]} changes a merge that was kept: name its folder by --state" in said
    assert not (tmp_path / "no").exists()


def test_a_folder_with_an_equals_sign_in_its_name_can_be_added(command, folders, kept, equal_rank_adapters, tmp_path):
    odd = write_adapter(tmp_path / "c=2", equal_rank_adapters[2].modules, base_model="tiny/base", dtype=torch.float32)
    output = command("--add", f"{odd}=0.5", "--rank", "9")
    assert_same_change(output, summed([*folders[:2], odd], [0.7, 0.5, 0.5]))
    assert Path(MergeState.load(kept).members["c=2"].path) == odd


def test_a_merge_goes_on_as_it_was_unless_a_method_is_named(command, folders, tmp_path):
    command(*folders[:2], "--method", "ties", "--density", "0.5", "--scale", "2", "--dtype", "float64")
    settings = {"density": 0.5, "scale": 2, "dtype": "float64", "rank": "full"}
    output = command("--add", folders[2], "--rank", "full")  # one setting more, the others as before
    for words in ([], ["--reweight", "a=0.5"]):
        weights = [0.5 if words else 1 / 3, 1 / 3, 1 / 3]
        output = command(*words) if words else output
        fresh = merge(folders, "ties", weights=weights, **settings)
        assert_same_change(output, {m: u.delta() for m, u in fresh.modules.items()}, tolerance=1e-9)
        assert json.loads((output / "merge_report.json").read_text())["options"]["density"] == 0.5
    command("--method", "svd", "--rank", "5")
    report = json.loads((command("--remove", "b") / "merge_report.json").read_text())
    assert (report["method"], report["rank"], report["scale"]) == ("svd", 5, 1.0)


def test_a_rule_for_ranks_is_remembered_too(command, folders, tmp_path):
    command(*folders, "--rank", "auto", "--rank-energy", "0.6", "--max-rank", "3")
    fresh = merge(folders[:2], rank=RankRule(energy=0.6, max_rank=3))
    assert_same_change(command("--remove", "c"), {m: u.delta() for m, u in fresh.modules.items()})


def test_what_is_remembered_can_be_stored_also_when_it_was_asked_for_from_python(folders, tmp_path):
    for how in ({"adapters": folders, "method": "weighted_sum", "dtype": torch.float64}, {"remove": ["c"]}):
        result = merge_kept(tmp_path / "kept", progress=no_progress, **how)
    assert result.report.method == "weighted_sum" and result.report.dtype == "float64"


@pytest.fixture
def fill_the_disk(monkeypatch):
    """Call it, and from then on no tensors can be written."""

    def full(*_):
        raise SafetensorError("No space left on device")

    return lambda: monkeypatch.setattr("safetensors.torch.save_file", full)


def test_a_new_state_that_cannot_be_written_leaves_nothing(folders, fill_the_disk, refusal, tmp_path):
    fill_the_disk()
    said = refusal(main, [*map(str, folders[:2]), "--state", str(tmp_path / "kept")])
    assert "No space left on device" in said and not (tmp_path / "kept").exists()


def test_a_state_that_cannot_be_written_anew_stays(folders, kept, fill_the_disk, refusal):
    before = everything_in(kept)
    fill_the_disk()
    refusal(main, ["--state", str(kept), "--add", f"{folders[2]}=0.5"])
    assert everything_in(kept) == before


def test_changes_at_the_same_time_come_one_after_the_other(folders, kept, tmp_path):
    more = [Path(shutil.copytree(folders[2], tmp_path / f"more{number}")) for number in range(4)]
    with ThreadPoolExecutor(len(more)) as pool:
        list(pool.map(lambda folder: merge_kept(kept, add=[f"{folder}=0.5"], progress=no_progress), more))
    assert set(MergeState.load(kept).members) == {"a", "b", *(folder.name for folder in more)}


def test_of_two_that_create_one_state_at_the_same_time_one_is_refused_and_writes_nothing(folders, tmp_path):
    def create(adapters):
        output = tmp_path / f"from-{adapters[0].name}"
        try:
            merge_kept(tmp_path / "new" / "kept", adapters=adapters, output=output, progress=no_progress)
        except ValueError as error:
            return str(error), output
        return {adapter.name for adapter in adapters}, output

    with ThreadPoolExecutor(2) as pool:
        (first, written), (second, not_written) = pool.map(create, [folders[:2], folders[1:]])
    if isinstance(first, str):
        first, second, written, not_written = second, first, not_written, written
    assert "holds a merge already: change it by --add, --remove and --reweight" in second
    assert written.exists() and not not_written.exists()
    assert set(MergeState.load(tmp_path / "new" / "kept").members) == first


def test_one_who_waited_creates_the_state_where_the_other_gave_up(folders, tmp_path, caplog):
    kept = tmp_path / "new" / "kept"
    caplog.set_level(logging.INFO, "moa.merging.state_files")
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="gave up"), held(kept):
            waiting = pool.submit(merge_kept, kept, adapters=folders[:2], progress=no_progress)
            while "waiting for another merge" not in caplog.text:
                assert not waiting.done()
            raise ValueError("gave up")
        waiting.result()
    assert set(MergeState.load(kept).members) == {"a", "b"}


def test_one_who_gives_up_leaves_no_folder_and_what_was_there_before(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state-0.safetensors").touch()  # its manifest was lost
    for folder in ("new/kept", "empty", "damaged"):
        with pytest.raises(KeyboardInterrupt), held(tmp_path / folder):
            raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["damaged", "empty", "state-0.safetensors"]
