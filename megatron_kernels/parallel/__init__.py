"""Tensor, sequence, pipeline and data parallelism, on torch.distributed's own engine."""

from .collectives import CollectiveError
from .cross_entropy import vocab_parallel_cross_entropy
from .group import Group, group_of, make_mesh
from .linear_cross_entropy import vocab_parallel_linear_cross_entropy
from .random import seed

__all__ = ["CollectiveError", "Group", "group_of", "make_mesh", "seed", "vocab_parallel_cross_entropy",
           "vocab_parallel_linear_cross_entropy"]
