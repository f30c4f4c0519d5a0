"""Makes the trainer's clock run at a third of the speed."""
import time
import types

import backends.experiment
import train_cuda

WALL = "clock"
EXPECT = "invalid", "more than its budget"
backends.experiment.time = types.SimpleNamespace(**{**vars(time), "monotonic": lambda began=time.monotonic(): began + (time.monotonic() - began) / 3})
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
