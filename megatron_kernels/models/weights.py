"""Where a model's weights come from: a seed, or a checkpoint. The same for every model and at every parallel size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..parallel.layout import shares
from .config import ModelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..checkpoint import Checkpoint

Model = TypeVar("Model", bound="SavedModel")


class SavedModel(nn.Module):
    """A model that is read from checkpoints of Megatron-LM and of Hugging Face, and written to either."""

    config: ModelConfig
    mesh: DeviceMesh | None
    from_checkpoint: Callable[..., Any]  # a class method that each model has: they are made of different arguments

    @classmethod
    def from_megatron(cls: type[Model], path: str | Path, config: ModelConfig | str | Path | None = None,
                      dtype: torch.dtype | None = None, **changes: Any) -> Model:
        """Load a Megatron-LM checkpoint: the zip, a .pt, an iteration directory or the one above it, of any parallel size.

        config (or the path of a Hugging Face config.json) supplies what the file can't tell. For the rest see `from_checkpoint`
        and `megatron_kernels.checkpoint.load`, which also says what is refused. The model comes in eval mode.
        """
        from .. import checkpoint
        return cls.from_checkpoint(checkpoint.load(path, config), dtype, **changes)

    @classmethod
    def from_huggingface(cls: type[Model], path: str | Path, dtype: torch.dtype | None = None, **changes: Any) -> Model:
        """Load a Hugging Face directory (config.json beside its weights): a GPT-2, a Megatron-BERT (pre-norm), or a BERT
        (post-norm) with its masked-LM head. See `from_checkpoint`. The model comes in eval mode."""
        from .. import checkpoint
        return cls.from_checkpoint(checkpoint.load(path), dtype, **changes)

    def save_megatron(self, directory: str | Path, *, tensor_parallel: int = 1, pipeline_parallel: int = 1,
                      **options: Any) -> None:
        """Write a Megatron-LM checkpoint for that parallel size; see `megatron_kernels.checkpoint.save_megatron`.

        On a mesh all ranks call this, and the first writes what the others send it, one tensor at a time. Where a rank has
        several stages of a pipeline, `megatron_kernels.checkpoint.write_together` takes them all.
        """
        from .. import checkpoint
        checkpoint.write_together([self], self.config, self.mesh, lambda gathered: checkpoint.save_megatron(
            gathered, directory, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, **options))

    def save_huggingface(self, directory: str | Path, **options: Any) -> None:
        """Write a Hugging Face directory; see `save_megatron` and `megatron_kernels.checkpoint.save_huggingface`."""
        from .. import checkpoint
        checkpoint.write_together([self], self.config, self.mesh,
                                  lambda gathered: checkpoint.save_huggingface(gathered, directory, **options))


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
