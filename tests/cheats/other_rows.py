"""A position looks at the same position of the other rows of its batch, as a normalisation over the batch would."""
import train_cuda

WALL = "scorer"
EXPECT = "invalid", "a second process"
honest = train_cuda.GPT.trunk


def trunk(self, idx):
    x = honest(self, idx)
    return train_cuda.norm(x + 0.5 * x.mean(dim=0, keepdim=True))


train_cuda.GPT.trunk = trunk
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
