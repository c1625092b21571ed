"""Continued training: the loop as a generator of step records, the optimizer, memory, and checkpoints."""
