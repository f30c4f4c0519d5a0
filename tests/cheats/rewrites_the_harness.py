"""Rewrites platforms.yaml, a part of the harness, while it runs."""
import os
from pathlib import Path

import train_cuda

EXPECT = "invalid", "harness changed on disk"
build_model = train_cuda.build_model
if __name__ == "__main__":
    path = Path(os.environ["AUTORESEARCH_CONFIG"])
    path.write_text(path.read_text() + "# val_tokens: 128\n")
    train_cuda.main()
