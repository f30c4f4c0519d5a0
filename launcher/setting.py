"""Where experiments run and what they learn: resolved once, at the door, from what the user typed."""

import importlib.util
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from backends.dtype import BFLOAT16, Choice, choose_dtype
from backends.platforms import Facts, Platform, choose_platform, entries_as_json, facts_for, scored_tokens
from backends.protocol import RunSettings
from backends.sizes import with_start
from launcher.box import missing_walls
from launcher.ledger import BoardKey
from prepare import (
    ROOT,
    RULES,
    TIME_BUDGET,
    Prepared,
    Track,
    UserError,
    installed_version,
    load_track,
    prepare_track,
)

MLX_CUDA_PACKAGES = ("mlx-cuda-12", "mlx-cuda-13")  # mlx[cuda12] or mlx[cuda13] installs one of them


@dataclass(frozen=True)
class Setting:
    """The platform, the track, the device and the budget of a command's experiments."""

    platform: Platform
    why: str  # why this platform was chosen
    track: Track
    facts: Facts
    val_tokens: int  # scored in a run
    budget: float  # seconds of training
    boxed: bool | None = None  # its runs are behind walls; None: if this machine has them

    @cached_property
    def data(self) -> Prepared:
        """The track's prepared data. The first use prepares it, which can take minutes."""
        return prepare_track(self.track)

    @property
    def trainer(self) -> Path:
        """The file that experiments edit."""
        return ROOT / self.platform.trainer

    @property
    def short(self) -> bool:
        """The budget is not that of the rules: runs are flagged, and never rank."""
        return self.budget != TIME_BUDGET

    @property
    def board(self) -> BoardKey:
        """What the runs of this setting are ranked by."""
        return BoardKey(
            track=self.track.name,
            fingerprint=self.data.fingerprint,
            rules=RULES,
            budget=self.budget,
            val_tokens=self.val_tokens,
            platform=self.platform.name,
            device=self.facts.device,
            boxed=not missing_walls() if self.boxed is None else self.boxed,
        )

    @cached_property
    def dtype(self) -> Choice:
        """What the trainer and its scoring compute in. The first use on a machine measures it: seconds."""
        return choose_dtype(self.platform, self.facts)

    @property
    def bf16(self) -> bool:
        """The trainer and its scoring compute in bfloat16."""
        return self.dtype.dtype == BFLOAT16

    def run_settings(self, seed: int) -> RunSettings:
        """Return the names that these settings have, for whoever resolves them again."""
        return RunSettings(self.platform.name, self.track.name, seed=seed, budget=self.budget)

    def boxed_settings(self, seed: int, run_id: str) -> RunSettings:
        """Return what a boxed process is told of its experiment: it can look nothing up, or measure it."""
        return replace(
            self.run_settings(seed),
            entries=entries_as_json(replace(self.platform, bf16=self.bf16), self.track),
            data_dir=str(self.data.path),
            run_id=run_id,
        )

    def require_device(self) -> None:
        """Raise UserError when this machine cannot run the platform. Nothing is prepared before."""
        platform = self.platform
        here = (self.facts.framework, self.facts.device_kind)
        is_nvidia = "compute_capability" in self.facts.details
        wanted = (platform.framework, platform.device_kind)
        wants_cuda_mlx = wanted == ("mlx", "gpu") and not platform.auto and is_nvidia
        if platform.device_kind == "gpu" and here != wanted and not wants_cuda_mlx:
            raise UserError(
                f"platform {platform.name} needs a GPU for {platform.framework}, and this machine has "
                f"{self.facts.device}: leave --platform out, or name one that fits (autoresearch platforms)",
                2,
            )
        is_missing = (installed_version(name) == "missing" for name in MLX_CUDA_PACKAGES)
        if wants_cuda_mlx and all(is_missing):
            raise UserError(
                f"platform {platform.name} needs MLX's CUDA build: uv pip install 'mlx[cuda13]' (or "
                "cuda12), then uv run --no-sync autoresearch; or leave --platform out",
                2,
            )
        package = platform.framework
        if importlib.util.find_spec(package) is not None:
            return
        message = (
            f"platform {platform.name} needs the package {package}, which is not installed: "
            "uv sync, or choose another --platform"
        )
        if sys.platform == "darwin":
            message += " (for an Intel Mac there is neither MLX nor a current PyTorch)"
        raise UserError(message)


def resolve(platform: str = "", track: str = "", budget: float = TIME_BUDGET) -> Setting:
    """Return the setting that the options of a command mean. Empty: this machine's platform, its own track.

    Raises:
        UserError: a name is unknown, or no platform fits this machine.
    """
    chosen, why = choose_platform(platform)
    learned = load_track(track or chosen.track)
    facts = facts_for(chosen)
    sized = with_start(chosen, learned, facts)
    return Setting(sized, why, learned, facts, scored_tokens(chosen, learned), budget)
