"""`python -m mmalign` is the command line (as in `accelerate launch -m mmalign train CONFIG`)."""

import sys

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
