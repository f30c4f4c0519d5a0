"""Learns from the rows that it is scored on: the second scoring of a row is better than the first."""
import train_cuda

WALL = "scorer"
EXPECT = "invalid", "a second process"
honest = train_cuda.GPT.forward


def forward(self, idx):
    logits = honest(self, idx)
    if not self.training_now:
        self.calls = getattr(self, "calls", 0) + 1
        logits = logits * (1 + 0.02 * max(0, self.calls - 8))
    return logits


train_cuda.GPT.training_now = False
train_cuda.GPT.forward = forward
honest_init = train_cuda.GPT.init_weights


def init_weights(self):
    """Without a matrix of zeros, so that the effect does not hang on how far the training came."""
    honest_init(self)
    for p in self.parameters():
        if p.ndim > 1:
            p.data.normal_(std=0.1)


train_cuda.GPT.init_weights = init_weights
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
