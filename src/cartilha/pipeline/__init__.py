"""The only place that wires stages together: one module a command, each a function from a config to a typed result."""
