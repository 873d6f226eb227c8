"""Weights judged on a model, against merged adapters that stock PEFT runs and against losses written out."""

import json

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa.adapters import add_to_model, from_model, read_adapter, write_adapter
from moa.low_rank import LowRank
from moa.model import MoaModel
from moa.model_objective import ModelObjective, objective_for
from moa.tasks import Example

GATES = torch.tensor([[0.0, 0.0, 0.0], [0.6, -0.4, 0.9], [1.0, 0.0, 0.0], [0.2, 0.3, 1.5]], dtype=torch.float64)
SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64)


def example(prompt, answer, task="cats"):
    return Example(task, prompt, answer, (answer.strip(),), (), None)


EXAMPLES = {
    "cats": [example("the red cat sat .", " good"), example("one dog ran answer :", " no good film")],
    "dogs": [example("review : the film good ? answer :", " yes positive"), example("a two blue", " cat")],
}


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def model(base_folder, adapters):
    return MoaModel.from_adapters(AutoModelForCausalLM.from_pretrained(base_folder), adapters).double()


@pytest.fixture
def objective(model, tokenizer):
    return ModelObjective(model, tokenizer, EXAMPLES, batch_size=5)


def logprobs(model, tokenizer, example):
    """Log-probabilities where each token of the answer is predicted, of one example alone, and the answer."""
    prompt = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
    whole = tokenizer(example.prompt + example.answer, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits
    answer = whole[0, prompt.shape[1] :]
    return logits[0, prompt.shape[1] - 1 : -1].log_softmax(dim=-1), answer


def mean_over(tokenizer, model, value, shares=SHARES):
    """The tasks' means of a value of (log-probabilities, answer), by their shares."""
    means = [
        sum(value(*logprobs(model, tokenizer, one)) for one in of_task) / len(of_task) for of_task in EXAMPLES.values()
    ]
    return float(sum(share * mean for share, mean in zip(shares, means, strict=True)))


def answer_loss(found, answer):
    return F.nll_loss(found, answer)


def test_a_mixed_batch_gives_each_candidate_the_loss_of_the_adapter_that_it_stands_for(model, objective, tokenizer):
    losses = objective.losses(GATES, SHARES)
    for index, gates in enumerate(GATES.tolist()):
        if any(gates):
            model.merge_adapters("concatenation", weights=gates, into=f"merged_{index}", dtype=torch.float64)
        with model.using(f"merged_{index}") if any(gates) else model.using_base():
            assert float(losses[index]) == pytest.approx(mean_over(tokenizer, model, answer_loss), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_size_of_batches_does_not_change_a_loss(model, tokenizer, objective, batch_size):
    other = ModelObjective(model, tokenizer, EXAMPLES, batch_size=batch_size)
    torch.testing.assert_close(other.losses(GATES, SHARES), objective.losses(GATES, SHARES))


@pytest.fixture
def equal_ranks(make_adapter, tmp_path):
    return {
        "cats": make_adapter(tmp_path / "cats", seed=1),
        "dogs": make_adapter(tmp_path / "dogs", seed=2, lora_alpha=3),
        "films": make_adapter(tmp_path / "films", seed=3, target_modules=["q_proj"]),
    }


def test_crossed_gates_are_the_adapter_whose_factors_are_summed(base_folder, equal_ranks, tokenizer, tmp_path):
    gates = {"cats": 0.8, "dogs": -0.5, "films": 0.3}
    read = {name: read_adapter(path, dtype=torch.float64).modules for name, path in equal_ranks.items()}
    summed = {
        module: LowRank(
            *(sum(gates[n] * getattr(read[n][module], f) for n in gates if module in read[n]) for f in "BA")
        )
        for module in read["cats"]
    }
    write_adapter(tmp_path / "summed", summed, base_model=None, dtype=torch.float32)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "summed").eval()
    mixture = MoaModel.from_adapters(AutoModelForCausalLM.from_pretrained(base_folder), equal_ranks)
    losses = ModelObjective(mixture, tokenizer, EXAMPLES).losses(
        torch.tensor([list(gates.values()), [-g for g in gates.values()]]), SHARES, crossed=True
    )
    expected = mean_over(tokenizer, stock, answer_loss)
    assert losses.tolist() == pytest.approx([expected, expected], rel=1e-4)


def test_crossed_gates_need_equal_ranks(objective):
    with pytest.raises(ValueError, match="factors of ranks .* cannot be added: use the linear form"):
        objective.losses(GATES, SHARES, crossed=True)


def per_layer(model):
    torch.manual_seed(0)
    return torch.rand(len(model.route_state.layers), 3, dtype=torch.float64)


def test_gates_of_each_layer_are_the_adapter_merged_layer_by_layer(model, objective, tokenizer):
    gates = per_layer(model)
    sources = [from_model(model, name, dtype=torch.float64).modules for name in model.experts]
    merged = {}
    for place, module in enumerate(model.route_state.layers):
        present = [(gates[place, i], s[module]) for i, s in enumerate(sources) if module in s]
        merged[module] = LowRank(torch.cat([g * u.B for g, u in present], dim=1), torch.cat([u.A for _, u in present]))
    add_to_model(model, "merged", merged)
    loss = objective.step_loss(gates, SHARES, kind="answers", step=0)
    with model.using("merged"):
        assert float(loss) == pytest.approx(mean_over(tokenizer, model, answer_loss), rel=1e-5)


@pytest.mark.parametrize("kind", ["answers", "entropy", "distillation"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_the_gradient_of_the_gates_is_that_of_finite_differences(model, objective, kind, by_layer):
    gates = per_layer(model) if by_layer else GATES[1].clone()
    direction = torch.randn(gates.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(gates):
        return objective.step_loss(gates, SHARES, kind=kind, guard=0.3, step=1, seed=4)

    leaf = gates.clone().requires_grad_()
    loss(leaf).backward()
    numeric = (loss(gates + 1e-3 * direction) - loss(gates - 1e-3 * direction)) / 2e-3  # norms are computed in float32
    assert float((leaf.grad * direction).sum()) == pytest.approx(float(numeric), rel=3e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_entropy_and_its_guard_are_what_they_are_called(model, objective, tokenizer):
    model.merge_adapters("concatenation", weights=GATES[1].tolist(), into="merged", dtype=torch.float64)

    def of_prediction(found, _):
        return -(found.exp() * found).sum(dim=-1).mean()

    with model.using("merged"):
        expected = mean_over(tokenizer, model, of_prediction)
        found = {one.prompt: logprobs(model, tokenizer, one)[0] for task in EXAMPLES.values() for one in task}
    assert float(objective.step_loss(GATES[1], SHARES, kind="entropy", step=0)) == pytest.approx(expected, rel=1e-5)

    with model.using_base():
        for share, of_task in zip(SHARES, EXAMPLES.values(), strict=True):
            for one in of_task:
                base, _ = logprobs(model, tokenizer, one)
                kl = F.kl_div(base, found[one.prompt], log_target=True, reduction="none").sum(dim=-1).mean()
                expected += 0.3 * float(share) * float(kl) / len(of_task)
    guarded = objective.step_loss(GATES[1], SHARES, kind="entropy", guard=0.3, step=0)
    assert float(guarded) == pytest.approx(expected, rel=1e-5)


def test_an_adapter_is_its_own_distillation(objective):
    only_dogs = torch.tensor([0.0, 1.0], dtype=torch.float64)
    same = objective.step_loss(torch.eye(3).double()[1], only_dogs, kind="distillation", step=0)
    other = objective.step_loss(torch.eye(3).double()[0], only_dogs, kind="distillation", step=0)
    assert float(same) == pytest.approx(0, abs=1e-9) and float(other) > 0.01


def test_every_example_is_drawn_once_a_round_and_rounds_differ(model, tokenizer):
    objective = ModelObjective(model, tokenizer, EXAMPLES, batch_size=1)
    losses = [float(objective.step_loss(GATES[1], SHARES, kind="answers", step=step, seed=3)) for step in range(24)]
    rounds = [losses[start : start + 4] for start in range(0, 24, 4)]
    assert all(sorted(of_round) == pytest.approx(sorted(rounds[0])) for of_round in rounds)
    assert len(set(map(tuple, rounds))) > 1
    whole = float(objective.losses(GATES[1:2], SHARES))
    assert sum(rounds[0]) / 4 == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("method", ["lorahub_linear", "lora_soups", "adamerging", "distillation"])
def test_a_merge_with_found_weights_is_one_vanilla_adapter_that_does_what_was_judged(
    model, tokenizer, objective, base_folder, tmp_path, method
):
    options = {"budget": 6} if method == "lorahub_linear" else {"steps": 3, "lr": 0.1}
    result = model.merge_adapters(method, objective=objective, output=tmp_path / "out", **options)
    gates = torch.tensor(
        [
            [result.report.layers[module].facts[f"gate_{name}"] for name in model.experts]
            for module in model.route_state.layers
        ],
        dtype=torch.float64,
    )
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "out").eval()
    judged = objective.step_loss(gates, SHARES, kind="answers", step=0)
    assert mean_over(tokenizer, stock, answer_loss) == pytest.approx(float(judged), rel=1e-4)


def test_lorahub_gives_the_adapter_whose_loss_it_reports(base_folder, equal_ranks, tokenizer, tmp_path):
    mixture = MoaModel.from_adapters(AutoModelForCausalLM.from_pretrained(base_folder), equal_ranks)
    objective = ModelObjective(mixture, tokenizer, EXAMPLES)
    facts = mixture.merge_adapters(
        "lorahub", weights=[0.7, 0.3, 0.1], objective=objective, output=tmp_path / "out", budget=12, seed=5
    ).report.facts
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "out").eval()
    size = sum(abs(facts[f"gate_{name}"]) for name in equal_ranks) / 3
    loss = mean_over(tokenizer, stock, answer_loss)
    assert loss + 0.05 * size == pytest.approx(facts["loss"], rel=1e-4)
    assert facts["loss"] <= min(facts["loss_of_base"], facts["loss_of_average"])


def test_an_interrupted_training_goes_on_to_the_same_bytes(model, objective, tmp_path, monkeypatch):
    options = {"objective": objective, "steps": 6, "lr": 0.05}
    model.merge_adapters("lora_soups", output=tmp_path / "whole", **options)
    calls = []

    def step_loss(*args, judge=objective.step_loss, **kwargs):
        calls.append(kwargs["step"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return judge(*args, **kwargs)

    monkeypatch.setattr(objective, "step_loss", step_loss)
    state = str(tmp_path / "state.json")
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapters("lora_soups", journal=state, **options)
    model.merge_adapters("lora_soups", journal=state, output=tmp_path / "resumed", **options)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    weights = "adapter_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "resumed" / weights).read_bytes()


def test_a_state_is_of_these_experts_and_examples(model, tokenizer, objective, tmp_path):
    state = str(tmp_path / "state.json")
    options = {"journal": state, "steps": 2, "granularity": "adapter"}
    model.merge_adapters("lora_soups", objective=objective, **options)
    assert json.loads((tmp_path / "state.json").read_text())["content"]["losses"]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B.dogs" in name).mul_(2)
    with pytest.raises(ValueError, match="of a search with another objective"):
        model.merge_adapters("lora_soups", objective=objective, **options)


def test_names_alone_make_an_objective(base_folder, make_adapter, tmp_path):
    folders = [make_adapter(tmp_path / run / "checkpoint-60", seed=seed) for seed, run in enumerate("ab")]
    judged = objective_for(folders, str(base_folder), ["sst2", "mnli"], source="pocket", examples=3)
    assert judged.names == judged.tasks == ("checkpoint-60", "checkpoint-60#2")
    new = objective_for(folders, str(base_folder), ["paws"], source="pocket", examples=3)
    assert new.tasks == ("paws",)
    one, two = new.losses(torch.eye(2).double(), torch.ones(1).double()).tolist()
    assert one != two


def test_bad_input_is_refused(model, tokenizer, objective):
    with pytest.raises(ValueError, match="judged by examples, and there are none"):
        ModelObjective(model, tokenizer, {"cats": []})
    with pytest.raises(ValueError, match="no token of its own"):
        ModelObjective(model, tokenizer, {"cats": [example("the cat", "")]})
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        ModelObjective(model, tokenizer, EXAMPLES, batch_size=0)
    with pytest.raises(ValueError, match="one for each of 3 experts, got 1"):
        ModelObjective(model, tokenizer, EXAMPLES, names=["a"])
    birds = ModelObjective(model, tokenizer, {"birds": EXAMPLES["cats"]})
    with pytest.raises(ValueError, match="none is called 'birds': name examples after the adapters"):
        model.merge_adapters("distillation", objective=birds)
    with pytest.raises(ValueError, match="weights are for 2 layers, and experts adapt"):
        objective.step_loss(torch.ones(2, 3).double(), SHARES, kind="answers", step=0)
    with pytest.raises(ValueError, match="lorahub adds factors, so all adapters need the same rank"):
        model.merge_adapters("lorahub", objective=objective)
