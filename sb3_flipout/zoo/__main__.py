"""The commands of ``python -m sb3_flipout.zoo``."""

import sys

from sb3_flipout.zoo.commands import main

sys.exit(main(sys.argv[1:]))
