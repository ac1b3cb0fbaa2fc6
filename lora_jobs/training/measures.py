"""What the finished adapter reaches: held-out loss, perplexity, BLEU-4 of its answers, beside what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_jobs.training.answers import generate
from lora_jobs.training.data import take_prompt
from lora_jobs.training.record import perplexity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import Trainer

    from lora_jobs.spec import TrainingSpec
    from lora_jobs.training.agreement import Agreement
    from lora_jobs.training.record import Recorder

NO_PROMPT = "none of the held-out examples has a prompt before its answer"
LOWER_IS_BETTER = frozenset({"eval_loss", "perplexity"})


def measure_final(
    trainer: Trainer,
    spec: TrainingSpec,
    agreement: Agreement,
    recorder: Recorder | None,
    *,
    beat: Callable[[], None],
) -> None:
    """Record final metrics and targets. Every rank calls it: the answers are split over the ranks.

    `beat` is called at each answer: a thousand of them take longer than the hang watch waits.
    """
    pairs = answer_examples(trainer, spec, agreement, beat=beat) if "bleu" in spec.final_metrics else None
    if recorder is None or (pairs is None and not spec.targets):
        return
    reached: dict[str, float] = {}
    if recorder.last_eval is not None:
        loss = recorder.last_eval[1]
        reached = {"eval_loss": loss, "perplexity": perplexity(loss) or float("inf")}
    if pairs == []:
        recorder.note("bleu_not_measured", step=trainer.state.global_step, reason=NO_PROMPT)
        recorder.say(f"bleu: not measured, {NO_PROMPT}")
    elif pairs is not None:
        reached["bleu"] = score_bleu([answer for answer, _ in pairs], [wanted for _, wanted in pairs])
    recorder.record_final(trainer.state.global_step, reached, compare_targets(reached, spec.targets))


def answer_examples(
    trainer: Trainer, spec: TrainingSpec, agreement: Agreement, *, beat: Callable[[], None]
) -> list[tuple[str, str]]:
    """(answer, wanted answer) of the first held-out examples that have a prompt, in their order; in every rank."""
    rows = [take_prompt(row) for row in trainer.eval_dataset.select(range_of(trainer.eval_dataset, spec))]
    asked = [row for row in rows if row[0]]
    rank, world = trainer.args.process_index, trainer.args.world_size
    model, tokenizer = trainer.model, trainer.processing_class
    model.eval()
    mine = []
    for prompt, wanted in asked[rank::world]:
        beat()
        answer = generate(model, prompt, tokenizer, max_new_tokens=spec.max_new_tokens)
        mine.append((answer, str(tokenizer.decode(wanted, skip_special_tokens=True)).strip()))
    parts = agreement.gather(mine)
    return [parts[index % world][index // world] for index in range(len(asked))]


def range_of(dataset: Any, spec: TrainingSpec) -> range:
    """The numbers of the examples that are answered."""
    return range(min(len(dataset), spec.final_examples))


def score_bleu(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU-4 by sacrebleu with its own defaults, 0 to 100. Source: Post, arXiv:1804.08771."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(wanted)]).score)


def compare_targets(reached: Mapping[str, float], expected: Mapping[Any, float]) -> dict[str, dict[str, Any]]:
    """{metric: {"expected", "reached", "met"}} of every target; a metric that was not measured is not met."""
    found = {}
    for name, target in expected.items():
        value = reached.get(name)
        met = value is not None and (value <= target if name in LOWER_IS_BETTER else value >= target)
        found[name] = {"expected": target, "reached": value, "met": met}
    return found
