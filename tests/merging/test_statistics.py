"""Statistics: collected as a dense computation without padding finds them, stored, found again, refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from moa.adapters import read_adapter
from moa.merging import merge
from moa.merging.collecting import collect
from moa.merging.statistics import (
    STATISTICS_FILE,
    LayerStatistics,
    Statistics,
    fisher_key,
    read_statistics,
    statistics_of,
    write_statistics,
)

ROWS = [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12], [5, 13, 9, 20, 2]]
PROMPTS = (4, 1, 2)
ATTENTION = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"]


def batch(rows, prompts=PROMPTS, width=None):
    """Rows padded on the right, the loss on what follows each prompt."""
    width = width or max(map(len, rows))
    pad = lambda values, fill: values + [fill] * (width - len(values))
    return {
        "input_ids": torch.tensor([pad(row, 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor(
            [pad([-100] * n + row[n:], -100) for row, n in zip(rows, prompts, strict=True)],
        ),
    }


def attention_inputs(model, layer):
    """What q_proj of a layer reads, row by row, from the hidden states that transformers gives out."""
    seen = []
    for row in ROWS:
        out = model(torch.tensor([row]), output_hidden_states=True)
        seen.append(model.model.layers[layer].input_layernorm(out.hidden_states[layer])[0])
    return torch.cat(seen).detach().double()


@pytest.mark.parametrize("width", [7, 12])
def test_grams_are_those_of_the_rows_without_padding(base, width):
    found = collect(base, ATTENTION, [batch(ROWS, width=width)])
    for layer in (0, 1):
        x = attention_inputs(base, layer)
        one = found[f"model.layers.{layer}.self_attn.q_proj"]
        assert one.tokens == len(x) == 15 and one.fisher is None
        torch.testing.assert_close(one.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fisher", [False, True])
def test_how_rows_are_batched_changes_nothing(base, fisher):
    together = collect(base, ATTENTION, [batch(ROWS)], fisher=fisher)
    apart = collect(base, ATTENTION, [batch([row], [n]) for row, n in zip(ROWS, PROMPTS, strict=True)], fisher=fisher)
    for module in ATTENTION:
        torch.testing.assert_close(together[module].gram, apart[module].gram, rtol=1e-4, atol=1e-6)
        assert together[module].tokens == apart[module].tokens
        if fisher:
            torch.testing.assert_close(together[module].fisher, apart[module].fisher, rtol=1e-3, atol=1e-9)


def test_layers_that_read_the_same_tensor_share_one_gram(base):
    found = collect(base, ATTENTION, [batch(ROWS)])
    for layer in (0, 1):
        keys = [found.layers[f"model.layers.{layer}.self_attn.{name}_proj"]["gram"] for name in "qkvo"]
        assert keys[0] == keys[1] == keys[2] != keys[3]
    assert len({stored["gram"] for stored in found.layers.values()}) == 4


class Shifted(nn.Module):
    """A layer whose output can be moved, so that a gradient by the output is one by the shift."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.shift, self.x = layer, None, None

    def forward(self, x):
        out = self.layer(x)
        self.x, self.shift = x[0].detach(), torch.zeros_like(out, requires_grad=True)
        return out + self.shift


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
def test_fisher_is_the_mean_of_squared_gradients_over_each_row_of_the_matrix(base, name):
    found = collect(base, ATTENTION, [batch(ROWS)], fisher=True)
    model = copy.deepcopy(base).requires_grad_(False)
    attention = model.model.layers[1].self_attn
    setattr(attention, name, Shifted(getattr(attention, name)))
    layer = getattr(attention, name)
    squares = 0
    for row, prompt in zip(ROWS, PROMPTS, strict=True):
        logits = model(torch.tensor([row])).logits[0]
        nll = F.cross_entropy(logits[prompt - 1 : -1], torch.tensor(row[prompt:]), reduction="sum")
        (g,) = torch.autograd.grad(nll, layer.shift)
        per_token = torch.einsum("to,ti->toi", g[0], layer.x)  # the gradient by the matrix that each token adds
        squares = squares + per_token.double().square().sum(dim=(0, 2))
    expected = squares / sum(map(len, ROWS))
    got = found[f"model.layers.1.self_attn.{name}"].fisher
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-10)
    assert got.max() > 0


def test_collecting_leaves_the_model_as_it_was(base):
    model = copy.deepcopy(base).requires_grad_(True)
    collect(model, ATTENTION, [batch(ROWS)], fisher=True)
    with pytest.raises(ValueError, match="give each batch its labels"):
        collect(model, ATTENTION, [{"input_ids": torch.tensor(ROWS[:1])}], fisher=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(model.get_submodule(module)._forward_hooks for module in ATTENTION)


class Two(nn.Module):
    """Two layers; the second reads what the first does, or its output, or nothing."""

    def __init__(self, second="same", dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.one, self.two, self.second = nn.Linear(4, 4), nn.Linear(4, 4), second
        self.to(dtype)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        y = self.one(x)
        if self.second == "tokens":
            return self.two(x[:, 0])
        if self.second == "sometimes":
            return self.two(x if len(x) == 1 else x + 0)
        return self.two(x) if self.second == "same" else y


@pytest.mark.parametrize(
    ("model", "modules", "batches", "said"),
    [
        (Two(), ["three"], [ROWS[1:2]], "the model has no layer 'three'"),
        (Two(), ["one"], [], "layer 'one' read nothing: give at least one batch"),
        (Two("never"), ["one", "two"], [[[1, 2]]], "layer 'two' read nothing"),
        (Two(), ["embed"], [[[1, 2]]], "layer 'embed' reads ids, not features"),
        (Two("tokens"), ["two"], [[[1, 2], [3]]], r"layer 'two' sees \[2\] vectors of a padded batch of \[2, 2\]"),
        (Two("sometimes"), ["one", "two"], [[[1, 2]], [[1], [2]]], "shares its input with 'two' in some batches only"),
    ],
)
def test_what_cannot_be_collected_is_one_sentence(model, modules, batches, said):
    prepared = [{k: v for k, v in batch(b, [0] * len(b)).items() if k != "labels"} for b in batches]
    with pytest.raises(ValueError, match=said):
        collect(model, modules, prepared)


def test_a_model_that_overflows_is_refused():
    model = Two(dtype=torch.float16)
    with torch.no_grad():
        model.embed.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="gram.one is not finite: the model overflows on this text"):
        collect(model, ["one"], [{"input_ids": torch.tensor([[1, 2]])}])


def test_half_precision_is_summed_in_single():
    model = Two(dtype=torch.bfloat16)
    ids = torch.arange(8).repeat(40, 1)
    found = collect(model, ["one"], [{"input_ids": ids}] * 3)["one"]
    x = model.embed.weight.detach().double()
    torch.testing.assert_close(found.gram.double(), x.T @ x / 8, rtol=1e-5, atol=1e-6)
    assert found.gram.dtype == torch.float32 and found.tokens == 960


# ---- the file


@pytest.fixture
def collected(base):
    return collect(base, ATTENTION, [batch(ROWS)], fisher=True)


def test_what_was_written_is_read_back(collected, tmp_path):
    file = write_statistics(tmp_path / "one.safetensors", collected, {"rows": 3})
    stored = read_statistics(file)
    assert stored.about == {"rows": 3} and list(stored) == ATTENTION
    for module, one in collected.items():
        assert torch.equal(stored[module].gram, one.gram) and torch.equal(stored[module].fisher, one.fisher)
        assert stored[module].tokens == one.tokens
    assert len(load_file(file)) == 4 + 8
    again = write_statistics(tmp_path / "two.safetensors", stored, {"rows": 3})
    assert again.read_bytes() == file.read_bytes()


def test_a_write_that_fails_leaves_what_was_there(collected, tmp_path, monkeypatch):
    file = write_statistics(tmp_path / STATISTICS_FILE, collected, {})
    before = file.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_statistics(file, collected, {"rows": 9})
    assert file.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [STATISTICS_FILE]


def test_files_that_are_no_statistics_are_one_sentence(collected, tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no statistics at .*nowhere: collect them"):
        read_statistics(tmp_path / "nowhere")
    file = write_statistics(tmp_path / STATISTICS_FILE, collected, {})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        read_statistics(tmp_path)
    save_file({"x": torch.zeros(2)}, file, {"moa_statistics": json.dumps({"format": 2})})
    with pytest.raises(ValueError, match="has format 2, and statistics of format 1 can be read"):
        read_statistics(file)


def test_an_adapters_weights_are_no_statistics_and_nothing_is_said_of_overwriting(folders):
    weights = folders[0] / "adapter_model.safetensors"
    with pytest.raises(ValueError, match=r"adapter_model.safetensors holds no statistics: give what 'moa") as said:
        read_statistics(weights)
    assert "--overwrite" not in str(said.value)
    with pytest.raises(ValueError, match="holds no statistics"):
        merge(folders[:1], "regmean", statistics=[weights])


# ---- the statistics of an adapter


def made_for(folder, **about):
    """Statistics of all layers of the adapter in a folder, written beside it."""
    adapter = read_adapter(folder)
    tensors = {f"gram.{m}": torch.eye(s.n) * (1 + len(m)) for m, s in adapter.shapes.items()}
    layers = {m: {"gram": f"gram.{m}", "tokens": 5, "fisher": False} for m in adapter.shapes}
    statistics = Statistics(tensors.__getitem__, layers)
    return write_statistics(folder / STATISTICS_FILE, statistics, {"adapter_sha256": adapter.sha256, **about})


def test_statistics_are_found_beside_the_adapters_and_can_be_given(folders, tmp_path):
    files = [made_for(folder) for folder in folders]
    beside = merge(folders, "regmean")
    moved = [file.rename(tmp_path / f"{i}.safetensors") for i, file in enumerate(files)]
    given = merge(folders, "regmean", statistics=moved)
    mean = merge(folders, "average")
    for module, update in beside.modules.items():
        assert torch.equal(update.A, given.modules[module].A)
        torch.testing.assert_close(update.delta(), mean.modules[module].delta(), rtol=1e-4, atol=1e-5)


def test_an_adapter_without_statistics_is_named_with_the_command_to_run(folders, equal_rank_adapters):
    made_for(folders[0])
    command = f"moa statistics --adapters {folders[1]} --tasks TASK"
    with pytest.raises(ValueError, match=f"adapter 'b' has no statistics: run '{command}'"):
        merge(folders, "regmean")
    with pytest.raises(ValueError, match=r"adapter 'a' is in memory, .*: pass statistics=\[...\]"):
        merge(equal_rank_adapters, "regmean")


def test_statistics_of_other_weights_are_refused(folders, edit_weights):
    made_for(folders[0])
    edit_weights(folders[0], lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match="of adapter 'a' were collected with other weights than it has now"):
        merge(folders[:1], "regmean")


def test_statistics_in_another_order_than_the_adapters_are_named_as_that(folders):
    files = [made_for(folder) for folder in folders]
    wrong = "adapter 'b' was given the statistics of 'c': statistics are given in the order of the adapters"
    with pytest.raises(ValueError, match=wrong):
        merge(folders, "regmean", statistics=[files[0], files[2], files[1]])
    with pytest.raises(ValueError, match="'a' was given the statistics of 'c'"):
        merge(folders, "regmean", statistics=[files[2], files[1], files[2]], weights=[1, 0, 1])


def test_statistics_that_lack_a_layer_of_the_adapter_are_refused(equal_rank_adapters):
    one = {"model.layers.0.self_attn.q_proj": LayerStatistics(torch.eye(24), 5)}
    with pytest.raises(ValueError, match=r"'a' has no statistics for its layer 'model.layers.0.\S+' \(and 1 more\)"):
        statistics_of(equal_rank_adapters[:1], [one])
    with pytest.raises(ValueError, match="one for each adapter: got 1 for 3 adapters"):
        statistics_of(equal_rank_adapters, [one])


def test_the_file_beside_an_adapter_disturbs_no_reader(make_adapter, base_model, tmp_path):
    folder = make_adapter(tmp_path / "one")
    before = merge([folder], "svd", dtype="float64").modules
    tokens = torch.tensor([ROWS[0]])
    plain = PeftModel.from_pretrained(copy.deepcopy(base_model), folder)(tokens).logits
    made_for(folder)
    for module, update in merge([folder], "svd", dtype="float64").modules.items():
        assert torch.equal(update.delta(), before[module].delta())
    assert torch.equal(PeftModel.from_pretrained(base_model, folder)(tokens).logits, plain)


def test_stored_statistics_with_nan_are_refused_when_they_are_read(collected, tmp_path):
    module = next(iter(collected))
    bad = replace(collected, read=lambda key: collected.read(key) * (torch.nan if key == fisher_key(module) else 1))
    stored = read_statistics(write_statistics(tmp_path / "bad.safetensors", bad, {}))
    with pytest.raises(ValueError, match=r"bad.safetensors holds NaN or infinite values \(fisher"):
        stored[module]
