"""Puts validation rows into the training stream."""
import torch

import train_cuda

EXPECT = "invalid", "opened val.bin before"
honest = train_cuda.train_step


def train_step(model, trunk, optimizer, next_batch, progress):
    import prepare
    rows = prepare.Prepared(prepare.load_track("tiny")).rows("val")
    part = torch.from_numpy(rows[:8].astype("int64"))
    return honest(model, trunk, optimizer, lambda n: (part[:, :-1], part[:, 1:]), progress)


def start(self, *arguments, **more):
    train_cuda.train_step = train_step
    return honest_start(self, *arguments, **more)


honest_start = train_cuda.Experiment.start
train_cuda.Experiment.start = start
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
