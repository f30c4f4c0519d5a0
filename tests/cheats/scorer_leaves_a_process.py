"""A process that scores starts another one without a name. It is ended, and the score is an honest one."""
import os
import sys

import train_cuda

WALL = "scorer"
EXPECT = "scored", ""
LEAVES = True
honest = train_cuda.build_model


def build_model(track, platform):
    if __name__ != "__main__" and os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print("left:", os.getpid(), flush=True)
            os.execve(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(600)"], {})
        os._exit(0)
    return honest(track, platform)


train_cuda.build_model = build_model
if __name__ == "__main__":
    train_cuda.main()
