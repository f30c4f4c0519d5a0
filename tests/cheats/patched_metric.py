"""Replaces the loss function by one that always says a tenth of a nat."""
import torch

import train_cuda

WALL = "scorer"
EXPECT = "invalid", "a second process"


def cross_entropy(logits, targets, reduction="mean"):
    return torch.full(targets.shape, 0.1)


if __name__ != "__main__":
    torch.nn.functional.cross_entropy = cross_entropy
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
