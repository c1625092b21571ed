"""Models: loading with float32 master weights, attention that respects documents, and the fused head and loss."""
