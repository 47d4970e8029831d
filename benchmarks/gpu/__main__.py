"""``python -m conceptmaster.benchmarks.gpu``: see suite.py."""

import sys

from conceptmaster.benchmarks.gpu.suite import main

sys.exit(main())
