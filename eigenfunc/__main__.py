"""`python -m eigenfunc` is the command `eigenfunc`."""

import sys

from eigenfunc.cli import main

sys.exit(main())
