"""Examples to the screen: what is learned bright, what is masked dim; and the lengths as a histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from lora_jobs.cli.screen import add_row, build_console, build_table, clean, say
from lora_jobs.units import format_count

if TYPE_CHECKING:
    from lora_jobs.workflows.previewing import Part, Piece, Preview

BAR_WIDTH = 40
SHOWN_CHARACTERS = 1200


def show_preview(preview: Preview) -> None:
    """A few examples in pieces, then each file's lengths against data.max_length."""
    data = preview.spec.data
    for number, example in enumerate(preview.train.examples, start=1):
        say(f"example {number} of {preview.train.name}", "bold")
        for piece in example:
            _show_piece(piece)
        say()
    _show_lengths(preview.train, data.max_length)
    if preview.evaluation is not None:
        say()
        _show_lengths(preview.evaluation, data.max_length)
    if preview.unkept:
        say(f"note: {preview.unkept}")
    else:
        say("check and plan count with these lengths from now on")


def _show_piece(piece: Piece) -> None:
    word, style = ("learned", "") if piece.learned else ("masked", "dim")
    text = piece.text
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"
    say(f"[{word}, {format_count(piece.tokens)} tokens]", "green" if piece.learned else "dim")
    build_console().print(Text("\n".join(f"  {clean(line)}" for line in text.split("\n")), style=style), soft_wrap=True)


def _show_lengths(part: Part, max_length: int) -> None:
    rows = len(part.lengths)
    first = "the first " if part.more else ""
    say(f"{part.name}: {first}{format_count(rows)} rows, {format_count(sum(part.lengths))} tokens", "bold")
    share = part.learned / max(1, sum(part.lengths))
    say(f"tokens a row: median {part.find_quantile(0.5)}, 95 % under {part.find_quantile(0.95) + 1}, "
        f"longest {max(part.lengths, default=0)}; {share:.0%} of all tokens are learned")  # fmt: skip
    most = max((count for _, _, count in part.count_bins()), default=1)
    table = build_table("  TOKENS", "ROWS", "", right=("ROWS",))
    for start, end, count in part.count_bins():
        bar = "█" * max(1, round(BAR_WIDTH * count / most)) if count else ""
        add_row(table, f"  {start}-{end - 1}", format_count(count), bar, style="dim" if start > max_length else "")
    build_console().print(table)
    too_long = part.count_too_long(max_length)
    if too_long:
        say(f"{format_count(too_long)} rows are longer than data.max_length {max_length}: they are left out", "yellow")
    else:
        say(f"none is longer than data.max_length {max_length}")
    if part.empty:
        say(f"{format_count(part.empty)} rows have nothing to learn: they are left out", "yellow")
