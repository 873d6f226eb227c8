"""The router alone: what it reads, how it decides, what it was fitted for."""

import json
import shutil

import pytest
import torch
from sklearn.neighbors import NearestCentroid
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.config import RouterConfig
from moa.fingerprint import chat_template_sha256, tokenizer_sha256, weights_sha256
from moa.model import MoaModel
from moa.prefix import candidate_layers, prompt_states, prompt_tokens
from moa.router import SequenceRouter, attention_pool, last_pool, mean_pool
from moa.router_checks import describe_router

IDS = torch.tensor([[0, 5, 9, 12], [4, 6, 10, 13]])
MASK = (IDS > 0).long()


@pytest.fixture
def model(base_folder, adapters):
    return MoaModel.from_adapters(str(base_folder), adapters)


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


def some_router(seed=0, **architecture):
    torch.manual_seed(seed)
    router = SequenceRouter(32, 3, **architecture)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


ARCHITECTURES = [
    {"pooling": "last"},
    {"head": "centroid"},
    {"pooling": "attention"},
    {"head": "mlp", "hidden_units": 5},
    {"pooling": "attention", "head": "mlp", "hidden_units": 5},
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_reads_the_masked_tokens_alone(side):
    torch.manual_seed(0)
    states, query = torch.randn(2, 5, 8).double(), torch.randn(8)
    lengths = [3, 5]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    kept = [row[keep].float() for row, keep in zip(states, mask, strict=True)]
    torch.testing.assert_close(mean_pool(states, mask), torch.stack([row.mean(0) for row in kept]))
    torch.testing.assert_close(last_pool(states, mask), torch.stack([row[-1] for row in kept]))
    attended = []
    for row in kept:
        normed = (row - row.mean(1, keepdim=True)) / (row.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        attended.append(torch.softmax(normed @ query / 8**0.5, dim=0) @ row)
    torch.testing.assert_close(attention_pool(states, mask, query), torch.stack(attended))


def test_attention_starts_as_the_mean():
    states, mask = torch.randn(2, 4, 32), MASK.bool()
    torch.testing.assert_close(SequenceRouter(32, 3, pooling="attention").pool(states, mask), mean_pool(states, mask))


@pytest.mark.parametrize(
    "held, prompt",
    [([[1, 1], [0, 0]], None), ([[1, 1], [0, 1]], [[1, 1], [1, 0]])],
    ids=["all padding", "all that is no padding is answer"],
)
def test_a_sequence_without_prompt_tokens_is_refused(held, prompt):
    held, prompt = torch.tensor(held).bool(), None if prompt is None else torch.tensor(prompt).bool()
    with pytest.raises(ValueError, match="sequence 1 of the batch has no prompt token"):
        prompt_tokens(held, prompt)


@pytest.mark.parametrize("shape", [(6,), (2, 5), (1, 6)])
def test_a_prompt_mask_or_labels_of_another_shape_are_refused(model, shape):
    model.set_router(some_router())
    ids = torch.tensor([[3, 7, 9, 11, 24, 5], [5, 10, 12, 16, 23, 3]])
    with pytest.raises(ValueError, match=r"prompt mask, or labels, of shape .* give one entry for each token"):
        model.route(ids, prompt_mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"prompt mask, or labels, of shape .* give one entry for each token"):
        model(input_ids=ids, labels=torch.full(shape, -100))


def test_a_prompt_mask_may_hold_numbers(model):
    model.set_router(some_router())
    ids = torch.tensor([[3, 7, 9, 11, 24, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    expected = model.route(ids[:, :4]).weights
    for dtype in (torch.bool, torch.long, torch.float32):
        torch.testing.assert_close(model.route(ids, prompt_mask=mask.to(dtype), abstain=False).weights, expected)


def test_a_granularity_that_does_not_exist_is_refused(model):
    model.set_router(some_router())
    with pytest.raises(ValueError, match="granularity 'word' does not exist"):
        model.route(torch.tensor([[3, 7, 9]]), granularity="word")


def test_centroids_choose_as_sklearn_does():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 70 + [1] * 14 + [2] * 6)  # a rare task's mean is far from that of all
    features = (torch.randn(90, 32) + torch.randn(3, 32)[labels]) * torch.logspace(-2, 2, 32)
    router = SequenceRouter(32, 3, head="centroid")
    router.standardise(features)
    router.fit_centroids(features, torch.nn.functional.one_hot(labels, 3).float())
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    expected = NearestCentroid().fit(standard.numpy(), labels.numpy()).predict(standard.numpy())
    assert router(features).argmax(dim=-1).tolist() == expected.tolist()


def test_what_never_varied_in_training_does_not_decide_later():
    features = torch.randn(20, 32)
    features[:, 7] = 3.0
    router = some_router()
    router.standardise(features)
    assert router.standardised(features + 0.01)[:, 7].abs().max() < 1


def test_states_of_several_layers_are_those_of_the_whole_pass(base_model):
    found = prompt_states(base_model, [3, 1, 4], IDS, MASK)
    positions = (MASK.cumsum(dim=1) - 1).clamp_min(0)
    expected = base_model(input_ids=IDS, attention_mask=MASK, position_ids=positions, output_hidden_states=True)
    for layer, states in zip([3, 1], found, strict=False):
        torch.testing.assert_close(states, expected.hidden_states[layer])
    torch.testing.assert_close(base_model.model.norm(found[2]), expected.hidden_states[4])
    assert len(base_model.model.layers) == 4
    assert candidate_layers(base_model) == [1, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_router_is_saved_and_loaded(model, base_folder, tmp_path, architecture):
    router = some_router(**architecture)
    router.standardise(torch.randn(9, 32))
    model.set_router(router)
    model.save_pretrained(tmp_path / "moa")
    loaded = MoaModel.from_pretrained(None, tmp_path / "moa")
    assert loaded.moa_config == model.moa_config
    torch.testing.assert_close(loaded.route(IDS, MASK).logits, model.route(IDS, MASK).logits)
    with model.using_base():
        states = model.get_base_model()(input_ids=IDS[1:], output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(model.route(IDS, MASK).logits[1:], router(states, torch.ones(1, 4).bool()))


def test_a_folder_from_before_routers_could_differ_still_loads(model, tmp_path):
    router = some_router()
    model.set_router(router)
    model.save_pretrained(tmp_path / "moa")
    file = tmp_path / "moa" / "moa_config.json"
    config = json.loads(file.read_text())
    del config["router"]
    file.write_text(json.dumps({**config, "router_layer": 2, "hidden_size": 32}))
    loaded = MoaModel.from_pretrained(None, tmp_path / "moa")
    assert loaded.moa_config.router.layer == 2 and loaded.moa_config.router.pooling == "mean"
    torch.testing.assert_close(loaded.moa_router.head.weight, router.head.weight)


def test_a_config_whose_layers_are_no_numbers_is_refused():
    for given in ({"layer": "3"}, {"depths": [1, None]}):
        with pytest.raises(ValueError, match="layers that routers read are whole numbers"):
            RouterConfig(**given)


def test_a_router_that_its_config_does_not_describe_is_refused(model, tmp_path):
    model.set_router(some_router())
    model.save_pretrained(tmp_path / "moa")
    file = tmp_path / "moa" / "moa_config.json"
    config = json.loads(file.read_text())
    config["router"]["pooling"] = "attention"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not the router that moa_config.json describes .*query"):
        MoaModel.from_pretrained(None, tmp_path / "moa")
    config["router"]["hidden_size"] = None
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="moa_config.json describes none"):
        MoaModel.from_pretrained(None, tmp_path / "moa")


def test_a_router_of_other_experts_is_refused(model, base_folder, adapters):
    fitted = describe_router(model, some_router(), 1)
    other = MoaModel.from_adapters(str(base_folder), dict(reversed(adapters.items())))
    with pytest.raises(ValueError, match="for the experts cats, dogs, films, this mixture has films, dogs, cats"):
        other.set_router(some_router(), fitted)


def test_a_router_of_other_base_weights_is_refused_however_they_are_called(model, base_folder, tmp_path):
    model.set_router(some_router())
    model.save_pretrained(tmp_path / "moa")

    def other():
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        with torch.no_grad():
            base.model.layers[2].mlp.up_proj.weight.mul_(1.5)
        return base

    with pytest.raises(ValueError, match="the router was fitted on other base weights"):
        MoaModel.from_pretrained(other(), tmp_path / "moa")
    assert MoaModel.from_pretrained(other(), tmp_path / "moa", check_base=False).moa_router is not None
    assert MoaModel.from_pretrained(other(), tmp_path / "moa", router=False).moa_router is None


def test_another_dtype_is_the_same_base(base_folder, base_model):
    in_bf16 = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    assert weights_sha256(base_model) == weights_sha256(in_bf16) is not None
    base_model.is_quantized = True
    assert weights_sha256(base_model) is None


def test_another_tokenizer_or_chat_template_is_refused(model, base_folder, tokenizer, tmp_path):
    model.check_tokenizer(tokenizer)  # there is no router yet
    router = some_router()
    model.set_router(router, describe_router(model, router, 1, tokenizer=tokenizer))
    model.check_tokenizer(tokenizer)
    tokenizer(["a cat", "dog"], padding=True, truncation=True, max_length=1)
    model.check_tokenizer(tokenizer)
    shutil.copytree(base_folder, tmp_path / "other")
    changed = AutoTokenizer.from_pretrained(tmp_path / "other")
    changed.add_tokens(["birds"])
    with pytest.raises(ValueError, match="another tokenizer than that of .*other.*moa fit-router"):
        model.check_tokenizer(changed)
    templated = AutoTokenizer.from_pretrained(base_folder)
    templated.chat_template = "{{ messages }}"
    assert tokenizer_sha256(templated) == tokenizer_sha256(tokenizer)
    assert chat_template_sha256(templated) != chat_template_sha256(tokenizer)
    with pytest.raises(ValueError, match="another chat template than that of"):
        model.check_tokenizer(templated)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ({"pooling": "max"}, "pooling 'max' does not exist: choose one of mean, last, attention"),
        ({"head": "tree"}, "head 'tree' does not exist: choose one of centroid, linear, mlp"),
        ({"head": "mlp"}, "hidden units are the mlp head's"),
        ({"hidden_units": 4}, "got hidden_units=4 for linear"),
    ],
)
def test_a_router_that_does_not_exist_is_refused(architecture, said):
    with pytest.raises(ValueError, match=said):
        RouterConfig(**architecture)


def test_calibration_finds_the_scale_of_any_head():
    torch.manual_seed(0)
    truth = torch.randn(2000, 3)
    labels = torch.distributions.Categorical(logits=truth).sample()
    for factor in (4.0, 4000.0):
        router = SequenceRouter(3, 3)
        with torch.no_grad():
            router.head.weight.copy_(factor * torch.eye(3))
        assert router.calibrate(truth, labels) == pytest.approx(factor, rel=0.15)
