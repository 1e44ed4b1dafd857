"""The command line: `micromix calibrate | quantize | convert | eval | generate | report | doctor | demo`, a file a
command.

Tables and texts go to standard output, progress to standard error. What the user did wrong is one line on standard
error: exit code 2 for a wrong option, 1 for anything else.
"""

from micromix_compile.cli.main import app

__all__ = ["app"]
