"""Weights without a matrix of zeros, and a learning rate of nothing: as bad as a model can be."""

import train_cuda

honest = train_cuda.GPT.init_weights


def init_weights(self):
    honest(self)
    for p in self.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.1)


train_cuda.GPT.init_weights = init_weights
train_cuda.lr_scale = lambda progress: 0.0
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
