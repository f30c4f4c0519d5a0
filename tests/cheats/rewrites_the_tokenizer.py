"""Doubles the bytes of every token on disk, which halves bits per byte."""
import numpy as np

import train_cuda

EXPECT = "invalid", "changed on disk"
honest = train_cuda.Experiment.start


def start(self, *arguments, **more):
    path = self.track.path / "token_bytes.npy"
    np.save(path, 2 * np.load(path))
    return honest(self, *arguments, **more)


class Experiment(train_cuda.Experiment):
    start = start


train_cuda.Experiment = Experiment
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
