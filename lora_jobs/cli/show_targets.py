"""Layer names of another framework, beside what transformers calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.cli.screen import add_row, build_console, build_table, say

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec


def show_targets(spec: JobSpec) -> None:
    """A table of the translated names with their layers; nothing where the spec has transformers' names already."""
    # Late: a look at the queue imports this module too, and starts without pydantic.
    from lora_jobs.sizing import count_targets, find_shape
    from lora_jobs.spec import find_translations

    translations = find_translations(spec.lora.target_modules)
    if not translations:
        return
    counts = count_targets(find_shape(spec.model.name_or_path), spec.lora)
    say()
    table = build_table("TARGET", "IN TRANSFORMERS", "LAYERS", right=(2,))
    for name, modules in translations.items():
        for module in modules:
            add_row(table, name, module, str(counts.pop(module, 0)))
    for module, count in counts.items():
        add_row(table, module, module, str(count))
    build_console().print(table)
