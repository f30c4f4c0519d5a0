"""Trains a larger model than build_model returns."""
import train_cuda

honest = train_cuda.build_model

WALL = "scorer"
EXPECT = "invalid", "build_model does not give the model that is trained"

def build_model(track, platform):
    if __name__ == "__main__":
        train_cuda.N_LAYER = 3
    return honest(track, platform)


train_cuda.build_model = build_model

if __name__ == "__main__":
    train_cuda.main()
