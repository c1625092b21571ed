"""Perplexity and bits per byte: windows, nll, sums, baselines. The definitions are in docs/measures.md."""
