"""Returns logits of the last position only."""
import train_cuda

WALL = "scorer"
EXPECT = "invalid", "must return logits"
honest = train_cuda.GPT.forward
train_cuda.GPT.forward = lambda self, idx: honest(self, idx)[:, -1:]
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
