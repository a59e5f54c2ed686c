"""Models built from the fused ops."""

from .config import GPT2Config

__all__ = ["GPT2Config"]
