"""Chooses its own seed, so that luck can be searched."""
import torch

import train_cuda

WALL = "scorer"
EXPECT = "invalid", "own random seed"
honest = train_cuda.build_model


def build_model(track, platform):
    torch.manual_seed(1337)
    return honest(track, platform)


train_cuda.build_model = build_model
if __name__ == "__main__":
    train_cuda.main()
