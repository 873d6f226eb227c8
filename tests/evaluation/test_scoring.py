"""Likelihoods and generations from a shared cache, against whole forwards without one."""

import pytest
import torch
from transformers import AutoTokenizer

from moa.evaluation.scoring import answer_examples
from moa.model import MoaModel
from moa.tasks import Example


@pytest.fixture
def model(base_folder, adapters):
    return MoaModel.from_adapters(str(base_folder), adapters)


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


CHOICES = (" yes no", " no . the", " good")
EXAMPLES = [
    Example("t", "question : the red cat ran ? answer :", CHOICES[0], ("yes no",), CHOICES, 0),
    Example("t", "the dog ?", CHOICES[2], ("good",), CHOICES, 2),
    Example("t", "one blue film , two cat . review :", CHOICES[1], ("no . the",), CHOICES, 1),
]


def logprob(model, tokenizer, prompt, answer):
    """Of one answer after one prompt, without batches, padding or cache."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
    with torch.no_grad():
        logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[0, i]]) for i in range(len(prompt_ids), ids.shape[1]))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_choice_gets_its_own_log_probability(model, tokenizer, batch_size):
    answered = answer_examples(
        model, tokenizer, EXAMPLES, lambda *_: model.using("dogs"), max_new_tokens=None, batch_size=batch_size
    )
    with model.using("dogs"):
        for example, got in zip(EXAMPLES, answered, strict=True):
            expected = [logprob(model, tokenizer, example.prompt, choice) for choice in CHOICES]
            assert got.choice_logprobs == pytest.approx(expected, abs=1e-4)
            assert got.nll == pytest.approx(-expected[example.label], abs=1e-4)
            assert got.answer_tokens == len(example.answer.split())
            assert got.generated is None


def test_the_generation_equals_that_of_each_prompt_alone(model, tokenizer):
    answered = answer_examples(model, tokenizer, EXAMPLES, lambda *_: model.using_base(), max_new_tokens=6)
    with model.using_base():
        for example, got in zip(EXAMPLES, answered, strict=True):
            ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
            alone = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
            assert got.generated == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_generative_example_is_scored_by_its_answer(model, tokenizer):
    example = Example("t", "the cat", " sat .", ("sat .",), (), None)
    (got,) = answer_examples(model, tokenizer, [example], lambda *_: model.using("cats"), max_new_tokens=4)
    with model.using("cats"):
        assert got.nll == pytest.approx(-logprob(model, tokenizer, "the cat", " sat ."), abs=1e-4)
    assert got.choice_logprobs == () and isinstance(got.generated, str)


def test_a_mixed_batch_scores_each_row_by_its_own_expert(model, tokenizer):
    names = {example.prompt: name for example, name in zip(EXAMPLES, ["films", "cats", "dogs"], strict=True)}

    def activate(input_ids, attention_mask):
        rows = [tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        return model.pinned(
            [names[next(p for p in names if tokenizer(p)["input_ids"] == tokenizer(r)["input_ids"])] for r in rows]
        )

    answered = answer_examples(model, tokenizer, EXAMPLES, activate, max_new_tokens=None)
    for example, got in zip(EXAMPLES, answered, strict=True):
        with model.using(names[example.prompt]):
            expected = [logprob(model, tokenizer, example.prompt, choice) for choice in CHOICES]
        assert got.choice_logprobs == pytest.approx(expected, abs=1e-4)
