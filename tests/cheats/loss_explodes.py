"""A learning rate that ends in NaN."""
import train_cuda

EXPECT = "crash", "the loss is"
honest = train_cuda.train_step
calls = []


def train_step(*arguments):
    calls.append(1)
    loss = honest(*arguments)
    return loss * float("nan") if len(calls) > 6 else loss


train_cuda.train_step = train_step
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
