"""Chooses its own seed where the generator's state does not show it."""
import torch

import train_cuda

honest = train_cuda.build_model

WALL = "scorer"
EXPECT = "invalid", "whatever the seed"

def build_model(track, platform):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1337)
        return honest(track, platform)


train_cuda.build_model = build_model

if __name__ == "__main__":
    train_cuda.main()
