"""`moa methods` explains every method, and every option of every method can be given on the command line."""

import io
import json
from typing import Literal, get_args, get_origin

import pytest
from rich.console import Console

from moa.merging.catalog import BROUGHT_BY, example, main, markdown, page
from moa.merging.flags import parse
from moa.merging.registry import NEEDS, methods, optional

OPTIONS = [(method.name, option) for method in methods().values() for option in method.options]


def kind_of(method, option):
    return optional(methods()[method].options[option].annotation)[0]


def printed(method, width=200):
    console = Console(width=width, file=io.StringIO(), markup=False, highlight=False)
    console.print(page(method))
    return console.file.getvalue()


# ---- options as flags


@pytest.mark.parametrize("option", sorted({option for _, option in OPTIONS}))
def test_an_option_is_of_one_kind_in_all_methods_that_have_it(option):
    kinds = [kind_of(method, o) for method, o in OPTIONS if o == option]
    words = [get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)) for kind in kinds]
    assert all(words) or (set(kinds) <= {bool, int, float, str} and len(set(kinds)) == 1)


def flags(method, option):
    """Command lines that set an option, with the values they stand for."""
    kind = kind_of(method, option)
    for spelt in {option, option.replace("_", "-")}:
        if kind is bool:
            yield from (([f"--{spelt}"], True), ([f"--no-{spelt}"], False))
        elif get_origin(kind) is Literal:
            yield from (([f"--{spelt}", word], word) for word in get_args(kind))
        else:
            value = {int: -3, float: -0.25, str: "text"}[kind]
            yield [f"--{spelt}", str(value)], value
            yield [f"--{spelt}={value}"], value


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_every_value_of_every_option_can_be_set_by_its_flag(method, option):
    for words, value in flags(method, option):
        got = getattr(parse(["a", "b", "--method", method, *words, "--output", "c"]), option)
        assert got == value and type(got) is type(value)


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_none_is_what_an_option_is_without_its_flag_if_it_can_be_none(method, option):
    parameter = methods()[method].options[option]
    assert optional(parameter.annotation)[1] is (parameter.default is None)


# ---- the list


def test_every_need_is_explained_and_shown_in_the_table(capsys):
    assert BROUGHT_BY.keys() == set(NEEDS)
    main([])
    out = capsys.readouterr().out
    for method in methods().values():
        (row,) = (line for line in out.splitlines() if line.startswith(f"│ {method.name} "))
        assert [cell.strip() for cell in row.split("│")][3] == (method.needs[0] if method.needs else "")
    assert "run 'moa statistics'" in " ".join(out.split()) and "moa methods METHOD" in out


# ---- one method


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_the_page_of_a_method_holds_all_that_the_registry_knows(method):
    text = " ".join(printed(method, width=1000).split())
    assert " ".join(method.doc.split("\n\nArgs:")[0].split("\n\nRaises:")[0].split()) in text
    for option, parameter in method.options.items():
        assert f"--{option.replace('_', '-')} │" in text and f"│ {parameter.default} │" in text
        assert " ".join(method.describe(option).split()) in text
    assert all(f"needs {need}: {BROUGHT_BY[need]}" in text for need in method.needs)
    assert all(f"{law} (" in text and reason in text for law, reason in method.breaks.items())
    assert all(alias in text for alias in method.aliases) and (method.paper or "") in text
    assert ("computes in float32, whatever --dtype is" in text) == (method.computes_in == "float32")


def test_a_page_fits_the_console_and_keeps_brackets(capsys):
    text = printed(methods()["regmean"], width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "S [n, n] a layer" in " ".join(text.split())


def test_methods_are_found_by_any_of_their_names_and_shown_once(capsys):
    main(["cat", "ties", "concatenation", "--json"])
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["concatenation", "ties"]
    main(["cat"])
    assert capsys.readouterr().out.startswith("concatenation\n")
    main(["ties", "--markdown"])
    section = capsys.readouterr().out
    assert section.startswith("\n## ties\n") and section in markdown()


def test_an_unknown_method_gets_the_nearest_name(refusal):
    assert refusal(main, ["tise"]).endswith("did you mean 'ties'?")


@pytest.mark.parametrize("name", methods())
def test_the_example_of_a_method_is_a_command_with_its_options(name, capsys):
    method = methods()[name]
    words = example(method).split()
    assert words[:2] == ["moa", "merge"]
    asked = vars(parse(words[2:]))
    given = {option: value for option, value in asked.items() if option in method.options}
    assert method.check_options(given) == method.check_options({})
    assert ("model" in asked) == ("objective" in method.needs)
    main([name])
    assert example(method) in " ".join(capsys.readouterr().out.split())
