"""
Score a saved run in a process that never trained: python -m backends.verify RUN_DIR OUT.json

The trainer that the run kept is loaded for its build_model alone; main() is not called. Writes val and sealed
bits per byte with their standard errors.
"""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path


def load_trainer(path):
    """The module of a trainer's file. Its main() does not run."""
    spec = importlib.util.spec_from_file_location("trainer_under_verification", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(run_dir, out):
    row = json.loads((run_dir / "run.json").read_text())
    platform, trainer = row["row"]["platform"], row["trainer"]
    os.environ.update(AUTORESEARCH_PLATFORM=platform, AUTORESEARCH_TRACK=row["row"]["track"], AUTORESEARCH_SEED=str(row["row"]["seed"]))
    os.environ.pop("AUTORESEARCH_RUN_DIR", None)
    from backends.platforms import current_platform

    backend = importlib.import_module("backends.mlx" if current_platform().backend.startswith("mlx") else "backends.cuda")
    exp = backend.Experiment()
    module = load_trainer(run_dir / trainer)
    model = module.build_model(exp.track, exp.platform)
    exp._load(model, run_dir / "model.safetensors")
    exp.val_tokens = row["row"]["val_tokens"]
    val, val_stderr, tokens = exp.score(model, module.EVAL_BATCH_SIZE)
    sealed_rows = len(exp.track.rows("sealed"))
    exp.val_tokens = min(tokens, sealed_rows * exp.track.seq_len)
    sealed, sealed_stderr, sealed_tokens = exp.score(model, module.EVAL_BATCH_SIZE, split="sealed")
    Path(out).write_text(json.dumps({"val_bpb": val, "val_stderr": val_stderr, "val_tokens": tokens, "fingerprint": exp.track.current_fingerprint(),
                                     "sealed_bpb": sealed, "sealed_stderr": sealed_stderr, "sealed_tokens": sealed_tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
