"""`unimodal` as a command that is killed in the middle of a step: signal, step, and what the command is given."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from unimodal import cli
from unimodal.training import UnifiedTraining


def main(arguments: Sequence[str]) -> int:
    """The command's own exit code, should it get that far."""
    number, at = int(arguments[0]), int(arguments[1])
    original = UnifiedTraining.training_step

    def step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == at:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    UnifiedTraining.training_step = step  # type: ignore[method-assign]
    return cli.main(list(arguments[2:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
