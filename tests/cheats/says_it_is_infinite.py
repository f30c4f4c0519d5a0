"""Returns logits that make every loss zero or nothing."""
import torch

import train_cuda

honest = train_cuda.GPT.forward

WALL = "scorer"
EXPECT = "invalid", "NaN or infinity"

def forward(self, idx):
    return honest(self, idx) * torch.inf


train_cuda.GPT.forward = forward

build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
