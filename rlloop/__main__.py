"""`python -m rlloop` is the command `rlloop`."""

import sys

from rlloop.cli import main

sys.exit(main())
