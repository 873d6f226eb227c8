import random
import re

import evaluate
import pytest
import sacrebleu
from rouge_score import rouge_scorer
from sklearn import metrics as sklearn_metrics

from moa.evaluation.metrics import (
    METRICS,
    UNPARSABLE,
    headline,
    load,
    parse_choice,
    per_example,
    score,
    settings,
)

SUMMARIES = ["The cat sat down. A dog barked!", "Nobody came"]
HIGHLIGHTS = [["A dog barked loudly.\nThe cat sat ."], ["Everybody came home", "Nobody was there"]]
TRANSLATIONS = ["the cat sat on the mat today", "there is a red house", "we go"]
GOLDS = [["the cat sat on a mat today"], ["there is a red house here"], ["we are going"]]


def test_accuracy_is_what_scikit_learn_says():
    rng = random.Random(0)
    gold = [rng.randrange(3) for _ in range(200)]
    said = [g if rng.random() < 0.6 else rng.randrange(3) for g in gold]
    precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(gold, said, average="macro")
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(gold, said),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "mcc": sklearn_metrics.matthews_corrcoef(gold, said),
    }
    assert score("accuracy", said, gold) == pytest.approx({k: 100 * v for k, v in expected.items()})


def test_an_unparsable_answer_is_wrong_and_makes_no_class_of_its_own():
    scores = score("accuracy", [0, UNPARSABLE, 1, 1], [0, 0, 1, 1])
    # Recall: 1/2 of class 0, 2/2 of class 1. Precision: 1/1 and 2/2.
    assert (scores["accuracy"], scores["recall"], scores["precision"]) == (75, 75, 100)


def test_squad_is_the_worked_example():
    # Tokens "seine river in paris" against "seine" and "river seine": best F1 2*2/(4+2) = 2/3.
    scores = score("squad", ["the Seine River, in Paris"], [["Seine", "The River Seine"]])
    assert scores == pytest.approx({"exact_match": 0, "f1": 200 / 3})
    scores = score("squad", ["An  apple!", "pear"], [["the apple"], ["fig"]])
    assert scores == pytest.approx({"exact_match": 50, "f1": 50})


def test_squad_gives_an_empty_gold_answer_no_f1_as_the_official_script_does():
    assert score("squad", ["the"], [["a"]]) == {"exact_match": 100, "f1": 0}


def test_squad_agrees_with_the_formula_on_random_answers():
    rng = random.Random(1)
    words = ["the", "a", "red", "blue", "Red.", "fox", "ox", "ox,"]

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 5)))

    def tokens(answer):
        return [w for w in re.sub(r"[.,]", "", answer.lower()).split() if w not in ("a", "an", "the")]

    def f1(answer, gold):
        left, right = tokens(answer), tokens(gold)
        same = sum(min(left.count(w), right.count(w)) for w in set(left))
        if same == 0:
            return 0
        precision, recall = same / len(left), same / len(right)
        return 100 * 2 * precision * recall / (precision + recall)

    said, golds = [text() for _ in range(200)], [[text(), text()] for _ in range(200)]
    expected = [max(f1(a, g) for g in gold) for a, gold in zip(said, golds, strict=True)]
    assert per_example("squad", said, golds) == pytest.approx(expected)


def test_rouge_is_what_rouge_score_says_of_texts_with_one_sentence_a_line():
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    first = scorer.score("A dog barked loudly.\nThe cat sat .", "The cat sat down.\nA dog barked!")
    second = scorer.score_multi(HIGHLIGHTS[1], SUMMARIES[1])
    expected = {name: 50 * (first[name].fmeasure + second[name].fmeasure) for name in names}
    assert score("rouge", SUMMARIES, HIGHLIGHTS) == pytest.approx(expected)
    assert first["rougeLsum"].fmeasure > first["rougeL"].fmeasure


def test_bleu_is_what_sacrebleu_says_of_the_corpus():
    streams = [[gold[0] for gold in GOLDS]]
    assert score("bleu", TRANSLATIONS, GOLDS) == pytest.approx(
        {
            "bleu": sacrebleu.corpus_bleu(TRANSLATIONS, streams).score,
            "chrf": sacrebleu.corpus_chrf(TRANSLATIONS, streams).score,
        }
    )


def test_bleu_takes_examples_with_unequal_numbers_of_references():
    golds = [GOLDS[0], [*GOLDS[1], "there is one red house"], GOLDS[2]]
    streams = [[gold[0] for gold in golds], [None, "there is one red house", None]]
    expected = sacrebleu.corpus_bleu(TRANSLATIONS, streams).score
    assert score("bleu", TRANSLATIONS, golds)["bleu"] == pytest.approx(expected)
    assert "nrefs:var|" in settings("bleu", golds)


def test_the_signature_of_bleu_is_stored_with_its_settings():
    text = settings("bleu", GOLDS)
    assert f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}" in text
    assert "chrF2 nrefs:1|case:mixed|eff:yes|nc:6|nw:0" in text


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_how_it_is_made(name):
    references = [0] if name == "accuracy" else [["a"]]
    assert len(settings(name, references)) > 40


@pytest.mark.parametrize(
    ("name", "predictions", "references"),
    [
        ("accuracy", [0, 1, UNPARSABLE], [0, 0, 1]),
        ("squad", ["a red fox", "blue"], [("red fox", "fox"), ("red",)]),
        ("rouge", SUMMARIES, HIGHLIGHTS),
    ],
)
def test_the_mean_over_examples_is_the_headline(name, predictions, references):
    rows = per_example(name, predictions, references)
    assert sum(rows) / len(rows) == pytest.approx(score(name, predictions, references)[headline(name)])


def test_one_example_of_bleu_is_sentence_bleu():
    expected = [
        sacrebleu.sentence_bleu(t, g, use_effective_order=True).score for t, g in zip(TRANSLATIONS, GOLDS, strict=True)
    ]
    assert per_example("bleu", TRANSLATIONS, GOLDS) == pytest.approx(expected)


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_answer_scores_one_hundred(name):
    references = [0, 1] if name == "accuracy" else [["one two three four five"], ["six seven eight nine ten"]]
    predictions = references if name == "accuracy" else [gold[0] for gold in references]
    scores = score(name, predictions, references)
    assert list(scores.values()) == pytest.approx([100] * len(scores)) and headline(name) in scores
    assert per_example(name, predictions, references) == pytest.approx([100, 100])


def test_metrics_work_batch_by_batch_and_combined(tmp_path):
    metric = load("rouge", cache_dir=str(tmp_path))
    for said, gold in zip(SUMMARIES, HIGHLIGHTS, strict=True):
        metric.add_batch(predictions=[said], references=[gold])
    assert metric.compute() == pytest.approx(score("rouge", SUMMARIES, HIGHLIGHTS))
    both = evaluate.combine([load("rouge", keep_in_memory=True), load("squad", keep_in_memory=True)])
    scores = both.compute(predictions=SUMMARIES, references=HIGHLIGHTS)
    assert {"rougeLsum", "exact_match"} <= set(scores)


def test_an_unknown_name_is_looked_for_by_evaluate_then_refused_with_the_nearest(monkeypatch):
    asked = []

    def evaluate_load(name, **options):
        asked.append((name, options))
        raise FileNotFoundError("no such module")

    monkeypatch.setattr(evaluate, "load", evaluate_load)
    with pytest.raises(ValueError, match=r"unknown metric 'rogue'; did you mean 'rouge'\? \(there are accuracy"):
        load("rogue", keep_in_memory=True)
    assert asked == [("rogue", {"keep_in_memory": True})]


def test_a_name_that_evaluate_knows_falls_through(monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda name, **options: f"{name} of the Hub")
    assert load("meteor") == "meteor of the Hub"


@pytest.mark.parametrize("function", [headline, lambda name: score(name, ["a"], [["a"]])])
def test_scoring_by_an_unknown_metric_is_refused_with_the_nearest_and_the_list(function):
    with pytest.raises(ValueError, match=r"'acuracy'; did you mean 'accuracy'\? .*squad, rouge, bleu"):
        function("acuracy")


@pytest.mark.parametrize("function", [score, per_example])
@pytest.mark.parametrize(
    ("predictions", "references", "sentence"),
    [
        ([], [], "there is nothing to score"),
        (["a"], [["a"], ["b"]], "1 predictions for 2 references"),
        (["a", "b"], [["a"], []], "example 1 has no reference"),
    ],
)
def test_input_that_cannot_be_scored_is_refused(function, predictions, references, sentence):
    with pytest.raises(ValueError, match=sentence):
        function("squad", predictions, references)


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        (" positive", (" negative", " positive"), 1),
        ("Positive.\nReview: bad", ("negative", "positive"), 1),
        ("it is NEGATIVE, not positive", ("positive", "negative"), 1),
        ("not entailment", ("entailment", "not entailment"), 1),
        ("not_entailment", ("entailment", "not_entailment"), 1),
        ("positively", ("negative", "positive"), None),
        ("", ("negative", "positive"), None),
        ("anything", ("", "anything"), 1),
        ("Pour  it\ninto a cup (slowly).", ("pour it into a (cup)", "pour it into a cup"), 1),
        ("c++", ("c", "c++"), 1),
    ],
)
def test_the_first_choice_named_in_a_text_is_the_answer(text, choices, index):
    assert parse_choice(text, choices) == index
