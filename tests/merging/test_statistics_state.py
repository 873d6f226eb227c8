"""A merge by statistics that is kept: after every change as if its members were merged anew, their folders gone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from moa.adapters import read_adapter, write_adapter
from moa.merging import RankRule, merge, methods
from moa.merging.activations import READS
from moa.merging.cli import main
from moa.merging.incremental import MergeState, StatisticsState
from moa.merging.kept_statistics import KeptStatistics
from moa.merging.statistics import STATISTICS_FILE, LayerStatistics, Statistics, read_statistics, write_statistics

Q, V, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
SIZES = {Q: (24, 24), V: (12, 24), DOWN: (24, 40)}
READS_WITH = {Q: Q, V: Q, DOWN: DOWN}
WEIGHTS = [0.7, 0.5, -0.9]
OPTIONS = {"regmean": {"off_diagonal": 0.4, "ridge": 1e-4}, "fisher": {"balanced": False, "eps": 1e-3}}


def drawn_statistics(seed, tokens=60):
    """Statistics of random inputs and gradients whose features differ in size."""
    draws = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=draws)
    tensors, layers = {}, {}
    for module, (o, n) in SIZES.items():
        x = draw(tokens, n) * draw(n).exp()
        tensors |= {f"gram.{module}": x.T @ x / tokens, f"fisher.{module}": draw(o).exp()}
        layers[module] = {"gram": f"gram.{READS_WITH[module]}", "tokens": tokens, "fisher": True}
    return Statistics(tensors.__getitem__, layers)


def put_statistics(folder, seed, **about):
    adapter = read_adapter(folder)
    about = {"adapter_sha256": adapter.sha256, "base_model": "tiny/base", **about}
    write_statistics(folder / STATISTICS_FILE, drawn_statistics(seed), about)
    return folder


@pytest.fixture
def known(folders):
    """Three folders of adapters, each with its statistics."""
    return [put_statistics(folder, seed) for seed, folder in enumerate(folders, start=50)]


def dense_regmean(folders, weights, off_diagonal, ridge):
    """The closed form on whole matrices, from the files."""
    found = {}
    for module in SIZES:
        grams = [load_file(f / STATISTICS_FILE)[f"gram.{READS_WITH[module]}"].double() for f in folders]
        means = [w_i * G.diagonal().mean() for w_i, G in zip(map(abs, weights), grams, strict=True)]
        floor = ridge * sum(means) / sum(map(abs, weights))
        shrunk = [
            off_diagonal * G + (1 - off_diagonal) * G.diagonal().diag() + floor * torch.eye(len(G)).double()
            for G in grams
        ]
        deltas = [read_adapter(f, dtype=torch.float64).modules[module].delta() for f in folders]
        top = sum(w * delta @ G for w, delta, G in zip(weights, deltas, shrunk, strict=True))
        found[module] = top @ torch.linalg.inv(sum(abs(w) * G for w, G in zip(weights, shrunk, strict=True)))
    return found


def dense_fisher(folders, weights, balanced, eps):
    """The weighted mean of rows, from the files."""
    assert not balanced
    found = {}
    for module in SIZES:
        phi = torch.stack([load_file(f / STATISTICS_FILE)[f"fisher.{module}"].double() for f in folders])
        phi = phi + eps * phi.mean()
        deltas = [read_adapter(f, dtype=torch.float64).modules[module].delta() for f in folders]
        top = sum(w * F[:, None] * delta for w, F, delta in zip(weights, phi, deltas, strict=True))
        found[module] = top / sum(abs(w) * F for w, F in zip(weights, phi, strict=True))[:, None]
    return found


DENSE = {"regmean": dense_regmean, "fisher": dense_fisher}


def assert_same(got, expected, tolerance=1e-10):
    assert got.keys() == expected.keys()
    for module, want in expected.items():
        assert (got[module] - want).norm() <= tolerance * want.norm(), module


def dense(modules):
    return {module: update.to(torch.float64).delta() for module, update in modules.items()}


def created(folders, method, weights=None, **settings):
    settings = {"method": method, "dtype": "float64", **settings}
    return MergeState.create(folders, weights, kind="statistics", settings=settings)


def stored_files(directory):
    return {path.name: path.stat().st_ino for path in directory.glob("statistics-*")}


@pytest.fixture
def command(tmp_path):
    """Run `moa merge --state`, and give back the folder that it wrote."""
    runs = iter(range(100))

    def run(*words):
        output = tmp_path / f"out{next(runs)}"
        main([*map(str, words), "--state", str(tmp_path / "kept"), "--output", str(output)])
        return output

    return run


# the same as merging anew


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_after_every_change_a_merge_is_the_closed_form_on_the_members_there_are(method, known, tmp_path):
    expected = lambda folders, weights: DENSE[method](folders, weights, **OPTIONS[method])
    state = created(known[:2], method, **OPTIONS[method])
    assert_same(dense(state.merged().modules), expected(known[:2], [0.5, 0.5]))
    state.add(known[2])
    assert_same(dense(state.merged().modules), expected(known, [1 / 3] * 3))
    state.reweight("b", -0.9)
    assert_same(dense(state.merged().modules), expected(known, [1 / 3, -0.9, 1 / 3]))
    state.save(tmp_path / "kept")
    shutil.move(known[0], tmp_path / "elsewhere")
    state = MergeState.load(tmp_path / "kept")
    state.remove("a")
    assert_same(dense(state.merged().modules), expected(known[1:], [-0.9, 1 / 3]))


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_rank_is_that_of_the_settings_and_its_predicted_loss_that_of_a_fresh_merge(method, known):
    fresh = merge(known, method, weights=WEIGHTS, rank=4, scale=0.5, dtype="float64", **OPTIONS[method])
    state = created(known[:1], method, [0.7], rank=4, scale=0.5, **OPTIONS[method])
    for folder, weight in zip(known[1:], WEIGHTS[1:], strict=True):
        state.add(folder, weight)
    result = state.merged()
    assert_same(dense(result.modules), dense(fresh.modules))
    for module, layer in result.report.layers.items():
        assert layer.rank == 4
        assert layer.facts == pytest.approx(fresh.report.layers[module].facts, rel=1e-8)


def test_a_member_that_came_and_went_leaves_no_trace(known, tmp_path):
    state = created(known[:2], "regmean")
    before = state.merged().modules
    state.save(tmp_path / "kept")
    held = stored_files(tmp_path / "kept")
    state.add(known[2])
    state.save(tmp_path / "kept")
    assert stored_files(tmp_path / "kept").keys() > held.keys()
    state.remove("c")
    state.save(tmp_path / "kept")
    assert_same(dense(state.merged().modules), dense(before), 1e-13)
    assert stored_files(tmp_path / "kept") == held  # the same files, not written again


def test_statistics_of_a_layer_that_an_adapter_lacks_count_as_in_a_fresh_merge(known, make_lacking, tmp_path):
    lacking = make_lacking(DOWN)
    state = created([known[0], lacking], "regmean")
    got, fresh = state.merged(), merge([known[0], lacking], "regmean", dtype="float64")
    assert_same(dense(got.modules), dense(fresh.modules))
    alone = merge(known[:1], "regmean", weights=[0.5], dtype="float64")
    assert (dense(got.modules)[DOWN] - dense(alone.modules)[DOWN]).norm() > 0.1


@pytest.fixture
def make_lacking(tmp_path, equal_rank_adapters):
    def make(layer):
        modules = {module: u for module, u in equal_rank_adapters[1].modules.items() if module != layer}
        path = write_adapter(tmp_path / "lacking", modules, base_model="tiny/base", dtype=torch.float32)
        return put_statistics(path, 70)

    return make


def test_ranks_by_predicted_loss_keep_their_rule_and_its_statistics(known, tmp_path):
    rule = RankRule(by="loss", energy=0.8, max_rank=3)
    state = created(known, "svd", WEIGHTS, rank=rule)
    state.save(tmp_path / "kept")
    for folder in known:
        (folder / STATISTICS_FILE).unlink()
    again = MergeState.load(tmp_path / "kept")
    assert again.settings["rank"] == rule
    got = again.merged()
    for seed, folder in enumerate(known, start=50):
        put_statistics(folder, seed)
    fresh = merge(known, "svd", weights=WEIGHTS, rank=rule, dtype="float64")
    assert_same(dense(got.modules), dense(fresh.modules))
    assert [u.rank for u in got.modules.values()] == [u.rank for u in fresh.modules.values()]


def test_statistics_in_memory_are_kept_as_they_were(known, tmp_path):
    fresh = merge(known, "regmean", dtype="float64")
    mappings = [dict(read_statistics(folder).items()) for folder in known]
    settings = {"method": "regmean", "dtype": torch.float64}
    state = MergeState.create(known, kind="statistics", settings=settings, statistics=mappings)
    for mapping in mappings:
        for of in mapping.values():
            of.gram.zero_()
    state.save(tmp_path / "kept")
    assert_same(dense(MergeState.load(tmp_path / "kept").merged().modules), dense(fresh.modules))


# what is kept


def test_only_what_the_method_reads_is_kept(known, tmp_path):
    for method, key, count in (("regmean", "gram.", 2), ("fisher", "fisher.", 3)):
        created(known[:1], method).save(tmp_path / method)
        (file,) = (tmp_path / method).glob("statistics-*")
        kept, given = load_file(file), load_file(known[0] / STATISTICS_FILE)
        used = {"gram": {f"gram.{Q}", f"gram.{DOWN}"}, "fisher": {f"fisher.{module}" for module in SIZES}}
        assert kept.keys() == used[key.rstrip(".")] and len(kept) == count
        assert all(torch.equal(tensor, given[name]) for name, tensor in kept.items())


def test_every_method_with_statistics_says_what_it_reads():
    assert READS.keys() == {name for name, method in methods().items() if "statistics" in method.needs}


def test_a_new_weight_leaves_the_files_of_statistics_alone(known, tmp_path):
    state = created(known, "regmean")
    state.save(tmp_path / "kept")
    before = stored_files(tmp_path / "kept")
    state = MergeState.load(tmp_path / "kept")
    state.reweight("a", 2.0)
    state.save(tmp_path / "kept")
    assert stored_files(tmp_path / "kept") == before and len(before) == 3


def test_the_same_state_twice_has_the_same_bytes(known, tmp_path):
    for name in ("one", "two"):
        created(known, "regmean", rank=RankRule(by="loss")).save(tmp_path / name)
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 6


def test_a_first_save_that_was_interrupted_can_be_made_again(known, tmp_path, monkeypatch):
    state = created(known, "regmean")
    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            state.save(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "statistics-0123.safetensors").write_bytes(b"half")
    state.save(tmp_path / "kept")
    assert len(stored_files(tmp_path / "kept")) == 3
    assert isinstance(MergeState.load(tmp_path / "kept"), StatisticsState)


def test_an_exact_state_that_was_stored_before_there_were_statistics_is_read(folders, tmp_path):
    file = MergeState.create(folders).save(tmp_path / "kept") / "merge_state.json"
    stored = json.loads(file.read_text())
    del stored["settings"], stored["statistics"]
    file.write_text(json.dumps(stored))
    assert list(MergeState.load(tmp_path / "kept").members) == ["a", "b", "c"]


# the command line


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_a_kept_merge_is_changed_with_the_settings_of_the_first(method, command, known, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS[method].items() if name != "balanced"]
    options += ["--no-balanced"] if method == "fisher" else []
    settings = {"rank": 5, "dtype": "float64", **OPTIONS[method]}
    command(*known[:2], "--method", method, "--rank", 5, "--dtype", "float64", *options)
    fresh = lambda folders, weights: dense(merge(folders, method, weights=weights, **settings).modules)
    read = lambda output: dense(read_adapter(output, dtype=torch.float64).modules)
    assert_same(read(command("--add", known[2])), fresh(known, [1 / 3] * 3))
    assert_same(read(command("--reweight", "b=0.5")), fresh(known, [1 / 3, 0.5, 1 / 3]))
    shutil.rmtree(known[0])
    output = command("--remove", "a")
    assert_same(read(output), fresh(known[1:], [0.5, 1 / 3]))
    report = json.loads((output / "merge_report.json").read_text())
    assert report["options"] == OPTIONS[method] and report["rank"] == 5 and report["statistics"] is None
    main(["--config", str(output), "--output", str(tmp_path / "again")])
    assert_same(read(tmp_path / "again"), read(output))


def test_other_settings_are_for_one_merge(command, known):
    command(*known[:2], "--method", "regmean", "--off-diagonal", "0.4", "--dtype", "float64")
    read = lambda output: dense(read_adapter(output, dtype=torch.float64).modules)
    fresh = lambda **options: dense(merge(known[:2], dtype="float64", **options).modules)
    assert_same(read(command("--off-diagonal", 1)), fresh(method="regmean", off_diagonal=1.0))
    assert_same(
        read(command("--method", "ties", "--density", 0.5, "--rank", 6, "--dtype", "float64")),
        fresh(method="ties", density=0.5, rank=6),
    )
    assert_same(read(command()), fresh(method="regmean", off_diagonal=0.4))


def test_statistics_that_lie_elsewhere_are_named_and_told(command, known, tmp_path):
    fresh = dense(merge(known, "regmean", dtype="float64").modules)
    files = [shutil.move(folder / STATISTICS_FILE, tmp_path / f"{folder.name}.safetensors") for folder in known]
    words = ["--method", "regmean", "--dtype", "float64"]
    command(*known[:2], *words, "--statistics", *files[:2])
    output = command("--add", known[2], "--statistics", files[2])
    assert_same(dense(read_adapter(output, dtype=torch.float64).modules), fresh)
    told = json.loads((output / "merge_report.json").read_text())["statistics"]
    assert told == [f"../{folder.name}.safetensors" for folder in known]
    main(["--config", str(output), "--output", str(tmp_path / "again")])
    assert_same(dense(read_adapter(tmp_path / "again", dtype=torch.float64).modules), fresh)


def test_what_a_kept_merge_weighs_is_said(command, known, tmp_path, capsys):
    command(*known[:2], "--method", "regmean")
    size = sum(file.stat().st_size for file in (tmp_path / "kept").iterdir())
    assert f"kept in {tmp_path / 'kept'} ({size / 1000:.1f} kB)" in " ".join(capsys.readouterr().out.split())


# bad input


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without_fisher(folder):
    adapter, found = read_adapter(folder), read_statistics(folder)
    layers = {module: {**stored, "fisher": False} for module, stored in found.layers.items()}
    write_statistics(folder / STATISTICS_FILE, Statistics(found.read, layers), {"adapter_sha256": adapter.sha256})


def of_other_layers(folder):
    found = read_statistics(folder)
    layers = {module: stored for module, stored in found.layers.items() if module != V}
    write_statistics(folder / STATISTICS_FILE, Statistics(found.read, layers), {})


def of_another_size(folder):
    found = read_statistics(folder)
    read = lambda key: found.read(key)[:20, :20].clone()
    layers = {module: {**stored, "fisher": False} for module, stored in found.layers.items()}
    write_statistics(folder / STATISTICS_FILE, Statistics(read, layers), {})


@pytest.mark.parametrize(
    ("method", "damage", "said"),
    [
        ("regmean", lambda c: (c / STATISTICS_FILE).unlink(), "adapter 'c' has no statistics: run 'moa statistics"),
        ("regmean", lambda c: put_statistics(c, 9, adapter_sha256="0" * 64), "were collected with other weights"),
        ("regmean", lambda c: put_statistics(c, 9, base_model="other/base"), "on 'other/base' and it was trained on"),
        ("regmean", of_other_layers, f"adapter 'c' has no statistics for its layer '{V}'"),
        ("regmean", of_another_size, "are of another base model: the layer needs [40, 40] numbers"),
        ("fisher", without_fisher, "have no Fisher vectors: run 'moa statistics' again with --overwrite and --fisher"),
    ],
)
def test_an_adapter_whose_statistics_do_not_serve_is_refused(
    method, damage, said, command, known, refusal, tmp_path, capsys
):
    command(*known[:2], "--method", method)
    damage(known[2])
    before = everything_in(tmp_path)
    words = ["--state", str(tmp_path / "kept"), "--output", str(tmp_path / "no")]
    assert said in refusal(main, [*words, "--add", str(known[2])])
    assert everything_in(tmp_path) == before and not (tmp_path / "no").exists()
    assert said in refusal(main, [*map(str, known), "--method", method, "--state", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--add", "{c}", "--density", "0.5"], "regmean has no option 'density'"),
        (["--add", "{c}", "--off-diagonal", "7"], "off_diagonal is a factor in [0, 1], got 7"),
        (["--method", "fisher"], "this merge reads Fisher vectors and the state keeps Gram matrices of inputs alone"),
        (["--statistics", "{c}"], "names one file for each adapter that comes in"),
        (["--add", "{c}", "--statistics", "{c}", "{c}"], "got 2 for 1 by --add"),
        (["--add", "{c}", "--statistics", "nowhere"], "there are no statistics at nowhere"),
        (["--add", "{c}", "--statistics", "{a}"], "were collected with other weights than it has now"),
    ],
)
def test_a_refused_change_leaves_the_state_as_it_was(words, said, command, known, refusal, tmp_path):
    command(*known[:2], "--method", "regmean")
    before = everything_in(tmp_path)
    words = [word.replace("{a}", str(known[0])).replace("{c}", str(known[2])) for word in words]
    output = ["--output", str(tmp_path / "no")]
    assert said in refusal(main, [*words, "--state", str(tmp_path / "kept"), *output])
    assert everything_in(tmp_path) == before and not (tmp_path / "no").exists()


def test_another_base_is_let_in_once_that_was_said(command, known, tmp_path):
    command(*known[:2], "--method", "regmean")
    put_statistics(known[2], 52, base_model="other/base")
    command("--add", known[2], "--no-check-base")
    assert list(MergeState.load(tmp_path / "kept").members) == ["a", "b", "c"]


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"no")])
def test_a_state_with_damaged_statistics_is_refused(damage, known, tmp_path):
    created(known, "regmean").save(tmp_path / "kept")
    damage(next((tmp_path / "kept").glob("statistics-*")))
    with pytest.raises(ValueError, match=r"statistics-.* is missing or damaged: restore it, or create the state anew"):
        MergeState.load(tmp_path / "kept")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "statistics"}, "svd reads no statistics: choose kind='exact'"),
        ({"kind": "statistics", "settings": {"method": "ties"}}, "ties reads no statistics"),
        ({"kind": "statistics", "settings": {"method": "regmean", "output": "x"}}, "regmean has no option 'output'"),
        ({"kind": "statistics", "settings": {"method": "fisher"}, "rank": 4}, "'statistics' takes no rank, got 4"),
        ({"settings": {"method": "regmean"}}, "a state of kind 'exact' takes no settings"),
        ({"statistics": ["x"]}, "takes no statistics, got .*create one of kind 'statistics'"),
        ({"kind": "statistics", "settings": {"method": "fisher"}, "statistics": ["x"]}, "got 1 for 3 adapters"),
    ],
)
def test_a_state_that_makes_no_sense_is_not_created(options, said, known):
    with pytest.raises(ValueError, match=said):
        MergeState.create(known, **options)


def test_statistics_in_another_order_are_refused(known):
    settings = {"method": "regmean"}
    with pytest.raises(ValueError, match="adapter 'a' was given the statistics of 'b'"):
        MergeState.create(known[:2], kind="statistics", settings=settings, statistics=[known[1], known[0]])


def test_an_exact_state_still_merges_by_statistics_that_are_given(folders, known):
    state = MergeState.create(folders, WEIGHTS)
    with pytest.raises(ValueError, match="a state of kind 'exact' takes no statistics"):
        state.add(folders[0], 1.0, name="more", statistics=folders[0])
    got = state.merged("regmean", statistics=folders, dtype=torch.float64)
    assert_same(dense(got.modules), dense(merge(folders, "regmean", weights=WEIGHTS, dtype="float64").modules))


def test_layer_statistics_without_a_gram_are_refused_where_one_is_read(known):
    bare = {module: LayerStatistics(None, 60, torch.ones(o)) for module, (o, _) in SIZES.items()}
    with pytest.raises(ValueError, match="hold no Gram: collect them with moa statistics"):
        merge(known[:1], "regmean", statistics=[bare])
    with pytest.raises(ValueError, match="ranks by loss need statistics of every layer"):
        merge(known[:1], "svd", rank=RankRule(by="loss"), statistics=[bare])
    assert merge(known[:1], "fisher", statistics=[bare]).modules.keys() == SIZES.keys()


def test_a_first_save_for_which_the_disk_has_no_room_leaves_no_folder(known, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    state = created(known, "regmean")
    monkeypatch.setattr(KeptStatistics, "stored_in", full)
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
