"""Starts a process in a session of its own that outlives it."""
import subprocess
import sys

import train_cuda

WALL = "clock"
EXPECT = "invalid", "left processes running"
build_model = train_cuda.build_model
if __name__ == "__main__":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    train_cuda.main()
