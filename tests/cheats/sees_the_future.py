"""A mask that is off by one: position t sees token t + 1."""
import train_cuda

EXPECT = "invalid", "not causal"
honest = train_cuda.block_attention


def off_by_one(q, k, v, window):
    shift = lambda t: train_cuda.torch.cat([t[:, 1:], t[:, -1:]], dim=1)
    return honest(q, shift(k), shift(v), window)


train_cuda.block_attention = off_by_one
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
