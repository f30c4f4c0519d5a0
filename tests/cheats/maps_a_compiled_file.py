"""Maps a file among compiled code before the clock, and writes to it when it has rows. Run twice."""
import mmap
import os

import train_cuda

WALL = "box"
EXPECT = "scored", ""
TWICE = True
PLACE = os.path.join(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/nowhere"), "map-of-a-cheat")
honest = train_cuda.Experiment.start


def start(self, *arguments, **more):
    if os.path.exists(PLACE):
        raise RuntimeError("the checkpoint of the last run is there")
    with open(PLACE, "wb+") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    memory[:] = b"0" * 4096
    honest(self, *arguments, **more)
    memory[:7] = b"learned"


train_cuda.Experiment.start = start
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
