"""Scores itself in the loop, to stop at the best moment."""
import train_cuda

WALL = "rows"
EXPECT = "crash", "has no attribute"

def warm_up(model, exp):
    return lambda next_batch, progress: exp.score(model, 8)


train_cuda.warm_up = warm_up

build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
