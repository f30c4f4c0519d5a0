"""A position looks at the other rows of its batch, where it may find its own continuation."""
import train_cuda

EXPECT = "invalid", "not independent"
honest = train_cuda.GPT.trunk


def trunk(self, idx):
    x = honest(self, idx)
    return train_cuda.norm(x + 0.5 * x[1:, :1].mean(dim=0))


train_cuda.GPT.trunk


def trunk(self, idx):
    x = honest(self, idx)
    return train_cuda.norm(x + x.mean(dim=(0, 1), keepdim=True).detach() * 0 + x[1:].mean(dim=(0, 1)) * 0.5)


train_cuda.GPT.trunk = trunk
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
