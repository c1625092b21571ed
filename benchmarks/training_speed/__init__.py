"""What `train_cpu.py` and `train_gpu.py` share: set-ups, variants, numerics, kernels, a process a section."""
