"""`argen train`, as ``python -m argen.train``, which ``accelerate launch -m argen.train`` starts."""

import sys

from argen.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
