"""Where a model's weights come from: a seed, or a checkpoint. The same for every model and at every parallel size."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..parallel.layout import shares
from .config import ModelConfig

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Megatron-LM's initial weights: N(0, init_method_std), with std / sqrt(2 num_layers) for the two projections of each layer
    that write to the residual stream; biases 0, layer norms the identity.

    Those of a parameter depend on the seed and the parameter's name alone."""
    for name, parameter, share in shares(model):
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name or "layer_norm" in name:
            parameter.fill_(1.0)
        else:
            own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little", signed=True)
            std = config.init_method_std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                std /= (2 * config.num_layers) ** 0.5
            whole = parameter if share.dim is None else parameter.new_empty(share.shape)
            whole.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(own))
            if share.dim is not None:
                parameter.copy_(share.of(whole))


def assign(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Make the checkpoint's tensors the parameters of a model on the meta device, one at a time; a rank reads its own share of
    them and no more. dtype None keeps the file's."""
    tensors = {}
    for name, _, share in shares(model):
        start, stop = (0, share.shape[0]) if share.dim is None else share.range
        tensor = checkpoint.part(name, share.dim or 0, start, stop)
        tensors[name] = tensor if dtype is None else tensor.to(dtype)
    model.load_state_dict(tensors, assign=True)
