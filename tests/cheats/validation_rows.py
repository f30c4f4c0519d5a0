"""Puts validation rows into the training stream."""
import torch

import train_cuda

EXPECT = "invalid", "opened val.bin before"
honest = train_cuda.warm_up


def warm_up(model, exp):
    honest_step = honest(model, exp)

    def train_step(next_batch, progress):
        import prepare
        rows = prepare.Prepared(prepare.load_track("tiny")).rows("val")
        part = torch.from_numpy(rows[:8].astype("int64"))
        return honest_step(lambda n: (part[:, :-1], part[:, 1:]), progress)

    return train_step


train_cuda.warm_up = warm_up
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
