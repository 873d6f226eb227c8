"""Padding-free packed rows against the padded batch, and against each adapter alone."""

import re
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.routing import Routing

ROWS = [
    {"input_ids": [3, 7, 9, 11, 24], "labels": [-100, -100, -100, -100, 24]},
    {"input_ids": [5, 10, 12], "labels": [-100, -100, 12]},
    {"input_ids": [16, 23, 3, 8, 17, 20, 4], "labels": [-100, -100, -100, -100, -100, 20, 4]},
]
BOUNDS = [0, 5, 8, 15]


@pytest.fixture
def model(base_model, adapters):
    torch.manual_seed(0)
    model = MoaModel.from_adapters(base_model, adapters)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight, std=3.0)
    model.set_router(router)
    return model


@pytest.fixture
def packed():
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(ROWS)


@pytest.fixture
def padded():
    return DataCollatorForLanguageModeling(pad_token_id=0)(ROWS)


def unpacked(logits):
    return [logits[0, start:end] for start, end in zip(BOUNDS, BOUNDS[1:], strict=False)]


def assert_equal(packed_logits, padded_logits):
    for sequence, row in zip(unpacked(packed_logits), padded_logits, strict=True):
        torch.testing.assert_close(sequence, row[: len(sequence)], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_each_packed_sequence_is_routed_on_its_own_prompt(model, packed, padded, mode):
    model.moa_config.routing = mode
    expected = model(**padded)
    routed = model.last_routing
    out = model(**packed)
    torch.testing.assert_close(model.last_routing.weights, routed.weights, rtol=1e-4, atol=1e-5)
    assert len(set(routed.experts)) > 1
    assert_equal(out.logits, expected.logits)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-5)
    assert out.past_key_values is None


@torch.no_grad()
def test_pinned_names_are_for_the_packed_sequences(model, packed, base_folder, adapters):
    names = ["dogs", "films", "cats"]
    with model.pinned(names):
        mixed = unpacked(model(**packed).logits)
    for row, name, got in zip(ROWS, names, mixed, strict=True):
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapters[name]).eval()
        expected = stock(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lengths_say_as_much_as_indices(model, packed):
    expected = model(**packed).logits
    without = {name: value for name, value in packed.items() if name != "seq_idx"}
    torch.testing.assert_close(model(**without).logits, expected)
    packed["seq_idx"] = packed["seq_idx"] * 3 + 5
    torch.testing.assert_close(model(**packed).logits, expected)


def test_gradients_of_packed_rows_equal_those_of_the_padded_batch_with_checkpointing_too(model, packed, padded):
    found = []
    model.train().requires_grad_(True)
    for batch, checkpointing in ((padded, False), (packed, False), (packed, True)):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**batch, use_cache=False).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if ".lora_" in n and p.grad is not None})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-5)
        assert torch.equal(found[1][name], found[2][name])


def test_a_packed_row_that_does_not_say_what_is_whose_is_refused(model, packed):
    hint = {name: packed[name] for name in ("input_ids", "position_ids", "labels")}
    with pytest.raises(ValueError, match="position_ids restart .* pass seq_idx or cu_seq_lens_q"):
        model(**hint)
    with model.pinned(["dogs", "films", "cats"]), pytest.raises(ValueError, match="position_ids restart"):
        model(**hint)


@torch.no_grad()
def test_what_is_alike_for_all_sequences_needs_no_indices(model, packed):
    hint = {name: packed[name] for name in ("input_ids", "position_ids")}
    for block in (model.using_base, lambda: model.using("dogs"), lambda: model.pinned(Routing(torch.eye(3)[:1]))):
        with block():
            torch.testing.assert_close(model(**hint).logits, model(**packed).logits)


@pytest.mark.parametrize("bounds", [[0, 5, 5, 15], [0, 0, 5, 15], [0, 5, 15, 15], [0, 8, 5, 15]])
@pytest.mark.parametrize("names", [None, ["dogs", "films"]])
def test_an_empty_packed_sequence_is_refused_before_the_next_one_takes_its_route(model, packed, bounds, names):
    row = {"input_ids": packed["input_ids"], "cu_seq_lens_q": torch.tensor(bounds)}
    with (
        nullcontext() if names is None else model.pinned(names),
        pytest.raises(ValueError, match=rf"a token or more: got cu_seq_lens_q {re.escape(str(bounds))}"),
    ):
        model(**row)


@pytest.mark.parametrize("inside", [False, True])
def test_packed_rows_with_a_cache_are_refused(model, packed, inside):
    cache = model(input_ids=packed["input_ids"][:, :1]).past_key_values
    with model.using_base() if inside else model.pinned(["dogs"] * 3):
        with pytest.raises(ValueError, match="packed rows were given with a cache"):
            model(**packed, use_cache=True)
        with pytest.raises(ValueError, match="packed rows were given with a cache"):
            model(**packed, past_key_values=cache)


def test_packed_rows_and_indices_of_other_sizes_are_refused(model, packed, padded):
    with pytest.raises(ValueError, match=r"in one row \[1, tokens\] .* \[3, 7\] and indices \[1, 15\]"):
        model(**padded, seq_idx=packed["seq_idx"])
    with model.pinned(["dogs", "cats"]), pytest.raises(ValueError, match="for 2 sequences, this packed row holds 3"):
        model(**packed)


def test_a_padded_batch_after_a_packed_one_is_read_as_what_it_is(model, packed, padded):
    with torch.no_grad(), model.pinned(["dogs", "films", "cats"]):
        first = model(**padded).logits
        model(**packed)
        torch.testing.assert_close(model(**padded).logits, first)
        model(**packed)
        model.generate(input_ids=padded["input_ids"], max_new_tokens=2)


@torch.no_grad()
def test_sequences_that_say_only_which_token_is_whose_do_not_see_each_other(model, packed):
    expected = model(**packed).logits
    without = {name: packed[name] for name in ("input_ids", "labels", "seq_idx")}
    torch.testing.assert_close(model(**without).logits, expected)
    with model.pinned(["cats"]), model.route_state.set(broadcast=True):
        alone = model(**packed).logits
        torch.testing.assert_close(model(**without).logits, alone)


@torch.no_grad()
def test_two_packed_rows_of_one_pinned_route_are_each_cut_where_they_say(model):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    with model.pinned(["dogs", "films", "cats"]):
        for rows in (ROWS, [ROWS[1], ROWS[2], ROWS[0]]):
            ids = [row["input_ids"] for row in rows]
            mixed = model(**collate(rows)).logits[0].split([len(row) for row in ids])
            for got, row, name in zip(mixed, ids, ["dogs", "films", "cats"], strict=True):
                with model.using(name):
                    alone = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
                torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
