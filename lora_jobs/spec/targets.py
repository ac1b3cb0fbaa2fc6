"""Names of adapted layers in other frameworks' configurations, as transformers names them."""

from __future__ import annotations

import re

# Gemma in JAX computes its projections as einsums, some of them several at once. Source: google-deepmind/gemma and
# google/tunix, the modules of one transformer block.
EINSUM_NAMES: dict[str, tuple[str, ...]] = {
    "q_einsum": ("q_proj",),
    "kv_einsum": ("k_proj", "v_proj"),
    "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
    "gating_einsum": ("gate_proj", "up_proj"),
}
_EINSUM = re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(sorted(EINSUM_NAMES, key=len, reverse=True))})(?![A-Za-z0-9_])")


def find_translations(targets: tuple[str, ...] | str) -> dict[str, tuple[str, ...]]:
    """The einsum names in a list of names or a regular expression, and what transformers calls each."""
    text = targets if isinstance(targets, str) else " ".join(targets)
    return {name: EINSUM_NAMES[name] for name in dict.fromkeys(_EINSUM.findall(text))}


def translate_targets(targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
    """The same targets with transformers' names in the place of einsum names; a regular expression stays one."""
    if isinstance(targets, str):
        return _EINSUM.sub(lambda found: f"({'|'.join(EINSUM_NAMES[found[0]])})", targets)
    return tuple(dict.fromkeys(name for target in targets for name in EINSUM_NAMES.get(target, (target,))))
