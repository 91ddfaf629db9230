"""`python -m async_ckpt_saver`: the command line, detached first if asked."""

import os
import sys

if "--detach" in sys.argv:
    # Before any import that costs time or starts a thread. The parent's exit hands us to init, so that the rank which
    # starts a saver has no zombie to reap, and its death, or its terminal's, is not ours.
    if os.fork():
        os._exit(0)
    os.setsid()

from async_ckpt_saver.cli import main

sys.exit(main())
