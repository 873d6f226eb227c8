"""Rows from a folder, samples of them, and what bad rows get."""

import pytest

from moa.tasks import load_task

SST2 = [{"sentence": f"film {i}", "label": i % 2} for i in range(50)]

# one row a task, as they stand in published copies of the data: folder, row, prompt's middle line, answer
ROWS = [
    ("sst2", "sst2", {"sentence": "good", "label": 1, "label_text": "positive"}, "Review: good", " positive"),
    ("sst2", "sst2", {"sentence": "bad", "label": "negative"}, "Review: bad", " negative"),
    ("mnli", "mnli", {"premise": "a", "hypothesis": "b", "label": "neutral"}, "Hypothesis: b", " neutral"),
    ("mnli", "mnli", {"premise": "a", "hypothesis": "b", "label": 2}, "Premise: a", " contradiction"),
    ("rte", "rte", {"premise": "a", "hypothesis": "b", "label": "not_entailment"}, "Premise: a", " no"),
    ("scitail", "scitail", {"premise": "a", "hypothesis": "b", "label": "entailment"}, "Premise: a", " yes"),
    ("fever", "fever_symmetric", {"claim": "a", "evidence": "b", "label": "REFUTES"}, "Claim: a", " false"),
    ("mrpc", "mrpc", {"sentence1": "a", "sentence2": "b", "label": 1}, "Second: b", " yes"),
    ("paws", "paws", {"sentence1": "a", "sentence2": "b", "label": 0}, "First: a", " no"),
    ("piqa", "piqa", {"goal": "g", "choices": ["x y", "z"], "label": 0}, "Goal: g", " x y"),
    ("piqa", "piqa", {"goal": "g", "sol1": "x", "sol2": "z", "label": 1}, "Goal: g", " z"),
    ("multi30k", "multi30k_en_de", {"en": "a cat", "de": "eine Katze"}, "English: a cat", " eine Katze"),
    ("wmt14", "wmt14", {"translation": {"en": "a", "de": "b"}}, "English: a", " b"),
    ("wmt14", "wmt14", {"en": "a", "de": "b"}, "English: a", " b"),
    ("dialogsum", "dialogsum", {"dialogue": "hi", "summary": "s", "summaries": ["s", "t"]}, "Dialogue: hi", " s"),
    ("dialogsum", "dialogsum", {"dialogue": "hi", "summary": "s"}, "Dialogue: hi", " s"),
    ("cnn_dailymail", "cnn_dailymail_sample", {"article": "n", "highlights": "h"}, "Article: n", " h"),
    (
        "squad",
        "squad_v1",
        {"context": "c", "question": "q?", "answers": {"text": ["x", "x", "y"], "answer_start": [0, 0, 1]}},
        "Question: q?",
        " x",
    ),
]


@pytest.mark.parametrize(("name", "folder", "row", "line", "answer"), ROWS)
def test_a_row_of_a_local_folder_becomes_an_example(write_rows, name, folder, row, line, answer):
    [example] = load_task(name).examples("test", data_dir=write_rows(folder, [row]))
    assert line in example.prompt.splitlines()
    assert example.answer == answer
    assert example.task == name


def test_every_acceptable_answer_is_a_reference_once(write_rows):
    row = {"context": "c", "question": "q", "answers": {"text": ["x", "x", " y "], "answer_start": [0, 0, 1]}}
    [example] = load_task("squad").examples("test", data_dir=write_rows("squad", [row]))
    assert example.references == ("x", "y")


def test_the_folder_of_the_task_comes_before_its_aliases(write_rows):
    write_rows("squad_v1", [{"context": "alias", "question": "q", "answers": ["a"]}])
    data = write_rows("squad", [{"context": "own", "question": "q", "answers": ["a"]}])
    [example] = load_task("squad").examples("test", source="local", data_dir=data)
    assert "Context: own" in example.prompt


def test_a_limit_is_a_sample_with_a_seed_in_the_order_of_the_file(write_rows):
    data, task = write_rows("sst2", SST2), load_task("sst2")
    everything = task.examples("test", data_dir=data)
    sample = task.examples("test", data_dir=data, limit=10)
    assert len(everything) == 50
    assert sample == task.examples("test", data_dir=data, limit=10, seed=0)
    assert sample != everything[:10]
    assert sample != task.examples("test", data_dir=data, limit=10, seed=1)
    assert sample == [example for example in everything if example in sample]


def test_a_larger_limit_keeps_the_rows_of_a_smaller_one(write_rows):
    data, task = write_rows("sst2", SST2), load_task("sst2")
    small = {e.prompt for e in task.examples("test", data_dir=data, limit=5)}
    assert small < {e.prompt for e in task.examples("test", data_dir=data, limit=20)}
    assert len(task.examples("test", data_dir=data, limit=999)) == 50


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentense": "x", "label": 1}, "line 2: the row has no 'sentence', only 'sentense', 'label'"),
        ({"sentence": "x"}, "line 2: the row has no 'label'"),
        ({"sentence": None, "label": 1}, "line 2: the row's 'sentence' is null: give it a value"),
        ({"sentence": "x", "label": None}, "line 2: the row's 'label' is null"),
        ({"sentence": " ", "label": 1}, "line 2: no text in 'sentence': give the prompt something to show"),
        ({"sentence": "x", "label": 1.5}, "line 2: label 1.5 is none of 0, 1"),
        ({"sentence": "x", "label": -1}, "line 2: label -1 is none of 0, 1, negative, positive"),
        ({"sentence": "x", "label": "mixed"}, "line 2: label 'mixed' is none of"),
        ('{"sentence": "x"', "line 2: not valid JSON"),
        ("[1, 2]", "line 2: a JSON list, not an object"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line_whatever_the_sample(write_rows, row, message):
    data = write_rows("sst2", [SST2[0], row, *SST2[1:]])
    with pytest.raises(ValueError, match=message) as error:
        load_task("sst2").examples("test", data_dir=data, limit=1)
    assert str(data / "sst2" / "test.jsonl") in str(error.value)


@pytest.mark.parametrize("answers", [[], [" "], {"text": []}, ""])
def test_an_empty_answer_is_an_error(write_rows, answers):
    data = write_rows("squad", [{"context": "c", "question": "q", "answers": answers}])
    with pytest.raises(ValueError, match="line 1: the answer is empty"):
        load_task("squad").examples("test", data_dir=data)


def test_an_empty_field_is_taken_where_the_prompt_shows_another_one(write_rows):
    data = write_rows("squad", [{"context": "", "question": "Who?", "answers": ["x"]}])
    [example] = load_task("squad").examples("test", data_dir=data)
    assert {"Context:", "Question: Who?"} <= {line.strip() for line in example.prompt.splitlines()}


def test_an_empty_option_is_an_error(write_rows):
    data = write_rows("piqa", [{"goal": "g", "sol1": "x", "sol2": " ", "label": 0}])
    with pytest.raises(ValueError, match="line 1: the option 'sol2' is empty"):
        load_task("piqa").examples("test", data_dir=data)


def test_a_label_that_is_a_whole_number_may_be_stored_as_a_float(write_rows):
    data = write_rows("sst2", [{"sentence": "x", "label": 1.0}, {"sentence": "x", "label": 0.0}])
    assert [e.label for e in load_task("sst2").examples("test", data_dir=data)] == [1, 0]


def test_bytes_that_are_not_utf_8_are_named_with_their_file_and_line(write_rows):
    data = write_rows("sst2", SST2)
    file = data / "sst2" / "test.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"sentence": "good", "label": 1}\n{"sentence": "caf\xe9", "label": 1}\n')
    with pytest.raises(ValueError, match="line 2: byte 0xe9 is not UTF-8: save the file in UTF-8") as error:
        load_task("sst2").examples("test", data_dir=data)
    assert str(file) in str(error.value)


def test_a_byte_order_mark_and_windows_line_ends_are_passed_over(write_rows):
    data = write_rows("sst2", SST2)
    row = '{"sentence": "café", "label": 1}\r\n'
    (data / "sst2" / "test.jsonl").write_text(row + row, encoding="utf-8-sig", newline="")
    examples = load_task("sst2").examples("test", data_dir=data)
    assert len(examples) == 2 and "Review: café" in examples[0].prompt.splitlines()


def test_a_blank_line_is_skipped_and_the_count_goes_on(write_rows):
    data = write_rows("sst2", [SST2[0], "", {"label": 1}])
    with pytest.raises(ValueError, match="line 3"):
        load_task("sst2").examples("test", data_dir=data)


def test_an_empty_split_says_which(write_rows):
    with pytest.raises(ValueError, match="the test split of task 'sst2' .local. has no rows"):
        load_task("sst2").examples("test", data_dir=write_rows("sst2", []))


def test_a_missing_folder_or_file_says_what_is_there(write_rows, tmp_path):
    data = write_rows("sst2", SST2)
    with pytest.raises(FileNotFoundError, match="no folder 'squad' or 'squad_v1', only sst2"):
        load_task("squad").examples("test", data_dir=data)
    with pytest.raises(FileNotFoundError, match="no file .*train.jsonl: the folder has test.jsonl"):
        load_task("sst2").examples("train", data_dir=data)
    with pytest.raises(FileNotFoundError, match="no data folder"):
        load_task("sst2").examples("train", data_dir=tmp_path / "absent")


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("dev", {"source": "pocket"}, "unknown split 'dev'"),
        ("test", {"source": "pockett"}, "unknown source 'pockett'.*did you mean 'pocket'"),
        ("test", {"source": "local"}, "without a data_dir"),
        ("test", {"source": "pocket", "data_dir": "x"}, "pass only one of the two"),
        ("test", {"source": "pocket", "limit": 0}, "limit is 0"),
    ],
)
def test_an_option_that_makes_no_sense_says_so(split, options, message):
    with pytest.raises(ValueError, match=message):
        load_task("sst2").examples(split, **options)


def test_a_source_that_a_task_does_not_have_says_what_to_add():
    with pytest.raises(ValueError, match="task 'rte' has no pocket source"):
        load_task("rte").examples("test", source="pocket")
