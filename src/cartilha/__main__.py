"""`python -m cartilha`, the same as the command `cartilha`."""

import sys

from cartilha.cli import main

if __name__ == "__main__":
    sys.exit(main())
