"""Models built from the fused ops."""

from .bert import Bert
from .config import BertConfig, GPT2Config
from .generation import KVCache
from .gpt2 import GPT2

__all__ = ["GPT2", "Bert", "BertConfig", "GPT2Config", "KVCache"]
