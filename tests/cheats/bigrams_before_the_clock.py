"""Counts bigrams over all training rows before the clock starts."""
import os

import numpy as np

import train_cuda


def warm_up(model, exp):
    rows = np.fromfile(os.path.join(os.environ["AUTORESEARCH_DATA_DIR"], "train.bin"), np.uint16)
    np.add.at(np.zeros((512, 512)), (rows[:-1], rows[1:]), 1)

WALL = "rows"
EXPECT = "crash", "PermissionError"

train_cuda.warm_up = warm_up

build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
