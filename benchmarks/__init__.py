"""Programs that measure megatron_kernels beside PyTorch: run them from the repository root, `python -m benchmarks.ops`."""
