"""A whole spec: every problem at once, with key and line, in words."""

# ruff: noqa: E501  (tables: one case a line)
from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from lora_jobs.errors import Problem, SpecError
from lora_jobs.spec import (
    JobSpec,
    expand_sweep,
    load_document,
    load_spec,
    override_spec,
    parse_document,
    parse_spec,
    render_spec,
    replace_values,
)
from lora_jobs.spec.source import parse_source

ROOT = Path(__file__).resolve().parents[3]
GOOD = """\
name: job
model:
  name_or_path: google/gemma-2-9b-it
lora:
  r: 8
data:
  train: train.jsonl
training:
  max_steps: 5
"""


def find_problems(text: str, *overrides: str) -> list[tuple[int | None, str, str]]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, source="job.yaml", overrides=overrides)
    assert caught.value.exit_code == 2
    return [(problem.line, problem.path, problem.message) for problem in caught.value.problems]


def change(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_spec_and_its_defaults() -> None:
    spec = parse_spec(GOOD, source="job.yaml")
    assert (spec.name, spec.lora.r, spec.lora.alpha, spec.training.max_steps) == ("job", 8, 8.0, 5)
    assert spec.deepspeed is None
    assert spec.resources.world_size == 1
    assert spec.lora.target_modules[0] == "q_proj"


def test_everything_wrong_is_said_at_once_in_the_order_of_lines() -> None:
    text = """\
name: ../x
model: {name_or_path: ""}
lora:
  r: true
  lora_alhpa: 3
  target_modules: [q_proj, 3]
data:
  eval: 7
training:
  learning_rate: -1e-4
  gradient_checkpointing: no
  eval_steps: 10
  bf16: true
  fp16: true
  r: 4
deepspeed: {zero_stage: 7}
"""
    assert find_problems(text) == [
        (
            1,
            "name",
            "'../x' is not allowed here: wanted a letter, then letters, digits, dots, underscores or dashes, 64 at most",
        ),
        (2, "model.name_or_path", "is empty"),
        (4, "lora.r", "wanted a whole number, got true"),
        (5, "lora.lora_alhpa", "unknown key; did you mean lora_alpha?"),
        (6, "lora.target_modules.1", 'wanted text, got 3: put it in quotes, "3"'),
        (
            7,
            "data.train",
            "is missing, and there is no default "
            "(JSONL or Parquet file; relative paths start at the directory the command is typed in; "
            "with data.dataset the name of a split)",
        ),
        (8, "data.eval", 'wanted text, got 7: put it in quotes, "7"'),
        (9, "training.max_steps", "set exactly one of num_train_epochs and max_steps (neither is set)"),
        (10, "training.learning_rate", "wanted more than 0, got -0.0001"),
        (11, "training.gradient_checkpointing", "wanted true or false, got 'no'"),
        (13, "training.bf16", "bf16 and fp16 exclude each other"),
        (15, "training.r", "unknown key here; did you mean the key r of the section lora?"),
        (16, "deepspeed.zero_stage", "wanted one of 0, 1, 2, 3, got 7"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("r: 8", "r: 0", (5, "lora.r", "wanted at least 1, got 0")),
        ("r: 8", "r: -8", (5, "lora.r", "wanted at least 1, got -8")),
        ("r: 8", "r: 8.0", (5, "lora.r", "wanted a whole number, got 8.0")),
        ("r: 8", "r: '8'", (5, "lora.r", "wanted a whole number, got '8'")),
        ("r: 8", "r: 99999999999", (5, "lora.r", "wanted at most 2147483647, got 99999999999")),
        ("r: 8", "r:", (5, "lora.r", "wanted a whole number, got null: fill it in, or leave the key out")),
        ("r: 8", "r: [8]", (5, "lora.r", "wanted a whole number, got [8]")),
        ("r: 8", "r: 8\n  lora_dropout: .nan", (6, "lora.lora_dropout", "wanted a finite number, got nan")),
        ("r: 8", "r: 8\n  lora_dropout: 1", (6, "lora.lora_dropout", "wanted less than 1, got 1")),
        ("r: 8", "r: 8\n  lora_alpha: .inf", (6, "lora.lora_alpha", "wanted a finite number, got inf")),
        ("r: 8", "r: 8\n  lora_alpha: true", (6, "lora.lora_alpha", "wanted a number, got true")),
        ("r: 8", "r: 8\n  target_modules: []", (6, "lora.target_modules", "is empty")),
        (
            "r: 8",
            "r: 8\n  modules_to_save: lm_head",
            (6, "lora.modules_to_save", "wanted a list, got 'lm_head'"),
        ),
        (
            "max_steps: 5",
            "max_steps: 5\n  remove_unused_columns: false",
            (
                10,
                "training.remove_unused_columns",
                "is not needed here, leave it out: "
                "examples become tokens and labels before the trainer sees them, without other columns",
            ),
        ),
        ("  r: 8", "  8", (4, "lora", "wanted a section (key: value lines), got 8")),
        ("job", '"a\\nb"', (1, "name", None)),
        ("job", "job\nsweep: {lora.r: []}", (2, "sweep.lora.r", "is empty")),
        ("train.jsonl", '"a\\nb"', (7, "data.train", "control character '\\n' is not allowed here")),
        ("train.jsonl", '"a\\u202eb"', (7, "data.train", "control character '\\u202e' is not allowed here")),
        ("train.jsonl", '"a\\x9bb"', (7, "data.train", "control character '\\x9b' is not allowed here")),
        ("train.jsonl", "x\n  format: svgcaption", (8, "data.format", None)),
        ("max_steps: 5", "max_steps: 5\n  optim: adamw", (10, "training.optim", None)),
        ("max_steps: 5", "max_steps: 5\n  num_train_epochs: 1", (9, "training.max_steps", None)),
        ("max_steps: 5", "max_steps: 5\n  eval_steps: 5", (10, "training.eval_steps", None)),
        ("max_steps: 5", "max_steps: 5\n  early_stopping_patience: 5", (10, "training.early_stopping_patience", None)),
        ("max_steps: 5", "max_steps: 5\n  load_best_model_at_end: true", (10, "training.load_best_model_at_end", None)),
        ("max_steps: 5", "max_steps: 5\n  seed: 4294967296", (10, "training.seed", "wanted less than 4294967296, got 4294967296")),
        ("max_steps: 5", "max_steps: 5\n  fp16: true", (10, "training.fp16", "contradicts model.dtype: bfloat16")),
        ("max_steps: 5", "max_steps: 5\nresources: {time: 60}", (10, "resources.time", 'wanted text, got 60: put it in quotes, "60"')),
        ("max_steps: 5", 'max_steps: 5\nresources: {time: "0"}', (10, "resources.time", "'0' is no time at all: wanted more than zero")),
        ("max_steps: 5", 'max_steps: 5\nresources: {time: "01:00:00\\n"}', (10, "resources.time", None)),
        ("max_steps: 5", 'max_steps: 5\nresources: {partition: "a\\n#SBATCH --x"}', (10, "resources.partition", None)),
        ("max_steps: 5", "max_steps: 5\nresources: {account: $(id)}", (10, "resources.account", None)),
        ("max_steps: 5", "max_steps: 5\nresources: {mem: lots}", (10, "resources.mem", None)),
        ("max_steps: 5", "max_steps: 5\nresources:", (10, "resources", "wanted a section (key: value lines), got null: fill it in, or leave the key out")),
        ("google/gemma-2-9b-it", "x\n  revision: a/../b", (4, "model.revision", None)),
        ("google/gemma-2-9b-it", "x\n  trust_remote_code: true", (4, "model.trust_remote_code", None)),
        ("google/gemma-2-9b-it", "x\n  quantization: {}", (4, "model.quantization.load_in_4bit", None)),
        ("google/gemma-2-9b-it", "x\n  quantisation: {}", (4, "model.quantisation", "unknown key; did you mean quantization?")),
    ],
)  # fmt: skip
def test_one_wrong_value(old: str, new: str, problem: tuple[int, str, str | None]) -> None:
    ((line, path, message),) = find_problems(change(old, new))
    assert (line, path) == problem[:2]
    assert problem[2] in {None, message}
    assert message.isprintable()


@pytest.mark.parametrize("expression", ["(", "*x", "a{2,1}", "(?P<x", "a{99999999999999999999}", "a(?i)"])
def test_target_modules_as_text_is_a_regular_expression(expression: str) -> None:
    ((line, path, message),) = find_problems(change("r: 8", f"r: 8\n  target_modules: '{expression}'"))
    assert (line, path) == (6, "lora.target_modules")
    assert "is not a regular expression" in message


def test_target_modules_takes_both_kinds() -> None:
    listed = parse_spec(change("r: 8", "r: 8\n  target_modules: [q_proj]"), source="f")
    matched = parse_spec(change("r: 8", "r: 8\n  target_modules: '.*[qv]_proj'"), source="f")
    assert (listed.lora.target_modules, matched.lora.target_modules) == (("q_proj",), ".*[qv]_proj")


def test_the_older_word_is_read_and_the_present_one_stored() -> None:
    spec = parse_spec(change("max_steps: 5", "max_steps: 5\n  gradient_checkpointing: false"), source="f")
    assert spec.training.activation_checkpointing is False
    assert "gradient_checkpointing" not in render_spec(spec)


def test_both_words_together_are_an_error_beside_the_others() -> None:
    words = "max_steps: 0\n  gradient_checkpointing: true\n  activation_checkpointing: true"
    assert find_problems(change("max_steps: 5", words)) == [
        (9, "training.max_steps", "wanted at least 1, got 0"),
        (
            10,
            "training.gradient_checkpointing",
            "is the older word for activation_checkpointing, which is given too: keep one",
        ),
    ]


def test_whole_floats_are_bucket_sizes() -> None:
    spec = parse_spec(GOOD + "deepspeed: {reduce_bucket_size: 5e8, allgather_bucket_size: auto}\n", source="f")
    assert spec.deepspeed is not None
    assert (spec.deepspeed.reduce_bucket_size, spec.deepspeed.allgather_bucket_size) == (500_000_000, "auto")
    assert find_problems(GOOD + "deepspeed: {reduce_bucket_size: 1.5}\n") == [
        (10, "deepspeed.reduce_bucket_size", "wanted a whole number, got 1.5")
    ]


def test_rules_between_sections_are_tried_although_others_are_broken() -> None:
    text = change("r: 8", "r: true").replace("max_steps: 5", "max_steps: 5\n  eval_steps: 5")
    assert find_problems(text) == [
        (5, "lora.r", "wanted a whole number, got true"),
        (10, "training.eval_steps", "needs data.eval, the held-out examples"),
    ]


def test_a_rule_is_not_tried_on_a_value_that_is_wrong_itself() -> None:
    text = change("max_steps: 5", "max_steps: x\n  eval_steps: 5").replace("train.jsonl", "x\n  eval: 3")
    assert [path for _, path, _ in find_problems(text)] == ["data.eval", "training.max_steps"]


def test_file_problems_and_value_problems_together() -> None:
    assert find_problems(GOOD + "name: again\nlora: {q: 1}\nfoo: !x y\n") == [
        (10, "name", "given twice (first on line 1): keep one"),
        (11, "lora", "given twice (first on line 4): keep one"),
        (12, "", "tag !x is not supported: write the plain value"),
        (
            12,
            "foo",
            "unknown key; known here: "
            "name, model, lora, data, training, deepspeed, resources, resume, sweep",
        ),
    ]  # fmt: skip


def test_many_problems_are_counted_and_cut() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(GOOD + "".join(f"k{n}: 1\n" for n in range(150)), source="job.yaml")
    assert caught.value.message == "job.yaml: 150 problems"
    assert caught.value.problems[-1] == Problem("", "and 50 more")


def test_dotted_keys_are_pointed_to_their_section() -> None:
    assert find_problems(GOOD + "lora.alpha: 3\nlora.r: 3\n")[1][2] == (
        "unknown key here; did you mean the key r of the section lora?"
    )


def test_names_with_terminal_codes_are_shown_escaped() -> None:
    ((line, path, message),) = find_problems(GOOD + '"\\x1b[2Jx": 1\n')
    assert (line, path) == (10, "\\x1b[2Jx")
    assert message.isprintable()


def test_overrides_beat_the_file() -> None:
    overrides = ("lora.r=16", "training.learning_rate=1e-3", "deepspeed.zero_stage=1", "data.eval=held out.jsonl")
    spec = parse_spec(GOOD, source="f", overrides=(*overrides, "lora.target_modules=[q_proj, v_proj]", "name = y"))
    assert (spec.lora.r, spec.training.learning_rate, spec.data.eval) == (16, 1e-3, "held out.jsonl")
    assert spec.lora.target_modules == ("q_proj", "v_proj")
    assert spec.deepspeed is not None
    assert spec.deepspeed.zero_stage == 1
    assert spec.name == "y"


def test_an_override_mends_the_file_and_the_last_one_wins() -> None:
    assert parse_spec(change("r: 8", "r: x"), source="f", overrides=["lora.r=2", "lora.r=4"]).lora.r == 4


def test_wrong_overrides_have_a_path_and_no_line() -> None:
    overrides = ["lora.rr=1", "lora.r.x=3", "=3", "lora", "lora..r=3", "lora.bias=[", "training.max_steps=0"]
    assert find_problems(GOOD, *overrides) == [
        (None, "lora.r.x", "lora.r is no section: it is 8"),
        (None, "", "'=3' is no override: wanted section.key=value"),
        (None, "lora", "'lora' is no override: wanted section.key=value"),
        (None, "lora..r", "'lora..r=3' is no override: wanted section.key=value"),
        (
            None,
            "lora.bias",
            "its value '[' is not YAML: while parsing a flow node expected the node content, "
            "but found '<stream end>' (from --set)",
        ),
        (None, "lora.rr", "unknown key; did you mean r? (from --set)"),
        (None, "training.max_steps", "wanted at least 1, got 0 (from --set)"),
    ]


def test_override_and_replace_check_again() -> None:
    spec = parse_spec(GOOD, source="f")
    assert override_spec(spec, []) is spec
    assert override_spec(spec, ["lora.r=4"]) == replace_values(spec, {"lora.r": 4})
    assert spec.lora.r == 8
    for wrong in ({"lora.r": 0}, {"lora.q": 1}, {"lora.r.x": 1}):
        with pytest.raises(SpecError):
            replace_values(spec, wrong)


def test_a_sweep_stands_for_its_variants() -> None:
    text = GOOD + "sweep:\n  lora.r: [8, 16]\n  training.learning_rate: [1e-4, 1e-3]\n"
    spec = parse_spec(text, source="f")
    assert parse_spec(render_spec(spec), source="f") == spec
    seen = [
        (each.lora.r, each.training.learning_rate, each.sweep)
        for each in (variant.spec for variant in expand_sweep(spec))
    ]
    assert seen == [(8, 1e-4, {}), (8, 1e-3, {}), (16, 1e-4, {}), (16, 1e-3, {})]
    assert expand_sweep(parse_spec(GOOD, source="f"))[0].spec == parse_spec(GOOD, source="f")


def test_a_sweep_over_unknown_keys_is_refused() -> None:
    text = GOOD + "sweep:\n  lora.q: [1]\n  lora.r: [8]\n  name: [x]\n"
    message = "is no key that can be swept: wanted section.key, such as lora.r"
    assert find_problems(text) == [(11, "sweep.lora.q", message), (13, "sweep.name", message)]


def test_a_document_places_later_problems() -> None:
    document = parse_document(GOOD, source="job.yaml")
    placed = document.place([Problem("data.train", "x"), Problem("data.eval", "y"), Problem("foo", "z")])
    assert [problem.line for problem in placed] == [7, 6, None]


def test_a_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: 3\n")
    with pytest.raises(SpecError, match=r"job\.yaml: 5 problems"):
        load_spec(path)
    path.write_text(GOOD)
    assert load_document(path).value == parse_spec(GOOD, source="f")


def test_a_spec_is_not_changed_once_built() -> None:
    spec = parse_spec(GOOD, source="f")
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "y"  # type: ignore[misc]


# fmt: off
JUNK = [
    ": ", "- ", "\n", "*a", "&a ", "<<: ", "!!x ", "{", "]", "'", '"', "\\", "|", "\x00", "\x85", "é", "1e999", ".nan", "0x", "null", "true", "#", ",",
    "\ud800", "\x1b[31m", '"\\ud800"', "%YAML 1.1\n", "---\n", "\ufeff",
]
# fmt: on


def scramble(chooser: random.Random, text: str) -> str:
    """The text with one to four places where something was put in or taken out."""
    letters = list(text)
    for _ in range(chooser.randint(1, 4)):
        place = chooser.randrange(len(letters))
        if chooser.random() < 0.6:
            letters[place:place] = chooser.choice(JUNK)
        else:
            del letters[place : place + chooser.randint(1, 20)]
    return "".join(letters)


def list_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted((ROOT / "jobs").glob("*.yaml"))]


def test_garbage_is_refused_and_never_breaks_the_reader() -> None:
    texts, chooser = list_texts(), random.Random(7)  # noqa: S311
    accepted = 0
    refused: list[SpecError] = []
    for _ in range(150):
        text = scramble(chooser, chooser.choice(texts))
        try:
            spec = parse_spec(text, source="fuzz")
        except SpecError as error:
            refused.append(error)
        else:
            accepted += 1
            assert isinstance(spec, JobSpec)
            assert parse_spec(render_spec(spec), source="again") == spec
    assert accepted > 0
    assert len(refused) > 50
    assert all(error.problems or "empty" in error.message for error in refused)
    problems = [problem for error in refused for problem in error.problems]
    assert all(problem.message.isprintable() and problem.path.isprintable() for problem in problems)


def test_libyaml_reads_what_the_pure_parser_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(text: str) -> object:
        try:
            return parse_source(text, name="fuzz")
        except SpecError as error:
            return error.message, error.problems

    assert yaml.__with_libyaml__
    texts, chooser = list_texts(), random.Random(8)  # noqa: S311
    texts = [scramble(chooser, text) for text in texts * 10] + ["a:\tb", "a: b\tc", "a\tb: c", "a: 'b\tc'", "\ta: b"]
    fast = [read(text) for text in texts]
    monkeypatch.setattr("lora_jobs.spec.source._FAST", None)
    assert fast == [read(text) for text in texts]
    assert sum(isinstance(found, tuple) for found in fast) not in (0, len(fast))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ("lr_scheduler_type: linear\n  lr_scheduler_kwargs: {num_cycles: 2}", "not known to linear, which takes none"),
        ("lr_scheduler_kwargs: {cycles: 2}", "cycles: not known to cosine, which takes num_cycles"),
        ("lr_scheduler_kwargs: {num_cycles: true}", "wanted a number, got true"),
        (
            "lr_scheduler_type: polynomial\n  lr_scheduler_kwargs: {lr_end: 1}",
            "lr_end must be smaller than learning_rate (0.0002)",
        ),
    ],
)
def test_a_schedule_takes_only_what_it_knows(changed: str, problem: str) -> None:
    ((_, path, message),) = find_problems(change("max_steps: 5", f"max_steps: 5\n  {changed}"))
    assert path.startswith("training.lr_scheduler_kwargs")
    assert problem in message


def test_a_schedule_with_restarts() -> None:
    text = change("max_steps: 5", "max_steps: 5\n  lr_scheduler_type: cosine_with_restarts")
    spec = parse_spec(text, source="f", overrides=["training.lr_scheduler_kwargs.num_cycles=2"])
    assert spec.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert parse_spec(render_spec(spec), source="stored") == spec
