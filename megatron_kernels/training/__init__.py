"""Training: the loop behind `megatron-kernels train`, and what it is made of.

`options.py` has everything that can be asked for, `loop.py` the loop; a run is also `loop.run(Options(...))`.
"""
