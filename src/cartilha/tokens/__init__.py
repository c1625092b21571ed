"""Text to token ids, and the memory-mapped store that keeps them; no torch and no transformers on this path."""
