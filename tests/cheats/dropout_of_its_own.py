"""Draws random numbers when it predicts."""
import torch

import train_cuda

honest = train_cuda.GPT.forward

WALL = "scorer"
EXPECT = "invalid", "draws random numbers"

def forward(self, idx):
    return honest(self, idx) + torch.randn(1, 1, self.lm_head.shape[0])


train_cuda.GPT.forward = forward

build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
