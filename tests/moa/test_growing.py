"""A mixture that gains or loses an expert: its router against sklearn's, its adapters against stock PEFT."""

import pytest
import torch
from peft import PeftModel
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.router_checks import describe_router
from moa.router_rows import with_expert, without_expert
from moa.routing import Routing
from moa.strangeness import Abstention, fit_mahalanobis

PROMPTS = {
    "cats": ["the red cat sat .", "a cat ran .", "one red cat", "the cat , the cat", "two cat sat", "red cat : yes"],
    "dogs": ["one blue dog ran", "a blue dog .", "the dog ran .", "two dog ran", "blue dog : no", "the dog , a dog"],
    "films": [
        "film review : good",
        "bad film review",
        "review ? film",
        "good film ? yes",
        "film : bad",
        "a film review",
    ],
}


def drawn(count, width=6, each=80):
    """Prompts' features about the corners of a simplex, with one covariance, and whose they are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    labels = torch.arange(count).repeat_interleave(each)
    return torch.randn(count * each, width, generator=generator) @ mix + 3 * torch.eye(count, width)[labels], labels


def fitted(features, labels, head="centroid"):
    experts = int(labels.max()) + 1
    router = SequenceRouter(features.shape[1], experts, head=head)
    router.standardise(features)
    router.fit_centroids(features, torch.nn.functional.one_hot(labels).float())
    router.detector = fit_mahalanobis(router.standardised(features), labels, experts)
    return router


class Known:
    """A covariance that sklearn need not estimate."""

    def __init__(self, covariance):
        self.covariance_ = covariance

    def fit(self, features):
        return self


def discriminant(router, features, labels):
    """sklearn's, with the covariance that the router has kept."""
    of = router.detector
    covariance = of.directions.T @ torch.diag(of.variances) @ of.directions
    count = int(labels.max()) + 1
    analysis = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=Known(covariance.numpy()), priors=[1 / count] * count
    )
    return analysis.fit(router.standardised(features).numpy(), labels.numpy())


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def model(base_folder, adapters):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    return MoaModel.from_adapters(base, {name: adapters[name] for name in ("cats", "dogs")})


def give_router(model, tokenizer, head="linear"):
    """A router over the experts of the model, made of their prompts."""
    with torch.no_grad():
        pooled = [
            model.features(**tokenizer(PROMPTS[name], return_tensors="pt", padding=True)) for name in model.experts
        ]
    labels = torch.arange(len(pooled)).repeat_interleave(torch.tensor([len(one) for one in pooled]))
    router = SequenceRouter(32, len(pooled), head=head, hidden_units=4 if head == "mlp" else None)
    features = torch.cat(pooled)
    router.standardise(features)
    if head != "mlp":
        router.fit_centroids(features, torch.nn.functional.one_hot(labels).float())
    router.detector = fit_mahalanobis(router.standardised(features), labels, len(pooled))
    config = describe_router(model, router, model.moa_config.router.layer, tokenizer=tokenizer)
    config.abstention = Abstention("mahalanobis", 0.05, 1e-3, 2e-3)
    model.set_router(router, config)
    return model


def test_a_linear_head_gains_the_row_that_the_discriminant_of_all_experts_has():
    features, labels = drawn(4)
    known = labels < 3
    router = fitted(features[known], labels[known], "linear")
    of_known = discriminant(router, features[known], labels[known])
    # a trained head differs by what all experts share, and in scale
    router.head.weight.data = torch.tensor(0.4 * of_known.coef_).float() + torch.linspace(-1, 1, 6)
    router.head.bias.data = torch.tensor(0.4 * of_known.intercept_).float() - 2.0
    grown = with_expert(router, features[~known])
    z = router.standardised(features)
    of_all = torch.tensor(discriminant(router, features, labels).decision_function(z.numpy())).float()
    torch.testing.assert_close(grown(features).softmax(dim=1), (0.4 * of_all).softmax(dim=1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grown(features)[:, :3], router(features))


def test_a_centroid_head_gains_the_row_that_a_fit_of_all_experts_has():
    features, labels = drawn(3)
    known = labels < 2
    router = fitted(features[known], labels[known])
    together = SequenceRouter(6, 3, head="centroid")
    together.mean, together.std = router.mean, router.std
    together.fit_centroids(features, torch.nn.functional.one_hot(labels).float())
    grown = with_expert(router, features[labels == 2])
    torch.testing.assert_close(grown(features), together(features))


@pytest.mark.parametrize("head", ["linear", "centroid"])
def test_what_came_last_and_goes_leaves_the_router_as_it_was(head):
    features, labels = drawn(3)
    router = fitted(features[labels < 2], labels[labels < 2], head)
    again = without_expert(with_expert(router, features[labels == 2]), 2)
    torch.testing.assert_close(again.state_dict(), router.state_dict())
    assert again.num_experts == 2


def test_a_router_of_clusters_gains_a_cluster_and_loses_all_rows_of_one():
    features, labels = drawn(4)
    router = fitted(features[labels < 3], labels[labels < 3]).folded([0, 1, 0])
    grown = with_expert(router, features[labels == 3])
    assert grown.clusters == [0, 1, 0, 2] and grown(features).shape == (len(features), 3)
    shrunk = without_expert(grown, 0)
    assert shrunk.clusters == [0, 1] and shrunk.head.weight.shape[0] == 2
    torch.testing.assert_close(shrunk(features), grown.head(grown.standardised(features))[:, [1, 3]])


def test_a_new_expert_runs_is_routed_to_and_survives_saving(model, tokenizer, adapters, base_folder, tmp_path):
    give_router(model, tokenizer).set_fallback("ties", scale=2.0, density=0.4, rank=3)
    grown = model.add_expert("films", adapters["films"], PROMPTS["films"], held_out=PROMPTS, tokenizer=tokenizer)
    assert model.experts == ("cats", "dogs", "films") and tuple(model.moa_config.experts) == model.experts
    assert set(grown.before) == {"cats", "dogs"} and set(grown.after) == set(PROMPTS)
    for index, (name, prompts) in enumerate(PROMPTS.items()):
        routed = model.route(**tokenizer(prompts, return_tensors="pt", padding=True)).experts
        assert grown.after[name] == pytest.approx(routed.count(index) / len(prompts)) and grown.after[name] > 0.6
    assert (grown.fallback.method, grown.fallback.scale, set(grown.fallback.weights)) == ("ties", 2.0, set(PROMPTS))
    assert grown.fallback.settings["density"] == 0.4 and model.peft_config["default"].r == 3

    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapters["films"]).eval()
    tokens = tokenizer("film review : good", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, stock(**tokens).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "moa")
    loaded = MoaModel.from_pretrained(str(base_folder), tmp_path / "moa")
    for prompts in PROMPTS.values():
        tokens = tokenizer(prompts, return_tensors="pt", padding=True)
        torch.testing.assert_close(loaded.route(**tokens).weights, model.route(**tokens).weights)


def test_the_new_experts_own_prompts_are_not_strange(model, tokenizer, adapters):
    give_router(model, tokenizer)
    before = model.moa_config.router.abstention
    model.add_expert("films", adapters["films"], PROMPTS["films"], tokenizer=tokenizer)
    after = model.moa_config.router.abstention
    assert after.merged_above > before.merged_above and after.base_above >= after.merged_above
    assert before.rate < after.rate == pytest.approx(1 / 7)  # six prompts promise no less
    assert model.route(**tokenizer(PROMPTS["films"], return_tensors="pt", padding=True)).fallback.tolist() == [0] * 6
    assert model.moa_config.router.calibration is None


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_an_expert_that_goes_leaves_the_others_routed_as_if_it_had_never_been(
    model, tokenizer, head, tmp_path, base_folder
):
    give_router(model, tokenizer, head).set_fallback()
    tokens = tokenizer(PROMPTS["dogs"], return_tensors="pt", padding=True)
    rows = model.moa_router(model.features(**tokens))[:, 1:]
    shrunk = model.remove_expert("cats", held_out={"dogs": PROMPTS["dogs"]})
    assert model.experts == ("dogs",) and "cats" not in model.peft_config
    assert shrunk.after == {"dogs": 1.0} and set(shrunk.fallback.weights) == {"dogs"}
    torch.testing.assert_close(model.route(**tokens, abstain=False).logits, rows)
    model.save_pretrained(tmp_path / "moa")
    assert MoaModel.from_pretrained(str(base_folder), tmp_path / "moa").experts == ("dogs",)


def test_without_a_router_only_the_adapter_comes(model, adapters):
    grown = model.add_expert("films", adapters["films"])
    assert grown.before == grown.after == {} and model.experts == ("cats", "dogs", "films")
    with model.pinned(["films"]):
        model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("change", ["goes", "comes"])
def test_a_conversation_does_not_go_on_with_other_experts_in_the_columns_of_its_route(model, adapters, change):
    model.set_fallback("svd")  # one column more, which a mixture of one expert more or less has too
    cache, prompt = DynamicCache(), torch.tensor([[3, 7, 9]])
    with model.pinned(Routing(torch.tensor([[0.0, 0.0, 1.0] if change == "comes" else [0.0, 1.0]]))):
        model(prompt, past_key_values=cache)
    if change == "comes":
        model.add_expert("films", adapters["films"])
    else:
        model.remove_expert("cats")
    with pytest.raises(ValueError, match="written when the experts were cats, dogs, and now they are"):
        model(prompt[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="written when the experts were cats, dogs, and now they are"):
        model.generate(torch.tensor([[3, 7, 9, 4]]), past_key_values=cache, max_new_tokens=2)
    with model.pinned(["dogs"]), pytest.raises(ValueError, match="written when the experts were cats, dogs"):
        model(prompt[:, :1], past_key_values=cache)


def test_a_merge_that_cannot_be_made_again_is_dropped_with_a_word(model, adapters):
    model.set_fallback("slerp", weights=[0.5, 0.5])  # of two adapters
    with pytest.warns(UserWarning, match="no merged adapter now, for 'slerp' cannot"):
        model.add_expert("films", adapters["films"])
    assert model.moa_config.fallback is None and "default" not in model.peft_config


def test_a_merge_of_chosen_experts_stays_one_of_those(model, adapters):
    model.set_fallback("svd", adapters=["cats"])
    assert set(model.add_expert("films", adapters["films"]).fallback.weights) == {"cats"}


def test_a_merge_of_adapters_that_are_no_experts_any_more_is_made_of_all_experts(model, adapters):
    model.set_fallback("svd")
    model.moa_config.fallback.weights = {"cats": 1 / 3, "sst2": 1 / 3, "mnli": 1 / 3}  # as "moa compose" leaves it
    assert set(model.add_expert("films", adapters["films"]).fallback.weights) == {"cats", "dogs", "films"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, path: model.add_expert("cats", path, PROMPTS["films"]), "'cats' is already loaded"),
        (lambda model, path: model.add_expert("default", path, PROMPTS["films"]), "the fallback's name"),
        (lambda model, path: model.add_expert("q_proj", path, PROMPTS["films"]), "cannot be called 'q_proj'"),
        (lambda model, path: model.add_expert("films", path, ["a film"]), "got 1 examples, give at least 2"),
        (
            lambda model, path: model.add_expert("films", path, PROMPTS["films"], held_out={"birds": ["one"]}),
            "held-out prompts of 'birds', which is no expert",
        ),
        (lambda model, path: model.add_expert("films", path, ["a film", ""]), "prompt 1 of 2, '', has none"),
        (lambda model, path: model.add_expert("films", path, ["", " "]), "prompt 0 of 2, '', has none"),
        (
            lambda model, path: model.add_expert("films", path, PROMPTS["films"], held_out={"cats": [" "]}),
            "prompt 6 of 7, ' ', has none",
        ),
        (lambda model, path: model.remove_expert("cats", held_out={"dogs": [""]}), "prompt 0 of 1, '', has none"),
        (lambda model, path: model.remove_expert("birds"), "no expert is called 'birds'"),
    ],
)
def test_bad_input_changes_nothing(model, tokenizer, adapters, change, message):
    give_router(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        change(model, adapters["films"])
    assert model.experts == ("cats", "dogs") and set(model.peft_config) == {"cats", "dogs"}


def test_an_mlp_head_the_last_expert_and_a_pinned_model_are_refused(model, tokenizer, adapters):
    give_router(model, tokenizer, "mlp")
    with pytest.raises(ValueError, match="an mlp head cannot gain a row"):
        model.add_expert("films", adapters["films"], PROMPTS["films"])
    with model.using_base(), pytest.raises(ValueError, match="leave the block first"):
        model.remove_expert("cats")
    model.remove_expert("cats")
    with pytest.raises(ValueError, match="the only expert"):
        model.remove_expert("dogs")


def test_an_expert_whose_adapter_was_deleted_is_refused_until_it_comes_back_or_is_taken_out(model, adapters):
    ids = torch.tensor([[3, 7, 9, 11, 24, 5]])
    with model.pinned(["cats"]), torch.no_grad():
        before = model(input_ids=ids).logits
    model.set_adapter("cats", inference_mode=True)
    model.delete_adapter("dogs")
    with pytest.raises(ValueError, match=r"expert 'dogs' was deleted.*remove_expert"), model.pinned(["dogs"]):
        pass
    model.load_adapter(str(adapters["dogs"]), "dogs")
    with model.pinned(["dogs"]):
        pass
    model.delete_adapter("dogs")
    model.remove_expert("dogs")
    with model.pinned(["cats"]), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("step", ["load_peft_weights", "set_peft_model_state_dict"])
def test_an_expert_that_could_not_be_loaded_leaves_nothing_and_may_come_again(model, adapters, monkeypatch, step):
    ids = torch.tensor([[3, 7, 9, 11, 24, 5]])

    def logits(name):
        with torch.no_grad(), model.pinned([name]):
            return model(input_ids=ids).logits

    before = {name: logits(name) for name in model.experts}
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(f"peft.peft_model.{step}", raise_interrupt)
        model.add_expert("films", adapters["films"])  # has layers that no other expert has
    assert list(model.peft_config) == list(model.experts) == ["cats", "dogs"]
    assert all(torch.equal(logits(name), before[name]) for name in before)
    model.add_expert("films", adapters["films"])
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model.get_base_model().name_or_path), adapters["films"]
    )
    with torch.no_grad():
        torch.testing.assert_close(logits("films"), stock(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def raise_interrupt(*given, **options):
    raise KeyboardInterrupt
