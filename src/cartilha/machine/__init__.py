"""The machine: its devices and dtypes, its processes, its memory, the versions that it runs."""
