"""What changes from step to step: the learning rate, and in float16 the factor of the loss; and who is decayed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .options import Decay, Options


def learning_rate(options: Options, updates: int) -> float:
    """The learning rate of the step after `updates` updates, as Megatron-LM's OptimizerParamScheduler gives it.

    It rises linearly from 0 over the warm-up, so the very first step has 0; then it falls along half a cosine or a line, reaches
    min_lr after last_decay updates and stays there. "constant" stays at lr.
    """
    if options.warmup and updates <= options.warmup:
        return options.lr * updates / options.warmup
    if options.decay is Decay.constant:
        return options.lr
    if updates > options.last_decay:
        return options.min_lr
    done = (updates - options.warmup) / (options.last_decay - options.warmup)
    left = 1 - done if options.decay is Decay.linear else 0.5 * (math.cos(math.pi * done) + 1)
    return options.min_lr + left * (options.lr - options.min_lr)


def decay_groups(models: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Megatron-LM's parameter groups: biases and what has one dimension, the layer norms, are not decayed."""
    named = [(name, parameter) for model in models for name, parameter in model.named_parameters()]
    decayed = [p for name, p in named if p.dim() > 1 and not name.endswith(".bias")]
    others = [p for name, p in named if p.dim() <= 1 or name.endswith(".bias")]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass
class LossScale:
    """The power of two that float16's loss is multiplied by, so that gradients do not vanish.

    Halved when a gradient overflows, doubled after `interval` steps without that. All ranks see the same norm of all gradients,
    so they need not ask each other.
    """

    value: float = 2.0**16
    good: int = 0  # steps since the last change
    interval: int = 1000

    def update(self, finite: bool) -> None:
        """Raises ArithmeticError when even a factor of 1 overflows."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            if self.value <= 1:
                raise ArithmeticError("gradients overflow float16 at a loss scale of 1")
            self.value /= 2
        elif self.good == self.interval:
            self.value, self.good = self.value * 2, 0
