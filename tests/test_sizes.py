"""The size that a machine starts with: from its measured speed, for what it can compute in one run."""

import importlib
import json
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from backends import dtype, sizes
from backends.dtype import LAYER_ROWS, LayerTimes, times_path
from backends.platforms import (
    Facts,
    apple_facts,
    current_entries,
    load_platforms,
    nvidia_facts,
)
from backends.sizes import LADDER, Rung, choose_start, nearest, sizes_of
from launcher.setting import resolve
from prepare import TIME_BUDGET, UserError, load_track
from tests.conftest import CONFIG, ROOT

YAML = ROOT / "platforms.yaml"
CPU = Facts("torch", "cpu", "a CPU of these tests, 2 cores", 16.0, bf16=True, cores=2)
GENERAL = ["cuda-40gb", "cuda-16gb", "cuda-small", "apple", "cpu"]


@pytest.fixture
def real(house, monkeypatch):
    """The platforms of the repository, in a house of its own."""
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(YAML))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(house / "cache"))
    load_platforms.cache_clear()
    return load_platforms()


@pytest.fixture
def speed(monkeypatch):
    """What the machine computes, in GFLOP/s of a layer, and how often that was measured."""

    class Speed:
        gflops = 480.0
        measured = 0

        def output(self, platform, bf16):
            self.measured += 1
            width = dtype.width_of(platform)
            flops = 6 * LAYER_ROWS[platform.device_kind] * 12 * width**2
            milliseconds = flops / self.gflops / 1e6
            times = LayerTimes(3 * milliseconds, 1.0, 0.7 * milliseconds, 0.3 * milliseconds)
            if not bf16:
                times = LayerTimes(0.7 * milliseconds, 0.3 * milliseconds)
            return json.dumps(asdict(times))

    speed = Speed()
    monkeypatch.setattr(dtype, "output_of_measurement", speed.output)
    return speed


def started(platform, track, facts=CPU):
    """Return the size, of a machine that was never measured."""
    times_path(platform, facts).unlink(missing_ok=True)
    return choose_start(platform, track, facts).start


def pysource():
    return load_track("pysource")


def test_the_general_entries_are_measured_and_no_specific_one(real):
    assert [name for name, platform in real.items() if platform.measured] == GENERAL


def test_more_compute_is_never_a_smaller_model(real, speed):
    before = (0, 0, 0)
    for exponent in range(0, 80):
        speed.gflops = 2 * 1.3**exponent
        start = started(real["cpu"], pysource(), replace(CPU, memory_gb=4096.0))
        now = (start.n_layer, start.n_embd, start.total_batch_size)
        assert all(new >= old for new, old in zip(now, before, strict=True))
        before = now
    assert now == (LADDER[-1].n_layer, LADDER[-1].n_embd, LADDER[-1].batch)


def test_every_rung_computes_more_than_the_one_before():
    for small, large in pairwise(LADDER):
        assert large.tflop >= 2 * small.tflop
        assert large.n_layer * large.n_embd**2 >= small.n_layer * small.n_embd**2
        assert large.batch >= small.batch


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: f"{rung.tflop:g}")
def test_a_machine_that_is_a_tenth_faster_starts_with_the_same(real, speed, rung):
    """But at the border between two rungs, which are a factor of two apart or more."""
    sizes_seen = set()
    for jitter in (0.91, 0.95, 1.0, 1.05, 1.1):
        speed.gflops = jitter * 1e3 * rung.tflop / TIME_BUDGET
        sizes_seen.add(started(real["cpu"], pysource()))
    assert len(sizes_seen) == 1


def test_the_first_measurement_is_kept_whatever_the_machine_does_later(real, speed):
    first = choose_start(real["cpu"], pysource(), CPU)
    speed.gflops /= 8
    assert choose_start(real["cpu"], pysource(), CPU) == first and speed.measured == 1
    another = replace(CPU, device="another, 2 cores")
    assert choose_start(real["cpu"], pysource(), another).start != first.start and speed.measured == 2


@pytest.mark.parametrize("bf16", [True, False])
def test_the_compute_is_that_of_the_dtype_of_a_run(real, speed, bf16):
    """Without instructions for bfloat16 it is not even measured: one product takes a second."""
    sized = choose_start(real["cpu"], pysource(), replace(CPU, bf16=bf16))
    assert f"480 GFLOP/s in {'bfloat16' if bf16 else 'float32'} times 300 s are 144 TFLOP" in sized.why


def test_a_platform_may_state_the_dtype_of_its_compute(real, speed):
    """In float32 the machine of these tests has a third of the speed."""
    sized = choose_start(replace(real["cpu"], bf16=False), pysource(), CPU)
    assert "GFLOP/s in float32" in sized.why


def test_less_memory_is_fewer_rows_a_pass_and_the_same_step(real):
    before = 10**9
    for memory in (640, 80, 24, 8, 4, 1, 0.1):
        facts = replace(nvidia_facts("NVIDIA Imaginary X9, 49140, 8.6, 600.1"), memory_gb=memory)
        start = sizes_of(LADDER[-1], real["cuda-40gb"], load_track("climbmix"), facts, "bfloat16")
        held = start.device_batch_size * 2048 * start.n_layer * start.n_embd * 2 * sizes.BYTES_HELD
        assert held <= max(memory / 2 * 2**30, 2048 * 9 * 512 * 100) and start.device_batch_size <= before
        assert start.total_batch_size == LADDER[-1].batch
        before = start.device_batch_size
    assert before == 1


@pytest.mark.parametrize("memory, rows", [(48.0, 32), (16.0, 16)])
def test_a_gpu_gets_about_the_rows_that_its_memory_had_before(real, memory, rows):
    """What the entries by memory stated before they were measured: nothing else was run by anyone."""
    facts = Facts("torch", "gpu", "a GPU", memory)
    rung = Rung(1, 8 if memory > 40 else 6, 384, 131072)
    start = sizes_of(rung, real["cuda-40gb"], load_track("climbmix"), facts, "bfloat16")
    assert start.device_batch_size == rows


@pytest.mark.parametrize("seq_len", [128, 512, 600, 2048, 8192])
@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: f"{rung.tflop:g}")
def test_every_rung_fits_the_checks_of_both_trainers(real, monkeypatch, rung, seq_len):
    monkeypatch.setenv("AUTORESEARCH_PLATFORM", "mlx-cpu")
    track = replace(pysource(), seq_len=seq_len)
    for name in ("train_cuda", "train_mlx"):
        trainer = importlib.import_module(name)
        for memory in (2.0, 16.0):
            facts = replace(CPU, memory_gb=memory)
            start = sizes_of(rung, real["cpu"], track, facts, "float32")
            for key, value in asdict(start).items():
                monkeypatch.setattr(trainer, key.upper(), value)
            passes = trainer.micro_steps(seq_len)
            assert passes * start.device_batch_size * seq_len == start.total_batch_size
            assert start.n_embd % start.head_dim == 0 and start.n_embd >= 2 * start.head_dim
            assert start.eval_batch_size >= 1


@pytest.mark.parametrize(
    "chip, cores, layers, width",
    [("Apple M1", 7, 4, 256), ("Apple M5", 10, 4, 384), ("Apple M9", 0, 4, 256)],
)
def test_an_apple_chip_is_not_measured_but_computed(real, speed, chip, cores, layers, width):
    ioreg = f'"gpu-core-count" = {cores}' if cores else ""
    facts = apple_facts(f"{chip}\n{8 * 2**30}\n", ioreg)
    start = choose_start(real["apple"], load_track("climbmix"), facts).start
    assert (start.n_layer, start.n_embd) == (layers, width) and speed.measured == 0


def test_a_device_that_is_not_here_is_not_measured(real, speed):
    for name in ("cuda-40gb", "cuda-small", "apple"):
        sized = choose_start(real[name], pysource(), CPU)
        assert (sized.start.n_layer, sized.start.n_embd) == LADDER[0][1:3] and "the smallest" in sized.why
    assert speed.measured == 0


def test_a_speed_that_cannot_be_measured_is_the_smallest_size(real, monkeypatch):
    monkeypatch.setattr(dtype, "output_of_measurement", lambda platform, bf16: "")
    sized = choose_start(real["cpu"], pysource(), CPU)
    assert (sized.start.n_layer, sized.start.n_embd) == LADDER[0][1:3]
    assert "could not be measured" in sized.why and not times_path(real["cpu"], CPU).exists()
    assert nearest(0.0) == nearest(1e-9) == LADDER[0] and nearest(1e30) == LADDER[-1]


def test_all_processes_of_a_run_have_the_size_of_the_launcher(real, speed, monkeypatch):
    """A practice run has that of a real one, and a process in the box looks nothing up."""
    monkeypatch.setattr("launcher.setting.facts_for", lambda platform: CPU)
    setting = resolve("cpu")
    assert resolve("cpu", budget=10.0).platform == setting.platform and speed.measured == 1
    monkeypatch.setattr("launcher.setting.prepare_track", lambda track: Folder)
    told = setting.boxed_settings(1, "a")
    times_path(setting.platform, CPU).unlink()
    speed.gflops /= 8
    for name, value in told.to_env().items():
        monkeypatch.setenv(name, value)
    assert current_entries()[0].start == setting.platform.start and speed.measured == 1


class Folder:
    path = "/nowhere"


def test_a_trainer_alone_has_the_size_of_the_launcher(real, speed, monkeypatch):
    for module in ("launcher.setting", "backends.platforms"):
        monkeypatch.setattr(f"{module}.facts_for", lambda platform: CPU)
    monkeypatch.setenv("AUTORESEARCH_PLATFORM", "cpu")
    assert current_entries()[0] == resolve("cpu").platform


def test_a_file_with_a_stated_size_is_as_it_was(house, speed):
    setting = resolve("cpu")
    assert (setting.platform.start.n_embd, setting.platform.start.total_batch_size) == (64, 1024)
    assert not setting.platform.measured and speed.measured == 0
    assert choose_start(setting.platform, setting.track, setting.facts).why == "cpu states it"


@pytest.mark.parametrize("start", ["fast", "''", "", "3"])
def test_another_word_than_measured_is_a_mistake(tmp_path, start):
    path = tmp_path / "p.yaml"
    head, _, tail = CONFIG.partition("    start: &size")
    rest = tail.partition("  mlx-cpu:")[0].partition("}")[2]
    path.write_text(f"{head}    start: {start}\n{rest}")
    with pytest.raises(UserError, match="'start' should be a mapping"):
        load_platforms(path)


def test_the_command_prints_rate_compute_and_size(house, autoresearch, tiny_cache, monkeypatch):
    path = house / "p.yaml"
    text = CONFIG.replace(
        "start: *size",
        "start: {n_layer: 2, n_embd: 64, head_dim: 32, window_pattern: SL, "
        "short_window: 32, total_batch_size: 1024, device_batch_size: 8, eval_batch_size: 8}",
    )
    head, _, tail = text.partition("    start: &size")
    path.write_text(f"{head}    start: measured\n  mlx-cpu:{tail.partition('  mlx-cpu:')[2]}")
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(path))
    said = json.loads(autoresearch("platforms", "--json").stdout)
    assert "layers, width" in said["start"] and "GFLOP/s in float32 times 300 s are" in said["why_start"]
    assert "cpu            torch cpu  tiny         measured" in autoresearch("platforms").stdout
