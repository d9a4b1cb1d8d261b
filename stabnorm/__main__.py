"""`python -m stabnorm` is the command `stabnorm`."""

import sys

from stabnorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
