"""Generation with a cache: turns, streams, beams and samples, against each adapter alone through stock PEFT."""

import copy
import threading

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    TextIteratorStreamer,
)

from moa.arrow import ArrowRouter
from moa.choice import look_at
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.routing import Routing

PROMPT = torch.tensor([[3, 7, 9, 11, 24, 5], [5, 10, 12, 16, 23, 3], [9, 3, 3, 8, 17, 20]])
MORE = torch.tensor([[4, 9], [22, 14], [3, 7]])
GREEDY = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5}


@pytest.fixture
def model(base_model, adapters):
    torch.manual_seed(0)
    model = MoaModel.from_adapters(base_model, adapters)
    router = SequenceRouter(32, 3)
    torch.nn.init.normal_(router.head.weight, std=3.0)
    model.set_router(router)
    return model


@pytest.fixture
def stock(base_folder, adapters):
    def stock(name):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapters[name]).eval()

    return stock


def chosen(model, ids=PROMPT):
    return [model.experts[index] for index in model.route(ids).experts]


def test_turns_that_share_a_cache_keep_the_first_turns_route(model, stock):
    names, cache = chosen(model), DynamicCache()
    first = model.generate(input_ids=PROMPT, past_key_values=cache, **GREEDY)
    both = torch.cat([first, MORE], dim=1)
    second = model.generate(input_ids=both, past_key_values=cache, **GREEDY)
    for row, name in enumerate(names):
        alone = stock(name)
        turn = alone.generate(input_ids=PROMPT[row : row + 1], **GREEDY)
        expected = alone.generate(input_ids=torch.cat([turn, MORE[row : row + 1]], dim=1), **GREEDY)
        assert torch.equal(second[row : row + 1], expected)


def test_a_route_is_looked_at_once_for_all_tokens_that_follow_and_again_when_it_was_changed(model, monkeypatch):
    looked = []
    monkeypatch.setattr("moa.route_state.look_at", lambda weights: looked.append(weights) or look_at(weights))
    with torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
        for token in range(3):
            model(input_ids=MORE[:, :1] + token, past_key_values=cache)
        assert len(looked) == 1
        model.route_state.weights.zero_()
        model(input_ids=MORE[:, :1], past_key_values=cache)
        assert len(looked) == 2
        with model.using_base():
            expected = model(input_ids=MORE[:, :1], use_cache=False).logits
        without_cache = model.route_state.weights
        with model.pinned(Routing(without_cache)):
            assert torch.equal(model(input_ids=MORE[:, :1], use_cache=False).logits, expected)


def test_turns_inside_a_pinned_route_equal_those_without_a_cache(model):
    conversations = []
    with model.pinned(model.route(PROMPT)):
        for kept in ({"use_cache": False}, {"past_key_values": DynamicCache()}):
            ids = PROMPT
            for _ in range(3):
                ids = torch.cat([model.generate(input_ids=ids, **kept, **GREEDY), MORE], dim=1)
            conversations.append(ids)
    assert torch.equal(*conversations)


def test_a_forward_goes_on_from_its_own_cache(model):
    with torch.no_grad():
        whole = model(input_ids=PROMPT, use_cache=True)
        model(input_ids=PROMPT.flip(0))  # another batch in between changes nothing
        step = model(input_ids=MORE, past_key_values=whole.past_key_values).logits
        with model.pinned(model.route(PROMPT)):
            expected = model(input_ids=torch.cat([PROMPT, MORE], dim=1)).logits[:, -2:]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


def test_a_renewed_route_is_that_of_the_whole_conversation(model):
    cache = DynamicCache()
    with model.pinned(["cats", "cats", "cats"]):
        first = model.generate(input_ids=PROMPT, past_key_values=cache, **GREEDY)
    both = torch.cat([first, MORE], dim=1)
    model.reroute(cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(
        model.generate(input_ids=both, past_key_values=cache, **GREEDY), model.generate(input_ids=both, **GREEDY)
    )


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_another_route_is_refused(model, kind):
    cache = DynamicCache() if kind is DynamicCache else StaticCache(config=model.config, max_cache_len=24)
    with model.pinned(["cats", "dogs", "cats"]):
        first = model.generate(input_ids=PROMPT, past_key_values=cache, **GREEDY)
        model.generate(input_ids=torch.cat([first, MORE], dim=1), past_key_values=copy.deepcopy(cache), **GREEDY)
    with model.pinned(["cats", "dogs", "dogs"]):
        with pytest.raises(ValueError, match=r"written with another route .* model.reroute\(past_key_values\)"):
            model.generate(input_ids=torch.cat([first, MORE], dim=1), past_key_values=cache, **GREEDY)
        with pytest.raises(ValueError, match="written with another route"):
            model(input_ids=MORE, past_key_values=cache)


def test_a_cache_of_the_base_model_fits_weights_of_zero_only(model):
    with torch.no_grad(), model.using_base():
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
        expected = model(input_ids=torch.cat([PROMPT, MORE], dim=1)).logits[:, -2:]
    with model.pinned(["cats"] * 3), pytest.raises(ValueError, match="written with another route"):
        model(input_ids=MORE, past_key_values=cache)
    with torch.no_grad(), model.pinned(Routing(torch.zeros(1, 3))):
        got = model(input_ids=MORE, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_stream_gives_the_text_of_the_prompts_own_adapter(model, stock, base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for row, name in enumerate(chosen(model)):
        one = PROMPT[row : row + 1]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {"input_ids": one, "streamer": streamer, **GREEDY}
        thread = threading.Thread(target=model.generate, kwargs=options)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text.strip() == tokenizer.decode(stock(name).generate(input_ids=one, **GREEDY)[0, 6:])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 5},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    ],
)
def test_beams_and_samples_of_a_prompt_follow_its_route(model, stock, options):
    options = {"min_new_tokens": 4, "max_new_tokens": 4, **options}
    for row, name in enumerate(chosen(model)):
        one, results = PROMPT[row : row + 1], []
        for generator in (model, stock(name)):
            torch.manual_seed(7)
            results.append(generator.generate(input_ids=one, **options))
        assert torch.equal(*results)
    assert len(model.generate(input_ids=PROMPT, **options)) == 3 * options["num_return_sequences"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(model, stock, base_folder, side):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    prompts = ["the red cat sat .", "one dog ran", "review : the film good ? answer :"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side).data
    with torch.no_grad():
        mixed = model(**batch).logits
    names = chosen(model, batch["input_ids"][2:])
    for row, prompt in enumerate(prompts):
        one = tokenizer([prompt], return_tensors="pt").data
        (name,) = chosen(model, one["input_ids"])
        with torch.no_grad():
            expected = stock(name)(**one).logits[0]
        torch.testing.assert_close(mixed[row][batch["attention_mask"][row].bool()], expected, rtol=1e-4, atol=1e-4)
    assert names


def test_a_generation_without_a_mask_routes_on_the_tokens_that_transformers_takes_for_the_prompt(model):
    padded = torch.nn.functional.pad(PROMPT, (9, 0))
    expected = chosen(model)
    assert expected != chosen(model, padded)  # padding is no part of a prompt
    masked = model.generate(padded, attention_mask=padded.ne(0).long(), **GREEDY)
    assert torch.equal(model.generate(padded, **GREEDY), masked)
    model.generation_config.pad_token_id = 1  # the end's: transformers then takes all for the prompt
    unmasked = model.generate(padded, attention_mask=torch.ones_like(padded), **GREEDY)
    assert torch.equal(model.generate(padded, **GREEDY), unmasked) and not torch.equal(unmasked, masked)


@pytest.mark.parametrize(
    "other",
    [
        lambda model: model.using("cats"),
        lambda model: model.using_base(),
        lambda model: model.disable_adapter(),
        lambda model: model.route_state.set(layer_router=ArrowRouter(model.get_base_model(), model.experts)),
    ],
    ids=["one adapter", "base", "disabled", "tokens"],
)
def test_a_conversation_cannot_go_on_by_another_way_than_it_began(model, other):
    cache = DynamicCache()
    first = model.generate(input_ids=PROMPT, past_key_values=cache, **GREEDY)
    both = torch.cat([first, MORE], dim=1)
    with other(model), pytest.raises(ValueError, match="written with another route"):
        model.generate(input_ids=both, past_key_values=copy.deepcopy(cache), **GREEDY)
    with other(model):
        cache = DynamicCache()
        began = model.generate(input_ids=PROMPT, past_key_values=cache, **GREEDY)
        model.generate(input_ids=torch.cat([began, MORE], dim=1), past_key_values=copy.deepcopy(cache), **GREEDY)
    with model.pinned(["dogs"]), pytest.raises(ValueError, match="written with another route"):
        model.generate(input_ids=both, past_key_values=cache, **GREEDY)


def test_a_config_that_leaves_beams_open_has_those_of_the_model(model):
    expected = model.generate(input_ids=PROMPT, num_beams=3, **GREEDY)
    model.generation_config.num_beams = 3
    assert torch.equal(model.generate(input_ids=PROMPT, generation_config=GenerationConfig(**GREEDY)), expected)


def test_bare_weights_are_not_pinned(model):
    with (
        pytest.raises(ValueError, match=r"pinned as a Routing: model.pinned\(Routing\(weights\)\)"),
        model.pinned(torch.eye(3)),
    ):
        pass


def test_a_cache_whose_route_is_the_one_that_runs_is_not_asked_for_its_length():
    from moa.cached_route import check_route, remember
    from moa.route_state import RouteState

    class Static:
        def get_seq_length(self):
            raise AssertionError("a static cache on a GPU would have to be waited for")

    state, cache = RouteState(("cats", "dogs")), Static()
    state.weights = torch.tensor([[1.0, 0.0]])
    remember(cache, state)
    check_route(cache, state)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_that_was_emptied_takes_any_route(model, kind):
    cache = DynamicCache() if kind is DynamicCache else StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        with model.pinned(["cats", "dogs", "cats"]):
            model(input_ids=PROMPT, past_key_values=cache)
        cache.reset()
        with model.pinned(["dogs", "dogs", "cats"]):
            again = model(input_ids=PROMPT, past_key_values=cache).logits
            torch.testing.assert_close(again, model(input_ids=PROMPT, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_embeddings_do_not_take_the_route_that_a_cache_had_before_it_was_emptied(model):
    cache, embeddings = DynamicCache(), model.get_input_embeddings()(PROMPT)
    model(PROMPT, past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match="routes on the whole prompt as input_ids: got embeddings"):
        model(inputs_embeds=embeddings, past_key_values=cache)
