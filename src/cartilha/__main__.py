"""`python -m cartilha`, the same as the command `cartilha`."""

import sys


def main() -> int:
    """The command line; Ctrl-C while its modules are still being loaded is no fault either."""
    try:
        from cartilha.cli import main as command

        return command()
    except KeyboardInterrupt:
        print("cartilha: stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
