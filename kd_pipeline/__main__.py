"""The command `kd-pipeline`, also as `python -m kd_pipeline`: runs the command line, and ends the process after it."""

import atexit
import gc
import sys
from typing import NoReturn

from kd_pipeline.cli import main

__all__ = ["run"]


def run() -> NoReturn:
    """Run the command line and exit with its status.

    Python collects garbage several times while it ends, each time through the half a million objects that torch and
    its libraries have made: two seconds of which nothing comes. Without them, all else happens as always, in its usual
    order: threads are joined, what others have registered runs, and streams are flushed.
    """
    atexit.register(gc.freeze)  # before all others, so it runs last
    sys.exit(main())


if __name__ == "__main__":
    run()
