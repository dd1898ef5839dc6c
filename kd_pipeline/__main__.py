"""`python -m kd_pipeline` is `kd-pipeline`."""

import sys

from kd_pipeline.cli import main

sys.exit(main())
