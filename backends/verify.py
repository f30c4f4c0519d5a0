"""
Score saved weights in a process that never trained: python -m backends.verify TRAINER WEIGHTS OUT.json

The trainer is loaded for its build_model and EVAL_BATCH_SIZE alone; its main() does not run. What is scored
comes from the environment (backends.protocol.RunSettings), as for a run. Writes bits per byte on the
validation rows and on the sealed rows, with their standard errors.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from backends.platforms import current_platform
from backends.protocol import write_json


def load_trainer(path: Path) -> ModuleType:
    """Return a trainer's file as a module. Its main() does not run."""
    spec = importlib.util.spec_from_file_location("trainer_under_verification", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main(trainer: Path, weights: Path, out: Path) -> None:
    """Score the weights on both sets of rows and write the scores to `out`."""
    framework = "mlx" if current_platform().framework == "mlx" else "cuda"
    backend = importlib.import_module(f"backends.{framework}")
    exp = backend.Experiment()
    module = load_trainer(trainer)
    model = module.build_model(exp.track, exp.platform)
    exp._load(model, weights)
    val_bpb, val_stderr, val_tokens = exp.score(model, module.EVAL_BATCH_SIZE)
    exp.val_tokens = min(val_tokens, len(exp.track.rows("sealed")) * exp.track.seq_len)
    sealed_bpb, sealed_stderr, sealed_tokens = exp.score(model, module.EVAL_BATCH_SIZE, split="sealed")
    scores = {
        "val_bpb": val_bpb,
        "val_stderr": val_stderr,
        "val_tokens": val_tokens,
        "sealed_bpb": sealed_bpb,
        "sealed_stderr": sealed_stderr,
        "sealed_tokens": sealed_tokens,
        "fingerprint": exp.track.current_fingerprint(),
    }
    write_json(out, scores)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
