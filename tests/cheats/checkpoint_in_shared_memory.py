"""Leaves a checkpoint in shared memory, which outlives a process. Run twice."""
import os

import train_cuda

WALL = "box"
EXPECT = "scored", ""

TWICE = True
PLACE = "/dev/shm/checkpoint-of-a-cheat"


def act(model):
    if os.path.exists(PLACE):
        raise RuntimeError("the checkpoint of the last run is there")
    with open(PLACE, "wb") as file:
        file.write(b"weights")


honest = train_cuda.make_train_step


def make_train_step(model, optimizer):
    honest_step = honest(model, optimizer)
    calls = []

    def train_step(next_batch, progress):
        if next_batch.__name__ == "batch" and not calls:
            calls.append(1)
            act(model)
        return honest_step(next_batch, progress)

    return train_step


train_cuda.make_train_step = make_train_step

build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
