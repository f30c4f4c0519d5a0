"""A batch that no machine holds."""
import train_cuda

WALL = "clock"
EXPECT = "crash", "DEVICE_BATCH_SIZE"


def warm_up(model, exp):
    train_cuda.torch.empty(2**50)


train_cuda.warm_up = warm_up
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
