"""Tensor, sequence, pipeline and data parallelism, on torch.distributed's own engine."""

from .collectives import CollectiveError
from .cross_entropy import vocab_parallel_cross_entropy
from .data import check_same_weights, data_parallel, no_sync
from .failures import failures
from .gradients import clip_grad_norm_, finish_gradients
from .group import Group, group_of, make_mesh
from .linear_cross_entropy import vocab_parallel_linear_cross_entropy
from .pipeline import Pipeline
from .random import seed

__all__ = ["CollectiveError", "Group", "Pipeline", "check_same_weights", "clip_grad_norm_", "data_parallel", "failures",
           "finish_gradients", "group_of", "make_mesh", "no_sync", "seed", "vocab_parallel_cross_entropy",
           "vocab_parallel_linear_cross_entropy"]
