"""Models built from the fused ops."""

from .config import GPT2Config
from .generation import KVCache
from .gpt2 import GPT2

__all__ = ["GPT2", "GPT2Config", "KVCache"]
