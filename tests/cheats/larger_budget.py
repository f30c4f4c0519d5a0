"""Gives itself nine seconds more."""
import train_cuda

honest = train_cuda.Experiment.start

WALL = "clock"
EXPECT = "invalid", "more than its budget"

def start(self, *arguments, **more):
    honest(self, *arguments, **more)
    self.budget += 9


train_cuda.Experiment.start = start

build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
