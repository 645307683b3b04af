"""`python -m eigenfunc` is the command `eigenfunc`."""

import os
import sys

import torch.distributed as dist

from eigenfunc.cli import main

code = main()
if dist.is_available() and dist.is_torchelastic_launched():
    # torch's threads of communication can abort a process while it is taken down, which would pass for a failure
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
