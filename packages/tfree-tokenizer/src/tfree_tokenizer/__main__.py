"""`python -m tfree_tokenizer` is the command `tfree`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
