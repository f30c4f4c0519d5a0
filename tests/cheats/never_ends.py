"""A loop that does not look at the clock."""
import time

import train_cuda

WALL = "clock"
EXPECT = "timeout", "the loop does not end"


def main():
    exp = train_cuda.Experiment()
    model = train_cuda.build_model(exp.track, exp.platform)
    exp.start(model, depth=2, flops_per_token=1)
    while True:
        time.sleep(0.05)


build_model = train_cuda.build_model
if __name__ == "__main__":
    main()
