"""`python -m natkeep.cli`: the same as the program natkeep."""

import sys

from natkeep.cli import main

if __name__ == "__main__":
    sys.exit(main())
