"""``python -m conceptmaster.benchmarks.gpu``: see command.py."""

import sys

from conceptmaster.benchmarks.gpu.command import main

sys.exit(main())
