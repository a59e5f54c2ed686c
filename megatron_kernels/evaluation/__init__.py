"""Megatron-LM's zero-shot evaluation: perplexity on WikiText-103 and other text, and the accuracy of LAMBADA's last words.

`megatron-kernels evaluate` is `command`; `datasets` says what is scored, `scoring` scores it, `ledger` keeps what is done. Nothing
is imported here, so that the command line starts without PyTorch.
"""
