"""Writes the result file itself and exits 0."""
import json
import os
from pathlib import Path

EXPECT = "crash", "without a result"
if __name__ == "__main__":
    Path(os.environ["AUTORESEARCH_RUN_DIR"], "result.json").write_text(json.dumps({"val_bpb": 0.9, "val_stderr": 0.001}))
