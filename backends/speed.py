"""
How fast is this device? A process of its own for `autoresearch doctor`: the framework starts, and multiplies.

    python -m backends.speed --platform cpu      # {"dtype": "bfloat16", "tflops": 0.61}
"""

import argparse
import importlib
import json

from backends.device import Device
from backends.platforms import choose_platform


def main() -> None:
    """Print the dtype that a trainer computes in, and the best TFLOP/s of matrix products in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", default="")
    platform, _ = choose_platform(parser.parse_args().platform)
    backend = importlib.import_module("backends.mlx" if platform.framework == "mlx" else "backends.cuda")
    device: Device = backend.Experiment.device_class(platform, 1, 1)
    dtype = "bfloat16" if device.bf16 else "float32"
    print(json.dumps({"dtype": dtype, "tflops": round(device.measured_tflops(), 4)}))


if __name__ == "__main__":
    main()
