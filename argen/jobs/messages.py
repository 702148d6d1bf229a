"""Error messages for remote clients."""

import errno
import re
from pathlib import Path

from argen.hub.memory import out_of_memory

DISK_FULL = errno.ENOSPC, errno.EDQUOT
PATHS = re.compile(r"(?<![\w/.:<])(?:/[^\s/'\":,;()]+)+/(?=[^\s/])")  # the folders of an absolute path


def error_message(error: Exception) -> str:
    """Return an error as one line for a remote client; of the paths of this machine only the last names are kept."""
    if message := out_of_memory(error):
        return message
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"the disk of the server is full ({error.strerror}): nothing can be written"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror or type(error).__name__}: {Path(str(error.filename)).name}"
    has_text = error.args and not isinstance(error, OSError)
    return PATHS.sub("", str(error.args[0] if has_text else error))
