"""A setting is resolved once, from what the user typed."""

import os

import pytest

from backends.platforms import Facts, cpu_facts, current_entries
from launcher.run import Request, run_experiment
from launcher.setting import resolve
from night.trial import try_edit
from prepare import RULES, TIME_BUDGET, UserError


def test_defaults_are_the_machines_platform_and_its_track(house):
    setting = resolve()
    assert (setting.platform.name, setting.track.name, setting.budget) == ("cpu", "tiny", TIME_BUDGET)
    assert not setting.short and setting.trainer.name == "train_cuda.py" and setting.val_tokens == 16384


def test_the_board_is_what_its_runs_are_ranked_by(house):
    setting = resolve("mlx-cpu", budget=10.0)
    board = setting.board
    assert board.track == "tiny" and board.rules == RULES and board.budget == 10.0 and setting.short
    assert board.platform == "mlx-cpu" and board.device == setting.facts.device
    assert board.fingerprint == setting.data.fingerprint and board.val_tokens == setting.val_tokens


def test_the_trainer_is_told_the_same(house, monkeypatch):
    """By names where these can be looked up, in a box in full."""
    entries = resolve("cpu").platform, resolve("cpu").track
    told = resolve("cpu", budget=10.0).run_settings(seed=3)
    assert (told.platform, told.track, told.seed, told.budget) == ("cpu", "tiny", 3, 10.0)
    assert told.entries == ""
    boxed = resolve("cpu", budget=10.0).boxed_settings(3, "a")
    assert (boxed.platform, boxed.seed, boxed.run_id) == ("cpu", 3, "a")
    monkeypatch.setenv("AUTORESEARCH_CONFIG", "/nowhere")
    for name, value in boxed.to_env().items():
        monkeypatch.setenv(name, value)
    assert current_entries() == entries


@pytest.mark.parametrize(
    "names, says",
    [({"platform": "abacus"}, "unknown platform 'abacus'"), ({"track": "x"}, "unknown track 'x'")],
)
def test_an_unknown_name_lists_the_known_ones(house, names, says):
    with pytest.raises(UserError, match=says) as error:
        resolve(**names)
    assert error.value.code == 2 and ("cpu" in str(error.value) or "tiny" in str(error.value))


def test_a_platform_that_this_machine_is_not_is_a_mistake_before_anything_is_prepared(monkeypatch):
    """With the real platforms.yaml: nothing is downloaded, and no row is written."""
    for name in [name for name in os.environ if name.startswith("AUTORESEARCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("launcher.setting.prepare_track", lambda track: pytest.fail("prepared a track"))
    monkeypatch.setattr("launcher.setting.facts_for", lambda platform: cpu_facts())
    for name, framework in (("h100", "torch"), ("apple-max", "mlx")):
        request = Request(resolve(name))
        for begin in (run_experiment, try_edit):
            with pytest.raises(
                UserError, match=f"needs a GPU for {framework}.*leave --platform out"
            ) as error:
                begin(request)
            assert error.value.code == 2


def test_mlx_on_an_nvidia_gpu_needs_its_build_for_cuda(monkeypatch):
    facts = Facts("torch", "gpu", "NVIDIA H100 80GB HBM3", 80.0, details={"compute_capability": "9.0"})
    monkeypatch.setattr("launcher.setting.facts_for", lambda platform: facts)
    monkeypatch.setattr("launcher.setting.installed_version", lambda name: "missing")
    with pytest.raises(UserError, match=r"needs MLX's CUDA build: uv pip install 'mlx\[cuda13\]'") as error:
        resolve("mlx-cuda").require_device()
    assert error.value.code == 2
    monkeypatch.setattr("launcher.setting.installed_version", lambda name: "0.32.4")
    resolve("mlx-cuda").require_device()
    with pytest.raises(UserError, match="apple-max needs a GPU for mlx, and this machine has NVIDIA H100"):
        resolve("apple-max").require_device()
