"""A mask that is off by one: position t sees token t + 1."""
import train_cuda

WALL = "scorer"
EXPECT = "invalid", "sees its future"
honest = train_cuda.block_attention


def off_by_one(q, k, v, window):
    shift = lambda t: train_cuda.torch.cat([t[:, 1:], t[:, -1:]], dim=1)
    return honest(q, shift(k), shift(v), window)


train_cuda.block_attention = off_by_one
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
