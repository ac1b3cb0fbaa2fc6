"""What DoRA takes beyond LoRA: it rebuilds each adapted layer's weight in every forward pass.

Source: peft/tuners/lora/dora.py and variants.py (0.21), DoraLinearLayer.forward; compared with traces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.sizing.precision import HALF, SINGLE, Precision

if TYPE_CHECKING:
    from lora_jobs.sizing.modules import Module


class DoraMoment(Struct, frozen=True):
    """While one weight of a layer is rebuilt, in bytes: what the layer has saved by then, what DoRA has kept of the
    modules before, and what the rebuilding takes.
    """

    saved: int
    kept: int
    rebuilt: int

    @property
    def total(self) -> int:
        return self.saved + self.kept + self.rebuilt


def saved_bytes(module: Module, precision: Precision, tokens: int, *, dropout: bool) -> int:
    """Kept for the backward pass by one adapted layer: the base's and the adapter's outputs, which the magnitude's
    gradient needs; with dropout the base runs again, and keeps the weight that was cast for it.
    """
    outputs = (precision.lora_input + precision.output) * module.fan_out * tokens
    is_cast = precision.adapter != precision.base
    return outputs + (precision.lora_input * module.weights if dropout and is_cast else 0)


def rebuilding_bytes(module: Module, precision: Precision, tokens: int, *, dropout: bool) -> int:
    """Live at the worst moment of one adapted layer's forward pass, beside what was saved before and its base's output.

    The product B A is made by running both on an identity matrix, fan_in x fan_in, which stays until the norm of
    weight + B A is there: four copies of the weight, or the identity matrix in both dtypes. Two copies of the weight
    and the cast identity live on beside the three parts of the result.
    """
    square, weights, width = module.fan_in**2, module.weights, precision.adapter
    inputs = width * module.fan_in * tokens * (2 if dropout else 1)
    if precision.casts_adapters:
        identity = (SINGLE + HALF) * square + HALF * weights
        norm = HALF * square + 4 * SINGLE * weights
        left = HALF * square + 2 * SINGLE * weights
    else:
        identity = width * (square + weights)
        norm = width * (square + (3 if width == precision.base else 4) * weights)
        left = width * (square + weights)
    result = saved_bytes(module, precision, tokens, dropout=dropout) + 3 * width * module.fan_out * tokens
    result += precision.lora_input * module.fan_in * tokens
    return max(identity, norm, left + result) + inputs
