"""A learning rate that ends in NaN."""
import train_cuda

WALL = "clock"
EXPECT = "crash", "the loss is"
honest = train_cuda.make_train_step
calls = []


def make_train_step(model, optimizer):
    honest_step = honest(model, optimizer)

    def train_step(next_batch, progress):
        calls.append(1)
        loss = honest_step(next_batch, progress)
        return loss * float("nan") if len(calls) > train_cuda.WARMUP_STEPS else loss

    return train_step


train_cuda.make_train_step = make_train_step
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
