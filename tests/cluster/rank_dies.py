"""`pangu.train`, of which rank 1 fails in its fourth step with an exception of its own."""

import os
import sys
import threading
import time

from pangu.train import main


def spoil() -> None:
    """Once the loop is there: what it calls for a step is another thing."""
    while not hasattr(sys.modules.get("pangu.training.loop"), "Trainer"):
        time.sleep(0.01)
    trainer = sys.modules["pangu.training.loop"].Trainer
    step = trainer.one_step

    def one_step(self, batches):
        if self.state.step == 3:
            raise ZeroDivisionError("a fault of rank 1 alone")
        return step(self, batches)

    trainer.one_step = one_step


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        threading.Thread(target=spoil, daemon=True).start()
    sys.exit(main(sys.argv[1:]))
