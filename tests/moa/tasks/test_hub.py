"""The Hub's data sets by their real names and columns, with a stand-in for the download."""

import datasets
import pytest

from moa.tasks import load_task, task_names

# what the publisher's rows look like, as of each data set's card
ROWS = {
    "sst2": {"idx": 0, "sentence": "s", "label": 1},
    "mnli": {"premise": "p", "hypothesis": "h", "label": 1, "idx": 0},
    "rte": {"sentence1": "p", "sentence2": "h", "label": 1, "idx": 0},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0},
    "paws": {"id": 1, "sentence1": "a", "sentence2": "b", "label": 1},
    "piqa": {"goal": "g", "sol1": "x", "sol2": "y", "label": 1},
    "fever": {"id": 1, "claim": "c", "label": 1, "evidence": "e"},
    "scitail": {"sentence1": "p", "sentence2": "h", "gold_label": "neutral"},
    "squad": {"id": "1", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
    "wmt14": {"translation": {"de": "Hund", "en": "dog"}},
    "multi30k": {"en": "dog", "de": "Hund"},
    "cnn_dailymail": {"article": "a", "highlights": "h", "id": "1"},
    "dialogsum": {"id": "1", "dialogue": "d", "summary": "s", "topic": "t"},
}
ANSWERS = {
    "sst2": " positive",
    "mnli": " neutral",
    "rte": " no",
    "mrpc": " yes",
    "paws": " yes",
    "piqa": " y",
    "fever": " false",
    "scitail": " no",
    "squad": " a",
    "wmt14": " Hund",
    "multi30k": " Hund",
    "cnn_dailymail": " h",
    "dialogsum": " s",
}


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: `hub[path, name, split] = rows`; keeps the calls in `hub.calls`."""

    class Hub(dict):
        calls: list

    stand_in = Hub()
    stand_in.calls = []

    def load_dataset(path, name=None, *, split, revision=None):
        stand_in.calls.append((path, name, split, revision))
        return datasets.Dataset.from_list(stand_in[path, name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stand_in


@pytest.mark.parametrize("name", task_names())
def test_a_row_of_the_hub_becomes_an_example(hub, name):
    source = load_task(name).hub
    hub[source.path, source.name, source.splits["test"]] = [ROWS[name]] * 3
    examples = load_task(name).examples("test")
    assert [e.answer for e in examples] == [ANSWERS[name]] * 3
    assert hub.calls == [(source.path, source.name, source.splits["test"], source.revision)]


def test_a_validation_split_carved_from_train_is_kept_out_of_it(hub):
    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(1500)]
    hub["stanfordnlp/sst2", None, "train"] = rows
    task = load_task("sst2")
    train, validation = ({e.prompt for e in task.examples(split)} for split in ("train", "validation"))
    assert (len(train), len(validation)) == (500, 1000)
    assert not train & validation
    assert {e.prompt for e in task.examples("validation", seed=7)} == validation
    assert [e.prompt for e in task.examples("validation")] != [e.prompt for e in task.examples("train")][:1000]


def test_too_few_rows_to_carve_from_is_an_error(hub):
    hub["stanfordnlp/sst2", None, "train"] = [{"sentence": "x", "label": 0}] * 10
    with pytest.raises(ValueError, match="stanfordnlp/sst2 train has 10 rows, too few to carve 1000"):
        load_task("sst2").examples("validation")


def test_a_row_without_the_field_is_named_by_data_set_split_and_number(hub):
    hub["stanfordnlp/sst2", None, "validation"] = [{"text": "x", "label": 0}]
    with pytest.raises(ValueError, match="stanfordnlp/sst2 validation, row 0: the row has no 'sentence'"):
        load_task("sst2").examples("test")


def test_an_empty_split_is_an_error(hub):
    hub["stanfordnlp/sst2", None, "validation"] = []
    with pytest.raises(ValueError, match="the test split of task 'sst2' .hub. has no rows"):
        load_task("sst2").examples("test")


@pytest.mark.parametrize(
    "error", [ConnectionError("offline\nsecond line"), RuntimeError("scripts are no longer supported"), OSError()]
)
def test_a_download_that_fails_says_in_one_sentence_what_to_do(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="'stanfordnlp/sst2'.*--source pocket.*--data_dir") as raised:
        load_task("sst2").examples("test")
    assert "\n" not in str(raised.value)


def test_a_split_the_source_does_not_name_is_an_error(write_task):
    own = "name: own\nmetric: rouge\nprompt: '{a}'\nanswer: b\nhub: {path: x/y, splits: {train: train}}\n"
    with pytest.raises(ValueError, match="x/y has no test split, only train"):
        load_task(write_task(own)).examples("test")
