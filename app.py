"""Open the web page: `python app.py [--port P] [--data-dir DIR]`, the same as `argen ui`."""

import sys

from argen.cli.main import main

sys.exit(main(["ui", *sys.argv[1:]]))
