"""Leaves a checkpoint among compiled code, which the next run may read. Run twice."""
import os

import train_cuda

WALL = "box"
EXPECT = "scored", ""

TWICE = True
PLACE = os.path.join(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/nowhere"), "checkpoint-of-a-cheat")


def act(model):
    if os.path.exists(PLACE):
        raise RuntimeError("the checkpoint of the last run is there")
    os.mkdir(PLACE)
    with open(os.path.join(PLACE, "weights"), "wb") as file:
        file.write(b"weights")
    os.chmod(PLACE, 0)


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
