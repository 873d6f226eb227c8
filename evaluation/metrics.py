"""The four metrics of the tasks, as `evaluate.Metric` subclasses that need no network.

`evaluate.load("rouge")` downloads a script from the Hub; these are the same numbers straight from the
libraries behind those scripts (scikit-learn, rouge-score, sacrebleu), and `add_batch` and `evaluate.combine`
work as ever. Two things differ from the scripts: every score is on a scale of 0 to 100, and text metrics take
the acceptable answers of an example as a list, `references=[["Paris", "in Paris"], ...]`.

| name | scores | headline |
|---|---|---|
| accuracy | accuracy, precision, recall, f1 (macro), mcc (-100 to 100) | accuracy |
| squad | exact_match, f1 | f1 |
| rouge | rouge1, rouge2, rougeL, rougeLsum | rougeLsum |
| bleu | bleu, chrf | bleu |
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

from moa.errors import nearest, one_line
from moa.evaluation.answers import answer_tokens, one_sentence_a_line, parse_choice, token_f1

UNPARSABLE = -1
"""The label of a generated answer in which `parse_choice` finds no choice: never right, in no class."""

LABELS = Features({"predictions": Value("int64"), "references": Value("int64")})
TEXTS = Features({"predictions": Value("string"), "references": ListOf(Value("string"))})


class TaskMetric(evaluate.Metric, ABC):
    """A metric that also knows its headline, its settings and the headline score of a single example."""

    headline: str
    description: str
    citation: str
    features = TEXTS

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=f"predictions and references: {self.features}",
            features=self.features,
        )

    @abstractmethod
    def per_example(self, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
        """The headline score of each example, 0 to 100."""

    def settings(self, references: Sequence[Any]) -> str:
        """How the numbers were made, to be stored beside them."""
        return self.description


class Accuracy(TaskMetric):
    headline = "accuracy"
    description = (
        "scikit-learn on label indices: accuracy; precision, recall and F1 as macro averages over the "
        "classes that occur among the references; Matthews correlation (mcc)"
    )
    citation = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011"
    features = LABELS

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            references, predictions, labels=sorted(set(references)), average="macro", zero_division=0
        )
        scores = {
            "accuracy": accuracy_score(references, predictions),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "mcc": matthews_corrcoef(references, predictions) if len({*references, *predictions}) > 1 else 0.0,
        }
        return {name: 100 * float(value) for name, value in scores.items()}

    def per_example(self, predictions: Sequence[int], references: Sequence[int]) -> list[float]:
        return [100.0 * (p == r) for p, r in zip(predictions, references, strict=True)]


class Squad(TaskMetric):
    headline = "f1"
    description = (
        "exact match and token F1 of SQuAD v1.1: lower case, no punctuation, no a/an/the, single spaces; "
        "the best over the acceptable answers"
    )
    citation = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016"

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        exact = _best(lambda a, b: 100.0 * (answer_tokens(a) == answer_tokens(b)), predictions, references)
        return {"exact_match": fmean(exact), "f1": fmean(self.per_example(predictions, references))}

    def per_example(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return _best(token_f1, predictions, references)


class Rouge(TaskMetric):
    headline = "rougeLsum"
    description = (
        "rouge-score F-measures with use_stemmer=True, mean over examples; rougeLsum with one sentence a "
        "line in both texts, split at line breaks and after . ! ? followed by white space"
    )
    citation = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"
    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        rows = self._rows(predictions, references)
        return {name: fmean(row[name] for row in rows) for name in self.names}

    def per_example(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        return [row[self.headline] for row in self._rows(predictions, references)]

    def _rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
        scorer = RougeScorer(self.names, use_stemmer=True)
        rows = []
        for prediction, answers in zip(predictions, references, strict=True):
            best = scorer.score_multi([one_sentence_a_line(a) for a in answers], one_sentence_a_line(prediction))
            rows.append({name: 100 * best[name].fmeasure for name in self.names})
        return rows


class Bleu(TaskMetric):
    headline = "bleu"
    description = "corpus BLEU and chrF2 of sacrebleu (one example: sentence BLEU with effective order)"
    citation = "Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018"

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        streams = _reference_streams(references)
        return {
            "bleu": BLEU().corpus_score(predictions, streams).score,
            "chrf": CHRF().corpus_score(predictions, streams).score,
        }

    def per_example(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Sentence BLEU: corpus BLEU is not its mean, only its spread over examples is of use."""
        bleu = BLEU(effective_order=True)
        return [bleu.sentence_score(p, list(r)).score for p, r in zip(predictions, references, strict=True)]

    def settings(self, references: Sequence[Sequence[str]]) -> str:
        """The description and both signatures; `nrefs` in them depends on the references."""
        bleu, chrf = BLEU(), CHRF()
        for metric in (bleu, chrf):
            metric.corpus_score([""] * len(references), _reference_streams(references))
        return f"{self.description}; BLEU {bleu.get_signature()}; chrF2 {chrf.get_signature()}"


__all__ = ["METRICS", "UNPARSABLE", "headline", "load", "parse_choice", "per_example", "score", "settings"]

METRICS: dict[str, type[TaskMetric]] = {
    "accuracy": Accuracy,
    "squad": Squad,
    "rouge": Rouge,
    "bleu": Bleu,
}


def load(name: str, **options: Any) -> evaluate.EvaluationModule:
    """A metric of ours, or whatever `evaluate.load` finds (on its own scale, often 0 to 1).

    Raises:
        ValueError: when neither knows the name.
    """
    if name in METRICS:
        return METRICS[name](**options)
    try:
        return evaluate.load(name, **options)
    except FileNotFoundError as error:
        raise ValueError(
            f"unknown metric {name!r}{nearest(name, METRICS)} (there are {', '.join(METRICS)}; "
            f"evaluate.load does not find it either: {one_line(error)})"
        ) from None


def headline(name: str) -> str:
    """The key of the one score that stands for a metric, "squad" -> "f1"; 0 to 100, higher is better."""
    return _find(name).headline


def settings(name: str, references: Sequence[Any]) -> str:
    """How a metric makes its numbers; for BLEU with sacrebleu's signatures for these references."""
    return _find(name)(keep_in_memory=True).settings(references)


def score(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """All scores of a metric over a set of examples, 0 to 100.

    Args:
        predictions: label indices for "accuracy" (`UNPARSABLE` for none), else one text an example.
        references: label indices for "accuracy", else the acceptable answers of each example.

    Raises:
        ValueError: when the name is unknown, nothing is to be scored, or the two differ in length.
    """
    metric = _find(name)(keep_in_memory=True)
    _check(predictions, references)
    return metric.compute(predictions=list(predictions), references=_plain(references))


def per_example(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> list[float]:
    """The headline score of each example, 0 to 100: what a bootstrap over examples resamples.

    Its mean is the headline, except for BLEU, where it is smoothed sentence BLEU.
    """
    metric = _find(name)(keep_in_memory=True)
    _check(predictions, references)
    return metric.per_example(list(predictions), _plain(references))


def _find(name: str) -> type[TaskMetric]:
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}{nearest(name, METRICS)} (there are {', '.join(METRICS)})")
    return METRICS[name]


def _check(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give one each")
    if not predictions:
        raise ValueError("there is nothing to score: give one example at least")
    empty = [index for index, answers in enumerate(references) if isinstance(answers, Sequence) and not answers]
    if empty:
        raise ValueError(f"example {empty[0]} has no reference: give each one acceptable answer at least")


def _plain(references: Sequence[Any]) -> list[Any]:
    return [answers if isinstance(answers, int) else list(answers) for answers in references]


def _best(
    compare: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float]:
    pairs = zip(predictions, references, strict=True)
    return [max(compare(prediction, answer) for answer in answers) for prediction, answers in pairs]


def _reference_streams(references: Sequence[Sequence[str]]) -> Any:
    """What sacrebleu takes: the first answers of all examples, then the second ones, None where none is."""
    most = max(map(len, references))
    return [[answers[i] if i < len(answers) else None for answers in references] for i in range(most)]
