"""`python -m bestiary` is the command `bestiary`."""

import sys

from bestiary.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
