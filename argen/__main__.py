"""The command `argen`, as ``python -m argen``."""

import sys

from argen.cli.main import main

sys.exit(main())
