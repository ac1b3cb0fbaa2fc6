"""YAML text to values and lines: the grammar, the caps, and what is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from lora_jobs.errors import Problem, SpecError
from lora_jobs.spec.source import MAX_BYTES, MAX_NODES, load_text, parse_source, parse_value

if TYPE_CHECKING:
    from pathlib import Path


def refuse(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_source(text, name="job.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e8", 5e8),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("no", "no"),
        ("24:00:00", "24:00:00"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("null", None),
        ("~", None),
        ("", None),
        ('"12"', "12"),
        ("'true'", "true"),
        ("!!str 12", "12"),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("[a, 1, [b]]", ["a", 1, ["b"]]),
        ("{a: {b: c}}", {"a": {"b": "c"}}),
        ("e4", "e4"),
        ("1e", "1e"),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    seen = parse_value(text, name="--set")
    assert (type(seen), seen) == (type(value), value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_value(".nan", name="--set"))


def test_every_key_and_item_has_its_line() -> None:
    source = parse_source("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\ne: [3,\n  4]\n", name="f")
    assert source.values == {"a": {"b": 1, "c": ["x", {"d": 2}]}, "e": [3, 4]}
    assert source.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("a", "c", 1, "d"): 5,
        ("e",): 6,
        ("e", 0): 6,
        ("e", 1): 7,
    }
    assert source.problems == ()


def test_anchors_and_merge_keys() -> None:
    text = (
        "base: &base {r: 8, bias: none}\nother: &other {r: 1, x: 2}\n"
        "one: {<<: *base, r: 16}\ntwo: {<<: [*base, *other]}\n"
    )
    values = parse_source(text, name="f").values
    assert values["one"] == {"r": 16, "bias": "none"}
    assert values["two"] == {"r": 8, "bias": "none", "x": 2}


def test_a_quoted_merge_sign_is_a_key() -> None:
    assert parse_source('"<<": 3', name="f").values == {"<<": 3}


def test_wrong_merges_are_problems() -> None:
    assert parse_source("a: {<<: 3}", name="f").problems == (
        Problem("a", "<< wants a mapping or a list of mappings", 1),
    )


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "~", "\n\n"])
def test_nothing_in_the_file(text: str) -> None:
    error = refuse(text)
    assert error.message == "job.yaml is empty"
    assert error.hint is not None


@pytest.mark.parametrize("text", ["[1]", "just words", "3", "- a: b"])
def test_the_top_level_is_a_mapping(text: str) -> None:
    (problem,) = refuse(text).problems
    assert problem.message.startswith("wanted `key: value` lines at the top level, got ")
    assert problem.line == 1


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: b: c", 1, "mapping values are not allowed"),
        ("a: 1\n\tb: 2", 2, "\\t"),
        ("a: [1, 2", 1, "flow sequence"),
        ("a: 'x\n\n", 3, "quoted scalar"),
        ("a: 1\nb: \x00", 2, "\\x00"),
        ("a: 1\nb: \x1b[0m", 2, "\\x1b"),
        ("a: *nowhere", 1, "nowhere"),
        ("a: &a [*a]", 1, "before its anchor is complete"),
        ("a: 1\n---\nb: 2", 2, "second document"),
        ("%YAML 3.0\n---\na: 1", 1, "incompatible"),
    ],
)
def test_what_is_not_yaml_is_said_with_its_line(text: str, line: int, word: str) -> None:
    (problem,) = refuse(text).problems
    assert problem.line == line
    assert word in problem.message
    assert problem.message.isprintable()


@pytest.mark.parametrize("text", ['a: "\\U00110000"', 'a: "\\UFFFFFFFF"', "%YAML " + "9" * 5000 + ".1\n---\na: 1"])
def test_what_breaks_the_parser_is_no_traceback(text: str) -> None:
    assert refuse(text).problems[0].message.startswith("not YAML: ")


def test_duplicate_keys_tags_and_strange_keys_are_collected() -> None:
    text = "a: 1\nb: !!python/name:os.system x\n1: y\n? [z]\n: 2\nc:\n  d: 1\n  d: 2\na: 3\nn: " + "9" * 5000
    assert parse_source(text, name="f").problems == (
        Problem("", "tag tag:yaml.org,2002:python/name:os.system is not supported: write the plain value", 2),
        Problem("", "a number of 5000 digits", 10),
        Problem("", "key 1 is no text: put it in quotes", 3),
        Problem("", "key a sequence is no text: put it in quotes", 4),
        Problem("c.d", "given twice (first on line 7): keep one", 8),
        Problem("a", "given twice (first on line 1): keep one", 9),
    )


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (problem,) = refuse("\n".join(lines)).problems
    assert problem.message == f"aliases write it out to more than {MAX_NODES} values"


def test_a_bomb_of_merges_is_refused() -> None:
    pairs = ", ".join(f"k{n}: v" for n in range(300))
    text = f"a: &a {{{pairs}}}\n" + "".join(f"b{n}: {{<<: *a}}\n" for n in range(300))
    assert "more than" in refuse(text).problems[0].message


@pytest.mark.parametrize("text", ["a: " + "[" * 5000, "{" * 5000, "- " * 5000, "a: " + "{b: " * 30 + "c" + "}" * 30])
def test_deep_nesting_is_refused(text: str) -> None:
    assert "nested deeper than 24 levels" in refuse(text).problems[0].message


def test_aliases_cannot_nest_deeper_than_the_cap() -> None:
    text = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 40))
    assert "nested deeper than 24 levels" in refuse(text).problems[0].message


def test_too_many_values_are_refused() -> None:
    assert f"more than {MAX_NODES} values" in refuse("a:\n" + "- x\n" * (MAX_NODES + 1)).problems[0].message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large, binary, latin = tmp_path / "large.yaml", tmp_path / "binary.yaml", tmp_path / "latin.yaml"
    large.write_bytes(b"# \n" * (MAX_BYTES // 3 + 1))
    binary.write_bytes(b"\x7fELF\x02\x01\x01\x00\xff\xfe")
    latin.write_bytes("name: x\nwhat: grün\n".encode("latin-1"))
    for path, words in [
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "is a directory"),
        (large, f"larger than {MAX_BYTES} bytes"),
        (binary, "is not a text file"),
        (latin, "is not a text file"),
        (tmp_path / "a\0b.yaml", "cannot be read"),
        (tmp_path / ("n" * 300), "cannot be read"),
    ]:
        with pytest.raises(SpecError, match=words) as caught:
            load_text(path)
        assert caught.value.message.isprintable()
    with pytest.raises(SpecError) as caught:
        load_text(latin)
    assert caught.value.problems == (Problem("", "byte 0xfc is not UTF-8 text", 2),)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert load_text(path) == "name: x\n"
