"""Starts a process twice removed, in a session of its own, with an environment that says nothing.

It is ended, and the score is an honest one.
"""
import os
import sys

import train_cuda

WALL = "clock"
EXPECT = "scored", ""
LEAVES = True
honest = train_cuda.Experiment.start


def start(self, *arguments, **more):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print("left:", os.getpid(), flush=True)
            os.execve(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(600)"], {})
        os._exit(0)
    honest(self, *arguments, **more)


train_cuda.Experiment.start = start
build_model = train_cuda.build_model
if __name__ == "__main__":
    train_cuda.main()
