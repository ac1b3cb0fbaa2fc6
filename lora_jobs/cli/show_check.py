"""The screen of `check`: the verdict first, then the peak part by part, other cards, the changes, the warnings."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import find_line_width, say
from lora_jobs.cli.show_targets import show_targets
from lora_jobs.cli.status_line import format_span
from lora_jobs.sizing.cards import COMMON
from lora_jobs.sizing.margins import MARGINS
from lora_jobs.units import format_count, format_gib
from lora_jobs.workflows.lengths import describe_basis

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_jobs.sizing import Card, Suggestion, Verdict
    from lora_jobs.workflows.checking import CheckReport
    from lora_jobs.workflows.costing import Costs

BAR_WIDTH = 28
MOST_SHOWN = 2
"""Suggestions that are enough; the JSON has every one."""

MOST_BARS = 6
"""Of tensors; what must fit beside them is never left out."""

MEANT = 32
"""GB of the card that "it runs on a workstation" usually means."""

SMALLEST_SHARE = 0.005
"""Parts of the peak below this share stand together in the last bar."""

BEFORE = "before submitting: "

_PLACE = re.compile(r" \(from [^)]*\)$")

_STYLES = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}


def show_check(report: CheckReport, command: str) -> None:
    """Everything a tired person needs, on one screen; `command` is the one that was typed."""
    verdict, resources = report.verdict, report.spec.resources
    devices = f"{resources.world_size} x {report.gpu.name}"
    say(f"{report.spec.name}: {report.spec.model.name_or_path} on {report.environment.name}, {devices}", "bold")
    base, trainable = verdict.parameters_base, verdict.parameters_trainable
    parameters = f"parameters: {format_count(base)} base, {format_count(trainable)} trainable ({trainable / base:.2%})"
    attention = verdict.attention.words if verdict.attention else None
    say_wrapped(parameters if attention is None else f"{parameters}; attention: {attention}")
    if report.is_estimated:
        show_targets(report.spec)
    say()
    _show_verdict(report)
    _show_parts(report)
    _show_exact(report)
    _show_suggestions(verdict, command)
    _show_cards(verdict.cards)
    say()
    if report.costs is not None:
        _show_costs(report.costs)
    _show_warnings((*verdict.warnings, *(report.costs.notes if report.costs else ())))


def _show_costs(costs: Costs) -> None:
    """Host memory and disk on one line, time on the other."""
    host, disk = costs.host, costs.disk
    limit = f" of {format_gib(host.limit_bytes)} {host.limit_of}" if host.limit_bytes else ""
    free = f" of {format_gib(disk.free_bytes)} free" if disk.free_bytes is not None else ""
    say_wrapped(
        f"host memory per node {format_gib(host.total)}{limit}; "
        f"disk {format_gib(disk.total)} ({disk.kept} x {format_gib(disk.checkpoint_bytes)}){free}"
    )
    if (time := costs.time) is None:
        say("time: unknown, no speed is known of this GPU")
        return
    span = format_span(time.duration.seconds)
    if time.rows is not None:
        text = f"{time.rows} full rows take {span} (data.train is not here)"
    else:
        again = {None: "", 0: ", one job"}.get(time.requeues, f", {time.requeues} requeue(s)")
        text = f"{time.duration.steps} steps take {span} of {format_span(time.limit_seconds)} asked for{again}"
    assumed = "" if time.duration.measured else " assumed"
    lengths = "" if time.train is None else f"; row lengths {describe_basis(time.train)}"
    say_wrapped(f"time: {text}; {time.duration.basis.removesuffix(' assumed')}{assumed}{lengths}")


def _show_warnings(warnings: Sequence[str]) -> None:
    """What is in the way of a submission together, then every other warning."""
    first = [_PLACE.sub("", text.removeprefix(BEFORE)) for text in warnings if text.startswith(BEFORE)]
    if first:
        say_wrapped(f"warning: {BEFORE}{'; '.join(first)}", "yellow")
    for warning in warnings:
        if not warning.startswith(BEFORE):
            say_wrapped(f"warning: {warning}", "yellow")


def say_wrapped(text: str, style: str = "", indent: str = "  ") -> None:
    """Lines of at most the screen's width; what goes on is indented."""
    width = find_line_width()
    for line in textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False):
        say(line, style)


def _show_verdict(report: CheckReport) -> None:
    """The word, the two numbers, and where it would die or what the peak is."""
    verdict, usable = report.verdict, report.gpu.usable_bytes
    spare = usable - report.peak_bytes
    ending = f"{format_gib(spare)} to spare" if spare >= 0 else f"{format_gib(-spare)} too much"
    numbers = f"{format_gib(report.peak_bytes)} needed of {format_gib(usable)} usable on each {report.gpu.name}"
    say(f"{report.word.upper()}: {numbers}, {ending}", _STYLES[report.word])
    death = verdict.death if report.exact is None else None
    if death is not None:
        there = "; peak of a process, there:" if death == verdict.peak else ""
        say_wrapped(f"dies {death.words}{there}", _STYLES["does not fit"])
    if death != verdict.peak:
        say_wrapped(f"peak of a process, {verdict.peak.when} ({verdict.peak.what}):")


def _show_parts(report: CheckReport) -> None:
    """A bar a component, the largest first; tensors that are crumbs in one, the parts of the margin each on its own."""
    components = report.verdict.estimate.components
    total, largest = sum(components.values()), max(components.values())
    ordered = sorted(((name, size) for name, size in components.items() if size), key=lambda item: -item[1])
    tensors = [name for name, _ in ordered if name not in MARGINS]
    crumbs = {name for name in tensors if components[name] < SMALLEST_SHARE * total}
    if len(tensors) > MOST_BARS:
        crumbs |= set(tensors[MOST_BARS - 1 :])
    rows = [(name, size) for name, size in ordered if name not in crumbs or len(crumbs) == 1]
    if len(crumbs) > 1:
        rows.append((f"{len(crumbs)} small parts", sum(components[name] for name in crumbs)))
    widest = max(len(name) for name, _ in rows), max(len(format_gib(size)) for _, size in rows)
    for name, size in rows:
        bar = "█" * max(1, round(BAR_WIDTH * size / largest))
        say(f"  {name.replace('_', ' '):{widest[0]}}  {format_gib(size):>{widest[1]}}  {bar}")


def _show_exact(report: CheckReport) -> None:
    """The trace beside the estimate, in allocated bytes."""
    if report.exact is None or not report.is_estimated:
        return
    traced, estimated = report.exact.allocated_peak_bytes, report.verdict.estimate.step_peak_bytes
    instant = report.exact.binding.replace("_", " ")
    say(f"traced from the real training code: {format_gib(traced)} allocated at its peak ({instant}),")
    say(f"  the estimate says {format_gib(estimated)} ({estimated / traced - 1:+.2%})")


def _show_suggestions(verdict: Verdict, command: str) -> None:
    """The smallest set that is enough, in full; more of them; what helps but is not enough, by name."""
    enough = [change for change in verdict.suggestions if change.fits]
    if enough:
        say()
        more = f" ({len(enough) - MOST_SHOWN} more with --json)" if len(enough) > MOST_SHOWN else ""
        say(f"{'to be sure' if verdict.fits else 'the smallest change that fits'}{more}:", "bold")
        _show_change(enough[0], f"{command} ")
    for change in enough[1:MOST_SHOWN]:
        _show_change(change, "or ")
    if not verdict.fits and not enough:
        say()
        smallest = f"; the smallest GPU that would do: {verdict.smallest_gpu}" if verdict.smallest_gpu else ""
        say_wrapped(f"no change that lora-jobs knows makes it fit{smallest}", "bold")
        for change in verdict.suggestions[:MOST_SHOWN]:
            _show_change(change)


def _show_change(change: Suggestion, command: str = "") -> None:
    mark = {"fits": "", "tight": ", tight", "does not fit": ", not enough alone"}[change.verdict]
    say(f"  {command}{format_settings(change.set)}")
    say_wrapped(f"    {format_gib(change.peak_bytes)}{mark}: {change.why}", indent="    ")


def _show_cards(cards: Sequence[Card]) -> None:
    """The same job on cards of other sizes: of the 32 GB card where it dies and what helps."""
    if not cards:
        return
    say()
    say("the same job on other cards:", "bold")
    detailed = [card for card in cards if card.death and COMMON[card.gpu.name] == MEANT]
    for card in detailed:
        needed = f"{format_gib(card.peak_bytes)} of {format_gib(card.gpu.usable_bytes)}"
        death = card.death.words if card.death else ""
        say_wrapped(f"  {_name(card)}: does not fit, {needed}; dies {death}", indent="    ")
        if (change := card.suggestion) is not None:
            say(f"    {format_settings(change.set)}: {format_gib(change.peak_bytes)}, {change.verdict}")
    words: dict[str, list[str]] = {}
    for card in cards:
        if card not in detailed:
            words.setdefault(card.word, []).append(_name(card))
    if words:
        say_wrapped("  " + "; ".join(f"{word} on {', '.join(names)}" for word, names in words.items()), indent="    ")


def _name(card: Card) -> str:
    return f"{COMMON[card.gpu.name]} GB ({card.gpu.name})"


def format_settings(settings: Mapping[str, object]) -> str:
    """`--set KEY=VALUE` for each, as a shell takes it."""
    return " ".join(f"--set {format_setting(key, value)}" for key, value in settings.items())


def format_setting(key: str, value: object) -> str:
    """`key=value` as --set takes it and a shell passes it on."""
    text = value if isinstance(value, str) else json.dumps(value)
    return shlex.quote(f"{key}={text}")
