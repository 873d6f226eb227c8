"""A task of one's own: one YAML file, and what is said when it does not make sense."""

import pytest

from moa.tasks import load_task
from moa.tasks.definition import check_task_name

BASE = {
    "name": "tickets",
    "metric": "accuracy",
    "prompt": '"Ticket: {text} Urgent:"',
    "choices": "{low: [0], high: [1]}",
}


def yaml_of(**changes):
    keys = {**BASE, **changes}
    return "".join(f"{key}: {value}\n" for key, value in keys.items() if value is not None)


def test_a_task_of_ones_own_needs_only_what_it_uses(write_task, write_rows):
    data = write_rows("tickets", [{"text": "Server down", "label": 1}, {"text": "Typo", "label": "low"}])
    urgent, typo = load_task(write_task()).examples("test", data_dir=data)
    assert urgent.prompt == "Urgency: high or low?\nTicket: Server down\nAnswer:"
    assert (urgent.answer, urgent.references, urgent.choices, urgent.label) == (
        " high",
        ("high",),
        (" low", " high"),
        1,
    )
    assert typo.label == 0


def test_a_path_may_be_a_string_or_a_path(write_task):
    path = write_task()
    assert load_task(path) == load_task(str(path))


def test_choices_may_be_a_list_in_the_order_of_the_labels(write_task, write_rows):
    task = load_task(write_task(yaml_of(choices="[low, high]")))
    [example] = task.examples("test", data_dir=write_rows("tickets", [{"text": "a", "label": "1"}]))
    assert example.answer == " high"


def test_columns_say_where_else_a_field_may_be_and_a_dot_goes_inside(write_task, write_rows):
    task = load_task(write_task(yaml_of(columns="{text: [body, mail.parts.1], label: urgency}")))
    rows = [{"body": "a", "urgency": 0}, {"mail": {"parts": ["x", "b"]}, "urgency": 1}]
    first, second = task.examples("test", data_dir=write_rows("tickets", rows))
    assert (first.prompt, second.prompt) == ("Ticket: a Urgent:", "Ticket: b Urgent:")


def test_max_words_shortens_a_field_and_keeps_the_end_of_the_prompt(write_task, write_rows):
    task = load_task(write_task(yaml_of(max_words="{text: 2}")))
    [example] = task.examples("test", data_dir=write_rows("tickets", [{"text": "one two three", "label": 0}]))
    assert example.prompt == "Ticket: one two Urgent:"


def test_braces_in_a_row_are_text(write_task, write_rows):
    [example] = load_task(write_task()).examples(
        "test", data_dir=write_rows("tickets", [{"text": "{oops} {", "label": 0}])
    )
    assert "Ticket: {oops} {\n" in example.prompt


def test_an_answer_of_several_lines_is_trained_on_as_one(write_task, write_rows):
    task = load_task(write_task(yaml_of(metric="rouge", choices=None, answer="summary")))
    [example] = task.examples("test", data_dir=write_rows("tickets", [{"text": "a", "summary": " b\nc "}]))
    assert (example.answer, example.references, example.choices, example.label) == (" b c", ("b\nc",), (), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "my.task"}, r"task name 'my.task'.*letters, digits"),
        ({"name": "my/task"}, "task name 'my/task'"),
        ({"name": "'my task'"}, "task name 'my task'"),
        ({"name": "default"}, "task name 'default': PEFT uses it for something else, choose another"),
        ({"name": "type"}, "task name 'type': PEFT uses it"),
        ({"name": "half"}, "task name 'half': PEFT uses it"),
        ({"name": None}, "has no `name`"),
        ({"name": "12"}, "`name` is 12: it must be text"),
        ({"metric": "acuracy"}, "unknown metric 'acuracy'.*did you mean 'accuracy'"),
        ({"metric": "bleu"}, "metric 'bleu' does not go with `choices`"),
        ({"promt": "x"}, "unknown key 'promt'.*did you mean 'prompt'"),
        ({"prompt": "Hello"}, "shows no field"),
        ({"prompt": '"{text"'}, "braces do not match"),
        ({"prompt": '"{0} {text}"'}, "a field is a plain name"),
        ({"choices": None}, "the file has no answer: give exactly one"),
        ({"answer": "label"}, "answer.*give exactly one"),
        ({"choices": "{yes: [1], no: [0]}"}, "put quotes around words such as yes"),
        ({"choices": "{low: [0], high: [0]}"}, "label '0' means both 'low' and 'high'"),
        ({"choices": "[low]"}, "at least two"),
        ({"columns": "{txt: body}"}, "unknown field 'txt'.*did you mean 'text'"),
        ({"columns": "{text: [3]}"}, "`columns.text` has 3"),
        ({"max_words": "{txt: 3}"}, "unknown field 'txt'.*did you mean 'text'"),
        ({"max_words": "{text: -1}"}, "`max_words.text` is -1"),
        ({"max_new_tokens": "0"}, "`max_new_tokens` is 0"),
        ({"max_new_tokens": "many"}, "`max_new_tokens` is 'many': it must be a whole number"),
        ({"hub": "{splits: {train: train}}"}, "`hub` has no `path`"),
        ({"hub": "{path: a/b, splits: {dev: dev}}"}, "`hub.splits` has an unknown key 'dev'"),
        ({"hub": "{path: a/b, splits: {test: {carve: train}}}"}, "`hub.splits.test` has no `rows`"),
        ({"hub": "{path: a/b, splits: {test: {carve: train, rows: none}}}"}, "rows` is 'none'"),
        ({"hub": "{path: 3, splits: {test: test}}"}, "`hub.path` has 3"),
        ({"local": "{folder: [a]}"}, "`local` has an unknown key 'folder'.*did you mean 'folders'"),
        ({"pocket": "{generator: sentimet}"}, "unknown pocket generator 'sentimet'.*did you mean 'sentiment'"),
        ({"prompt": "[1, 2]"}, r"`prompt` is \[1, 2\]: it must be text"),
    ],
)
def test_a_task_file_that_makes_no_sense_says_what_to_change(write_task, changes, message):
    path = write_task(yaml_of(**changes))
    with pytest.raises(ValueError, match=message) as error:
        load_task(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("metric: squad\n", "line 5: key 'metric' is already on line 2: keep one"),
        ("columns:\n  text: a\n  text: b\n", "line 7: key 'text' is already on line 6"),
        ("max_words: {text: 1, text: 2}\n", "line 5: key 'text' is already on line 5"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(write_task, added, message):
    path = write_task(yaml_of() + added)
    with pytest.raises(ValueError, match=message) as error:
        load_task(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- a\n", "mapping"), ("", "mapping")])
def test_a_file_that_is_no_mapping_says_so(write_task, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_task(write_task(text))
    assert "\n" not in str(error.value)


def test_a_task_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no task file"):
        load_task(tmp_path / "absent.yaml")


def test_a_good_name_is_given_back():
    assert check_task_name("my_task-2") == "my_task-2"


def test_a_plain_prompt_is_the_fields_of_a_row_and_nothing_else():
    task = load_task("squad")
    row = {"context": "Rome is old.", "question": "How old?", "answers": ["very"]}
    assert task.plain().example(row, "here").prompt == "Rome is old. How old?"
    assert task.plain().example(row, "here").answer == task.example(row, "here").answer
    assert task.plain().plain() is None
