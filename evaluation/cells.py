"""One cell of the table: a system's answers to one task, scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moa.evaluation import metrics
from moa.evaluation.answers import parse_choice
from moa.evaluation.scoring import Answered
from moa.tasks import Example, Task


def score_cell(task: Task, examples: Sequence[Example], answered: Sequence[Answered]) -> dict[str, Any]:
    """Scores (0 to 100), the answers' negative log-likelihood per token, and the headline of each example.

    A task with choices is scored by likelihood, `argmax` of the summed log-probability of each choice (and per
    character beside it where the choices are texts of their own); what the model writes itself is scored beside it,
    with the share in which no choice was found.
    """
    nll = sum(answer.nll for answer in answered) / sum(answer.answer_tokens for answer in answered)
    scored = _by_likelihood(examples, answered) if examples[0].choices else _by_text(task, examples, answered)
    return {"n": len(examples), "nll": nll, **scored}


def _by_likelihood(examples: Sequence[Example], answered: Sequence[Answered]) -> dict[str, Any]:
    labels = [example.label for example in examples]
    chosen = [_argmax(answer.choice_logprobs) for answer in answered]
    scores = metrics.score("accuracy", chosen, labels)
    if len({example.choices for example in examples}) > 1:
        per_character = [
            _argmax(
                [logprob / len(text) for logprob, text in zip(answer.choice_logprobs, example.choices, strict=True)]
            )
            for example, answer in zip(examples, answered, strict=True)
        ]
        scores["accuracy_norm"] = metrics.score("accuracy", per_character, labels)["accuracy"]
    return {
        "scores": scores,
        "per_example": metrics.per_example("accuracy", chosen, labels),
        "generated": _generated_choices(examples, answered),
    }


def _generated_choices(examples: Sequence[Example], answered: Sequence[Answered]) -> dict[str, float] | None:
    if any(answer.generated is None for answer in answered):
        return None
    parsed = [
        parse_choice(answer.generated, example.choices) for example, answer in zip(examples, answered, strict=True)
    ]
    found = [metrics.UNPARSABLE if choice is None else choice for choice in parsed]
    scores = metrics.score("accuracy", found, [example.label for example in examples])
    return {"accuracy": scores["accuracy"], "unparsable": 100 * parsed.count(None) / len(parsed)}


def _by_text(task: Task, examples: Sequence[Example], answered: Sequence[Answered]) -> dict[str, Any]:
    texts = [_first_paragraph(answer.generated, task.metric) for answer in answered]
    references = [example.references for example in examples]
    return {
        "scores": metrics.score(task.metric, texts, references),
        "per_example": metrics.per_example(task.metric, texts, references),
        "generated": None,
        "settings": metrics.settings(task.metric, references),
    }


def _first_paragraph(text: str, metric: str) -> str:
    """An answer ends with its line, a summary with its paragraph; what a model rambles after that is not it."""
    return text.strip().split("\n\n" if metric == "rouge" else "\n")[0].strip()


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
