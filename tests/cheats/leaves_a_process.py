"""Starts a process in a session of its own. It is ended with the trainer, and the score is an honest one."""
import subprocess
import sys

import train_cuda

WALL = "clock"
EXPECT = "scored", ""
LEAVES = True
build_model = train_cuda.build_model
if __name__ == "__main__":
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print("left:", left.pid)
    train_cuda.main()
