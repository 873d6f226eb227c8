"""A merge state gives the merge of the members it has, whatever came, went, was re-weighted or stored in between."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch

from moa.adapters import EMBEDDING, Adapter, AdapterError, Extras, read_adapter
from moa.low_rank import LowRank
from moa.merging import merge, methods
from moa.merging.incremental import ExactState, MergeState, TruncatedState
from moa.merging.shared_bases import RunningSum, SharedBases, extended, polished

WEIGHTS = [0.7, 0.5, -0.9]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def assert_same(got, expected, tolerance=1e-10):
    """Equal updates up to a relative error, layer by layer."""
    assert got.keys() == expected.keys()
    for module in expected:
        want = expected[module].to(torch.float64).delta()
        error = (got[module].to(torch.float64).delta() - want).norm() / want.norm().clamp(min=1e-300)
        assert error < tolerance, f"{module}: relative difference {error:.1e}"


def assert_orthonormal(basis):
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=2e-15)


def merged(state, method="svd", **options):
    return state.merged(method, dtype=torch.float64, **options).modules


def fresh(adapters, weights, method="svd", **options):
    return merge(adapters, method, weights=weights, dtype=torch.float64, **options).modules


@pytest.fixture
def trained(make_adapter, tmp_path):
    """Folders of adapters that PEFT wrote, of different ranks, layers and scalings."""
    return [
        make_adapter(tmp_path / "one", seed=1),
        make_adapter(tmp_path / "two", seed=2, r=2, use_rslora=True, target_modules=["q_proj", "o_proj"]),
        make_adapter(tmp_path / "three", seed=3, r=6, target_modules=["q_proj", "down_proj"]),
    ]


@pytest.fixture(params=["exact", "truncated"])
def state(request, folders):
    options = {"rank": 9} if request.param == "truncated" else {}
    return MergeState.create(folders, WEIGHTS, kind=request.param, **options)


# exact


NEEDS_EQUAL_RANKS, NEEDS_TWO = ("factor_sum",), ("slerp",)


@pytest.mark.parametrize("method", [name for name, method in methods().items() if not method.needs])
def test_a_state_merges_by_every_method_to_what_a_fresh_merge_gives(method, adapters, equal_rank_adapters):
    members = equal_rank_adapters if method in NEEDS_EQUAL_RANKS else adapters
    members = members[: 2 if method in NEEDS_TWO else 3]
    state = MergeState.create([replace(members[0], name="passing")], [1.0])
    for member, weight in zip(members, WEIGHTS, strict=False):
        state.add(member, weight)
    state.remove("passing")
    assert_same(merged(state, method), fresh(members, WEIGHTS[: len(members)], method), 1e-8)


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_any_order_of_arrival_gives_the_same_merge(order, adapters):
    state = MergeState.create([adapters[i] for i in order], [WEIGHTS[i] for i in order])
    assert_same(merged(state), fresh(adapters, WEIGHTS))
    assert_same(merged(state, "ties"), fresh(adapters, WEIGHTS, "ties"), 1e-6)  # its entries are float32


def test_members_come_back_factor_by_factor(trained):
    state = MergeState.create(trained)
    for folder in trained:
        before, after = read_adapter(folder, dtype=torch.float64), state.adapter(folder.name)
        assert after.shapes == before.shapes and after.dtype == before.dtype and after.sha256 == before.sha256
        for module, update in before.modules.items():
            torch.testing.assert_close(after.modules[module].B, update.B, rtol=0, atol=1e-13)
            torch.testing.assert_close(after.modules[module].A, update.A, rtol=0, atol=1e-13)


def test_adding_and_removing_restores_the_state(adapters):
    state = MergeState.create(adapters[:2])
    before = merged(state)
    ranks = {module: (layer.writes.shape[1], layer.reads.shape[1]) for module, layer in state.layers.items()}
    state.add(adapters[2])
    assert state.weights == {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}
    state.remove("c")
    assert state.weights == {"a": 1 / 2, "b": 1 / 2}
    assert_same(merged(state), before, 1e-13)
    assert {m: (layer.writes.shape[1], layer.reads.shape[1]) for m, layer in state.layers.items()} == ranks


def test_removing_leaves_the_merge_of_the_others_and_no_trace_in_the_bases(adapters):
    state = MergeState.create(adapters, WEIGHTS)
    assert state.layers[Q].writes.shape[1] == 9 and state.layers[Q].reads.shape[1] == 8  # a and b share one
    state.remove("a")
    assert_same(merged(state, "weighted_sum"), fresh(adapters[1:], WEIGHTS[1:], "weighted_sum"))
    assert state.layers[Q].writes.shape[1] == 7 and state.layers[Q].reads.shape[1] == 7
    state.remove("b")
    assert DOWN not in state.layers  # c lacks it
    assert_same(merged(state), fresh(adapters[2:], WEIGHTS[2:]))


def test_an_adapter_is_stored_once_however_often_it_is_added(adapters):
    state = MergeState.create([adapters[0]] * 4)
    assert list(state.members) == ["a", "a#2", "a#3", "a#4"]
    assert all(layer.writes.shape[1] == layer.reads.shape[1] == 2 for layer in state.layers.values())
    assert_same(merged(state), fresh(adapters[:1], [1.0]))


def test_bases_stay_orthonormal_and_members_exact_over_hundreds_of_changes():
    drawn = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=drawn, dtype=torch.float64)
    layer, kept = SharedBases.empty((15, 20)), {}
    for step in range(300):
        if len(kept) > 6 or (kept and torch.rand((), generator=drawn) < 0.45):
            name = list(kept)[step % len(kept)]
            layer = layer.minus(name)
            del kept[name]
        else:
            size = 10.0 ** float(torch.randint(-6, 7, (), generator=drawn))
            kept[str(step)] = LowRank(draw(15, 3) * size, draw(3, 20) @ torch.diag(torch.arange(20).double()))
            layer = layer.plus(str(step), kept[str(step)])
    assert len(kept) > 2
    assert_orthonormal(layer.writes)
    assert_orthonormal(layer.reads)
    for name, update in kept.items():
        assert (layer.update(name).delta() - update.delta()).norm() < 1e-12 * update.delta().norm()


def test_a_basis_grows_by_new_directions_only():
    eye = torch.eye(6).double()
    both = extended(eye[:, :2], torch.stack([eye[0] + eye[1], eye[1] + 3 * eye[4], torch.zeros(6).double()], 1))
    assert both.shape == (6, 3) and torch.equal(both[:, :2], eye[:, :2])
    torch.testing.assert_close(both[:, 2].abs(), eye[4])
    assert extended(eye, eye[:, :2]).shape == (6, 6)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_how_long_vectors_are_does_not_decide_what_is_a_direction(size):
    drawn = torch.randn(30, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(drawn[:, :4]).Q
    assert extended(basis, size * drawn[:, 2:7]).shape == (30, 7)
    assert extended(basis, size * (basis @ drawn[:4, :3])).shape == (30, 4)
    near = extended(basis, size * (basis[:, :1] + 1e-10 * drawn[:, 7:8]))
    assert near.shape == (30, 5)
    assert_orthonormal(near)


def test_polishing_makes_a_basis_orthonormal_again():
    drawn = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q
    rough = basis + 1e-8 * drawn
    assert not torch.allclose(rough.T @ rough, torch.eye(5).double(), atol=1e-9)
    assert_orthonormal(polished(rough))
    torch.testing.assert_close(polished(rough), rough, rtol=0, atol=1e-6)


def test_an_adapter_that_changes_nothing_is_a_member_like_others(adapters, tmp_path):
    modules = {module: LowRank(torch.zeros_like(u.B), u.A) for module, u in adapters[0].modules.items()}
    idle = replace(adapters[0], name="idle", modules=modules)
    state = MergeState.create([idle])
    assert all(update.delta().norm() == 0 for update in merged(state).values())
    state.add(adapters[1])
    state.save(tmp_path / "state")
    assert_same(merged(MergeState.load(tmp_path / "state")), fresh([idle, adapters[1]], None))


def test_other_options_reach_the_merge(adapters, tmp_path):
    state = MergeState.create(adapters, WEIGHTS)
    result = state.merged("ties", density=0.4, rank=2, scale=0.5, output=tmp_path / "out")
    assert_same(read_adapter(tmp_path / "out").modules, result.modules, 1e-6)
    assert_same(result.modules, fresh(adapters, WEIGHTS, "ties", density=0.4, rank=2, scale=0.5), 1e-6)
    assert result.report.weights == dict(zip("abc", WEIGHTS, strict=True))


# both kinds


def test_a_change_of_weight_is_what_a_fresh_merge_with_it_gives(state, folders):
    state.reweight("b", 2.0)
    assert_same(merged(state, rank=9), fresh(folders, [0.7, 2.0, -0.9], rank=9))
    state.reweight("b", 0.0)
    assert_same(merged(state, rank=6), fresh([folders[0], folders[2]], [0.7, -0.9], rank=6))


def test_equal_weights_follow_the_number_of_members_until_one_is_given(folders):
    for options in ({}, {"kind": "truncated", "rank": 9}):
        state = MergeState.create(folders[:2], **options)
        state.add(folders[2])
        assert_same(merged(state, rank=9), fresh(folders, None, rank=9))
        state.remove("a")
        assert_same(merged(state), fresh(folders[1:], None, rank=merged(state)[Q].rank))
        state.add(folders[0], 0.25, name="again")
        assert state.weights == {"b": 0.5, "c": 0.5, "again": 0.25}
        assert_same(merged(state, rank=9), fresh([*folders[1:], folders[0]], [0.5, 0.5, 0.25], rank=9))
        with pytest.raises(ValueError, match="members have weights of their own: give 'more' one too"):
            state.add(folders[1], name="more")


def test_a_stored_state_goes_on_where_it_was(state, folders, tmp_path):
    state.save(tmp_path / "state")
    again = MergeState.load(tmp_path / "state")
    assert type(again) is type(state) and again.members == state.members and again.rank == state.rank
    for one, other in zip(state._packed().items(), again._packed().items(), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])
    for either in (state, again):
        either.remove("a")
        either.add(folders[0], 0.3)
        either.reweight("c", 1.5)
    expected = fresh([folders[1], folders[2], folders[0]], [0.5, 1.5, 0.3], rank=9)
    assert_same(merged(again, rank=9), expected)
    assert_same(merged(again, rank=9), merged(state, rank=9), 1e-14)


def test_saving_replaces_an_earlier_state_and_leaves_nothing_else(state, tmp_path):
    state.save(tmp_path / "state")
    before = sorted(file.name for file in (tmp_path / "state").iterdir())
    state.save(tmp_path / "state")
    assert sorted(file.name for file in (tmp_path / "state").iterdir()) == before
    state.remove("a")
    state.save(tmp_path / "state")
    after = sorted(file.name for file in (tmp_path / "state").iterdir())
    assert before[:2] == after[:2] == ["merge_state.json", "merge_state.lock"]
    assert len(before) == len(after) == 3 and before[2] != after[2]


def test_a_save_that_fails_leaves_the_earlier_state_whole(state, tmp_path, monkeypatch):
    state.save(tmp_path / "state")
    before = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    state.reweight("a", 3.0)
    state.remove("b")
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        state.save(tmp_path / "state")
    now = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    assert before.items() <= now.items() and not any(name.endswith("partial") for name in now)
    assert list(MergeState.load(tmp_path / "state").members) == ["a", "b", "c"]


def test_a_refused_change_leaves_the_state_as_it_was(folders, edit_weights):
    def last_is_nan(tensors):
        name = sorted(tensors)[-1]
        return {**tensors, name: tensors[name] * float("nan")}

    for options in ({}, {"kind": "truncated", "rank": 9}):
        state = MergeState.create(folders[:2], **options)
        before = merged(state)
        good = (folders[2] / "adapter_model.safetensors").read_bytes()
        edit_weights(folders[2], last_is_nan)
        with pytest.raises(AdapterError, match="hold NaN or infinite values"):
            state.add(folders[2], 0.5)
        assert list(state.members) == ["a", "b"] and state.weights == {"a": 0.5, "b": 0.5}
        for module, update in merged(state).items():
            assert torch.equal(update.B, before[module].B)
        (folders[2] / "adapter_model.safetensors").write_bytes(good)


def test_the_report_names_the_members_with_hashes_also_when_their_folders_are_gone(state, folders, tmp_path):
    expected = merge(folders, weights=WEIGHTS).report.sources
    for folder in folders:
        shutil.rmtree(folder)
    result = state.merged(output=tmp_path / "out")
    assert [replace(source, path="") for source in result.report.sources] == [replace(s, path="") for s in expected]
    assert all(of.path.endswith(folder.name) for of, folder in zip(result.report.sources, folders, strict=True))
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == json.loads(result.report.to_json())
    assert result.report.base_model == "tiny/base"


def test_progress_wraps_the_layers(folders):
    seen = []
    MergeState.create(folders, progress=lambda names, description: seen.append(description) or names)
    assert [text.split()[-1] for text in seen] == ["a", "b", "c"]


# truncated


def dense_error(state, adapters, weights):
    """Layer name to ||sum_i w_i delta_i - what the state has||."""
    found = {}
    for module, update in merged(state, "weighted_sum").items():
        total = -update.delta()
        for adapter, weight in zip(adapters, weights, strict=True):
            if module in adapter.modules:
                total = total + weight * adapter.to(torch.float64).modules[module].delta()
        found[module] = float(total.norm())
    return found


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_the_error_of_a_truncated_state_is_within_its_bound(rank, folders):
    adapters = [read_adapter(folder) for folder in folders]
    state = MergeState.create(folders[:1], [0.7], kind="truncated", rank=rank)
    steps = [
        (lambda: state.add(folders[1], 0.5), [0.7, 0.5, 0]),
        (lambda: state.add(folders[2], -0.9), [0.7, 0.5, -0.9]),
        (lambda: state.reweight("a", 0.1), [0.1, 0.5, -0.9]),
        (lambda: state.remove("b"), [0.1, 0, -0.9]),
        (lambda: state.add(folders[1], 2.0), [0.1, 2.0, -0.9]),
    ]
    for change, weights in steps:
        change()
        for module, error in dense_error(state, adapters, weights).items():
            assert error <= state.error_bounds[module] + 1e-12
            assert (state.error_bounds[module] > 1e-6) == (rank < 9)


def test_a_truncated_state_of_enough_rank_is_the_weighted_sum_and_of_less_no_worse_than_twice_the_best(folders):
    adapters = [read_adapter(folder) for folder in folders]
    enough = MergeState.create(folders, WEIGHTS, kind="truncated", rank=9)
    assert_same(merged(enough), fresh(folders, WEIGHTS, "weighted_sum"), 1e-12)
    less = MergeState.create(folders, WEIGHTS, kind="truncated", rank=6)
    for module, error in dense_error(less, adapters, WEIGHTS).items():
        S = torch.linalg.svdvals(sum(w * a.modules[module].delta() for a, w in zip(adapters, WEIGHTS, strict=True)))
        assert S[6:].norm() - 1e-4 <= error <= 2 * S[6:].norm()


def test_bounds_are_those_of_the_merge_also_when_equal_weights_become_own_ones(folders):
    adapters = [read_adapter(folder) for folder in folders]
    state = MergeState.create(folders, kind="truncated", rank=3)
    before = state.error_bounds
    state.reweight("a", 1 / 3)
    assert state.error_bounds == pytest.approx(before)
    for module, error in dense_error(state, adapters, [1 / 3] * 3).items():
        assert before[module] / 10 < error <= before[module] + 1e-12


def test_the_report_of_a_truncated_merge_has_the_relative_error_bound(folders):
    state = MergeState.create(folders, kind="truncated", rank=4)
    result = state.merged("weighted_sum", dtype=torch.float64, scale=2.0)
    for module, layer in result.report.layers.items():
        norm = result.modules[module].delta().norm() / 2
        assert layer.facts["error_bound"] == pytest.approx(float(state.error_bounds[module] / norm))


def test_a_running_sum_stays_orthonormal_over_hundreds_of_changes():
    drawn = torch.Generator().manual_seed(0)
    total, true = RunningSum.empty((12, 16)), torch.zeros(12, 16).double()
    for _ in range(300):
        update = LowRank(torch.randn(12, 2, generator=drawn).double(), torch.randn(2, 16, generator=drawn).double())
        true = 0.9 * true + update.delta()
        total = total.scaled(0.9).plus(update, 12)
    assert_orthonormal(total.U)
    assert_orthonormal(total.V)
    assert (total.update().delta() - true).norm() < 1e-12 * true.norm() and total.error < 1e-12


# bad input


CUT = {"kind": "truncated", "rank": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "exat"}, "is exact or statistics or truncated, got 'exat'; did you mean 'exact'"),
        ({"rank": 4}, "a state of kind 'exact' takes no rank, got 4: leave it out, or create one of kind 'truncated'"),
        ({"kind": "truncated"}, "needs the rank to cut its sum to, a whole number from 1, got None"),
        ({"kind": "truncated", "rank": 0}, "whole number from 1, got 0"),
        ({"weights": [1.0]}, "got 1 for 3 adapters"),
    ],
)
def test_a_state_that_makes_no_sense_is_not_created(options, message, folders):
    with pytest.raises(ValueError, match=message):
        MergeState.create(folders, **options)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda state: state.add("nowhere"), "there is no adapter folder nowhere"),
        (lambda state: state.add(state.adapter("a")), "has a member 'a' already: remove it first"),
        (lambda state: state.remove("aa"), "no member 'aa': it has a, b, c; did you mean 'a'?"),
        (lambda state: state.reweight("d", 1.0), "no member 'd': it has a, b, c$"),
        (lambda state: state.reweight("a", float("nan")), "the weight of 'a' must be a finite number, got nan"),
        (lambda state: state.merged("tie"), "there is no merge method 'tie'"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(ask, message, state):
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("?", r"\?")):
        ask(state)
    assert list(state.members) == ["a", "b", "c"] and list(state.weights.values()) == WEIGHTS


def test_what_needs_members_is_refused_by_a_state_that_keeps_their_sum(folders, adapters):
    state = MergeState.create(folders, **CUT)
    with pytest.raises(ValueError, match="ties needs the members .* or create an exact state"):
        state.merged("ties")
    with pytest.raises(ValueError, match="restore_norm needs the members"):
        state.merged(restore_norm=True)
    with pytest.raises(AdapterError, match="'other c' is not what stands in a folder: save it to one first"):
        state.add(adapters[2], name="other c")


def test_a_folder_without_a_state_is_neither_read_nor_overwritten(state, folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no merge state in .*create one first"):
        MergeState.load(tmp_path)
    with pytest.raises(ValueError, match="cannot save the merge state to .* it holds 'a', give a new folder"):
        state.save(tmp_path)
    with pytest.raises(ValueError, match="it is a file, give a folder"):
        state.save(folders[0] / "adapter_config.json")


def test_the_last_member_stays(adapters):
    state = MergeState.create(adapters[:1])
    with pytest.raises(ValueError, match="'a' is the only member: delete the state's folder instead"):
        state.remove("a")


def test_adapters_that_do_not_belong_are_refused(adapters, folders, edit_config):
    state = MergeState.create(folders[:2])
    edit_config(folders[2], base_model_name_or_path="other/base")
    with pytest.raises(AdapterError, match="'tiny/base' and 'c' on 'other/base'"):
        state.add(folders[2])
    unchecked = MergeState.create(folders, check_base=False)
    assert unchecked.merged().report.base_model is None
    small = Adapter("small", "tiny/base", {Q: LowRank(torch.ones(3, 1), torch.ones(1, 24))})
    with pytest.raises(AdapterError, match="they belong to different base models"):
        state.add(small)
    biased = replace(adapters[0], name="biased", extras=Extras(lora_bias={Q: torch.ones(24)}))
    with pytest.raises(AdapterError, match="'biased' holds lora_bias beside its updates"):
        state.add(biased)
    with pytest.raises(AdapterError, match="'biased' holds lora_bias beside its updates"):
        MergeState.create([biased])


def test_an_embedding_stays_one_in_a_stored_state(adapters, tmp_path):
    embedded = replace(adapters[0], kinds={Q: EMBEDDING})
    MergeState.create([embedded]).save(tmp_path / "state")
    state = MergeState.load(tmp_path / "state")
    assert state.adapter("a").kinds == {Q: EMBEDDING}
    with pytest.raises(AdapterError, match="they belong to different base models"):
        state.add(adapters[1])


def test_a_truncated_state_takes_out_only_what_it_took_in(folders, edit_weights):
    state = MergeState.create(folders, kind="truncated", rank=9)
    edit_weights(folders[0], lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match="has changed since it was added as 'a'.*put the old file back"):
        state.remove("a")
    shutil.rmtree(folders[1])
    with pytest.raises(FileNotFoundError, match="there is no adapter folder"):
        state.reweight("b", 2.0)
    assert state.weights == {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file, state: file.write_text("{"), "is damaged"),
        (lambda file, state: file.write_text("[]"), "is damaged"),
        (lambda file, state: file.write_text(file.read_text().replace('"format": 1', '"format": 2')), "of format 2"),
        (lambda file, state: next(state.glob("*.safetensors")).write_bytes(b"no"), "is missing or damaged"),
        (lambda file, state: next(state.glob("*.safetensors")).unlink(), "is missing or damaged"),
    ],
)
def test_a_damaged_state_is_refused(damage, message, folders, tmp_path):
    directory = MergeState.create(folders).save(tmp_path / "state")
    damage(directory / "merge_state.json", directory)
    with pytest.raises(ValueError, match=message):
        MergeState.load(directory)


def test_both_kinds_are_merge_states(state):
    assert isinstance(state, ExactState | TruncatedState)


def test_a_folder_whose_manifest_was_deleted_can_be_used_again(state, tmp_path):
    state.save(tmp_path / "state")
    (tmp_path / "state" / "merge_state.json").unlink()
    state.save(tmp_path / "state")
    assert MergeState.load(tmp_path / "state").members.keys() == state.members.keys()
