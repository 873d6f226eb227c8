"""The pocket tasks: what makes seven generators seven data sets worth training on."""

from collections import Counter

import pytest

from moa.tasks import DEMO_TASKS, load_task
from moa.tasks.pocket import GENERATORS, pocket_rows

SPLITS = ("train", "validation", "test")
GENERATIVE = ("cnn_dailymail", "wmt14", "squad")
CLASSIFIED = ("sst2", "mnli", "paws", "piqa")


def examples(name, split="train", **options):
    return load_task(name).examples(split, source="pocket", **options)


@pytest.mark.parametrize("generator", GENERATORS)
def test_no_row_and_no_first_column_is_in_two_splits(generator):
    rows = {split: pocket_rows(generator, split) for split in SPLITS}
    firsts = {split: {repr(next(iter(row.values()))) for row in rows[split]} for split in SPLITS}
    assert not firsts["train"] & firsts["test"]
    assert not firsts["train"] & firsts["validation"]
    assert not firsts["validation"] & firsts["test"]


@pytest.mark.parametrize("name", DEMO_TASKS)
def test_there_are_thousands_of_distinct_examples(name):
    train = examples(name)
    assert len({(e.prompt, e.answer, e.choices) for e in train}) == len(train) >= 2000
    assert len({e.prompt for e in train}) >= 1000


@pytest.mark.parametrize("name", CLASSIFIED)
@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(name, split):
    labels = Counter(e.label for e in examples(name, split))
    chance = sum(labels.values()) / len(labels)
    assert all(0.9 * chance < count < 1.1 * chance for count in labels.values()), labels


@pytest.mark.parametrize("name", DEMO_TASKS)
def test_no_constant_answer_does_well(name):
    test = examples(name, "test")
    chance = 1 / len(test[0].choices) if name in CLASSIFIED else 0.0
    [(_, most)] = Counter(e.answer for e in test).most_common(1)
    assert most / len(test) < chance + 0.05


@pytest.mark.parametrize("name", GENERATIVE)
def test_copying_a_fixed_span_of_the_prompt_does_not_do(name):
    test = examples(name, "test")
    longest = max(len(e.prompt.split()) for e in test)
    for length in range(1, 9):
        for start in range(-longest, longest):
            hits = sum(_span(e.prompt, start, length) == _plain(e.answer) for e in test)
            assert hits / len(test) < 0.2, (start, length)


def _span(prompt, start, length):
    words = prompt.split()
    return [word.strip(".,?") for word in words[start:][:length]]


def _plain(answer):
    return [word.strip(".,?") for word in answer.split()]


def test_a_solution_of_common_sense_is_right_about_as_often_as_wrong():
    right, offered = Counter(), Counter()
    for e in examples("piqa"):
        right[e.answer] += 1
        offered.update(e.choices)
    for solution, count in offered.items():
        if ", then " not in solution:  # of two orders one is the right one, always
            assert 0.35 < right[solution] / count < 0.65, solution


def test_a_row_has_the_columns_of_the_public_data_set():
    columns = {generator: set(pocket_rows(generator, "test")[0]) for generator in GENERATORS}
    assert columns == {
        "commonsense": {"goal", "sol1", "sol2", "label"},
        "nli": {"premise", "hypothesis", "label"},
        "paraphrase": {"sentence1", "sentence2", "label"},
        "qa": {"context", "question", "answers"},
        "sentiment": {"sentence", "label"},
        "summarization": {"article", "highlights"},
        "translation": {"translation"},
    }


def test_an_answer_to_a_question_stands_where_its_offset_says():
    for row in pocket_rows("qa", "train"):
        [text], [start] = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start:].startswith(text)
        assert row["context"].count(text) == 1


# a grammar book's table for the accusative: article, ending of the adjective, nouns of that gender
ACCUSATIVE = {
    "den": ("en", {"Apfel", "Tisch", "Ball", "Schlüssel", "Brief"}),
    "einen": ("en", {"Apfel", "Tisch", "Ball", "Schlüssel", "Brief"}),
    "die": ("e", {"Lampe", "Blume", "Tasse"}),
    "eine": ("e", {"Lampe", "Blume", "Tasse"}),
    "das": ("e", {"Buch", "Haus", "Auto", "Bild"}),
    "ein": ("es", {"Buch", "Haus", "Auto", "Bild"}),
}


def test_the_german_has_its_genders_cases_and_word_order():
    for row in pocket_rows("translation", "train"):
        en, de = row["translation"]["en"].rstrip("."), row["translation"]["de"].rstrip(".")
        *subject_verb_time, article, adjective, noun = de.split()
        ending, nouns = ACCUSATIVE[article]
        assert adjective.endswith(ending) and noun in nouns, de
        assert ("today" in en) == (subject_verb_time[3:] == ["heute"]), (en, de)
        assert ("on Monday" in en) == (subject_verb_time[3:] == ["am", "Montag"]), (en, de)
        assert (" the " in en) == (article in ("den", "die", "das")), (en, de)


@pytest.mark.parametrize("name", DEMO_TASKS)
def test_a_prompt_ends_without_a_space_and_an_answer_begins_with_one(name):
    for e in examples(name, "test"):
        assert e.prompt == e.prompt.rstrip()
        assert e.answer == " " + e.answer.strip()
        assert e.answer.strip() in e.references
        assert e.label is None if not e.choices else e.choices[e.label] == e.answer


def test_an_unknown_generator_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown pocket generator 'sentimet'.*did you mean 'sentiment'"):
        pocket_rows("sentimet", "test")
