"""`python -m unimodal`, which launchers of several processes can start."""

import sys

from unimodal.cli import main

sys.exit(main())
