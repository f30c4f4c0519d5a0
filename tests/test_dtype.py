"""Which dtype a machine computes in: stated, or measured once, with a clear margin, for all processes."""

import json
import time
from dataclasses import asdict, replace

import pytest
import torch

from backends import cuda, dtype
from backends.dtype import LayerTimes, choose_dtype, times_path
from backends.platforms import Facts, current_platform, load_platforms
from launcher.ledger import Row
from launcher.runs import run_dir
from launcher.setting import resolve
from launcher.verify import setting_of

XEON = LayerTimes(  # amx and avx512_bf16 among its flags, and yet half as fast in bfloat16
    float32_products=20.0, float32_elementwise=6.0, bfloat16_products=40.0, bfloat16_elementwise=5.0
)
EPYC = LayerTimes(
    float32_products=20.0, float32_elementwise=6.0, bfloat16_products=9.0, bfloat16_elementwise=5.0
)
WITH_BF16 = Facts("torch", "cpu", "a CPU, 2 cores", 8.0, bf16=True, cores=2)
WITHOUT = replace(WITH_BF16, bf16=False)


@pytest.fixture
def cpu(house):
    """The platform `cpu`, which does not state what it computes in."""
    return replace(load_platforms()["cpu"], bf16=None)


@pytest.fixture
def machine(monkeypatch):
    """What the measurement prints, and how often it was asked."""

    class Machine:
        prints = json.dumps(asdict(EPYC))
        asked = 0

        def output(self, platform, bf16):
            self.asked += 1
            return self.prints

    machine = Machine()
    monkeypatch.setattr(dtype, "output_of_measurement", machine.output)
    return machine


def forget(platform):
    times_path(platform, WITH_BF16).unlink(missing_ok=True)


@pytest.mark.parametrize("bf16, name", [(True, "bfloat16"), (False, "float32")])
def test_what_a_platform_states_is_not_measured(cpu, machine, bf16, name):
    choice = choose_dtype(replace(cpu, bf16=bf16), WITHOUT)
    assert choice == (name, "cpu states it") and machine.asked == 0


def test_without_instructions_for_it_nothing_is_measured(cpu, machine):
    """There bfloat16 is emulated: one product of a layer takes a second."""
    assert choose_dtype(cpu, WITHOUT).dtype == "float32" and machine.asked == 0


@pytest.mark.parametrize(
    "times, name",
    [
        (XEON, "float32"),
        (EPYC, "bfloat16"),
        (replace(EPYC, bfloat16_products=26 / 1.14 - 5), "float32"),  # faster, but not clearly
        (replace(EPYC, bfloat16_products=26 / 1.16 - 5), "bfloat16"),
        (replace(XEON, bfloat16_products=9.0, bfloat16_elementwise=40.0), "float32"),  # the whole counts
    ],
)
def test_the_flag_of_a_cpu_does_not_decide_its_speed_does(cpu, machine, times, name):
    forget(cpu)
    machine.prints = json.dumps(asdict(times))
    choice = choose_dtype(cpu, WITH_BF16)
    assert choice.dtype == name and f"{times.ratio:.2f} times as fast" in choice.why


def test_a_machine_is_measured_once_and_keeps_its_dtype(cpu, machine):
    forget(cpu)
    first = choose_dtype(cpu, WITH_BF16)
    machine.prints = json.dumps(asdict(XEON))  # the load of the machine is another one now
    assert choose_dtype(cpu, WITH_BF16) == first and machine.asked == 1
    assert choose_dtype(cpu, replace(WITH_BF16, device="another, 2 cores")).dtype == "float32"
    assert machine.asked == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"float32_products": 1}', "\0\0"])
def test_a_damaged_record_is_measured_anew(cpu, machine, damage):
    path = times_path(cpu, WITH_BF16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(damage)
    assert choose_dtype(cpu, WITH_BF16).dtype == "bfloat16" and machine.asked == 1
    assert choose_dtype(cpu, WITH_BF16).dtype == "bfloat16" and machine.asked == 1


NONSENSE = ["", "Segmentation fault", "{}", json.dumps({**asdict(EPYC), "float32_products": 0.0})]


@pytest.mark.parametrize("prints", [*NONSENSE, json.dumps({**asdict(EPYC), "bfloat16_products": "fast"})])
def test_a_measurement_that_fails_is_no_crash_and_is_not_kept(cpu, machine, prints):
    forget(cpu)
    machine.prints = prints
    assert choose_dtype(cpu, WITH_BF16) == ("float32", "the speed could not be measured")
    assert not times_path(cpu, WITH_BF16).exists()


def test_a_measurement_that_hangs_or_cannot_start_is_given_up(cpu, monkeypatch):
    dtype.output_of_measurement.cache_clear()
    monkeypatch.setattr(dtype, "MOST_SECONDS", 0.01)
    assert dtype.output_of_measurement(cpu, True) == ""
    dtype.output_of_measurement.cache_clear()
    monkeypatch.setattr(dtype.sys, "executable", "/nowhere/python")
    assert dtype.output_of_measurement(cpu, True) == ""
    dtype.output_of_measurement.cache_clear()


def test_all_processes_of_a_run_get_the_answer_of_the_launcher(cpu, machine, monkeypatch):
    """The trainer and both processes that score: none of them measures, whatever the cache says by then."""
    forget(cpu)
    setting = replace(resolve("cpu"), platform=cpu, facts=WITH_BF16)
    settings = setting.boxed_settings(1, "a")
    assert setting.bf16 and setting.platform.bf16 is None and machine.asked == 1
    forget(cpu)
    machine.prints = json.dumps(asdict(XEON))
    for name, value in settings.to_env().items():
        monkeypatch.setenv(name, value)
    assert current_platform().bf16 is True
    assert cuda.compute_dtype(current_platform()) == torch.bfloat16 and machine.asked == 1


def test_a_saved_model_is_scored_again_in_the_dtype_of_its_row(house):
    row = Row(platform="cpu", track="tiny", budget=300.0, val_tokens=16384)
    assert not setting_of(row).bf16  # the platform states float32
    row.dtype = "bfloat16"
    assert setting_of(row).bf16 and setting_of(row).board.platform == "cpu"


def test_a_saved_model_is_built_again_in_the_size_of_its_run(house):
    """The constants of its trainer are those of the machine, which may have been measured anew."""
    row = Row(run="20260101-000000-aaaa", platform="cpu", track="tiny", budget=300.0, val_tokens=16384)
    here = setting_of(row).platform.start
    record = run_dir(row.run).record
    record.parent.mkdir(parents=True)
    damaged = [None, {"n_layer": 7}, 3]
    for start, layers in [({**asdict(here), "n_layer": 7}, 7), *((one, here.n_layer) for one in damaged)]:
        record.write_text(json.dumps({"start": start}))
        assert setting_of(row).platform.start.n_layer == layers


def compute(seconds):
    """Keep this process busy."""
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_time_in_which_a_cpu_waits_does_not_count(monkeypatch):
    """Beside another load a product can take a hundred times as long by the clock."""
    monkeypatch.setattr(cuda, "MEASURE_SECONDS", 0.02)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def layer_work(device, kind, rows, width):
        def work():
            compute(0.002)
            time.sleep(0.02)

        return {"products": [work], "elementwise": [work]}

    monkeypatch.setattr(cuda, "layer_work", layer_work)
    assert 2 <= cuda.layer_times("cpu", 64, ["float32"]).float32_products < 6


def test_the_times_are_the_best_of_each_kind(monkeypatch):
    """A slow call in between, as on a machine that does other things, changes nothing."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    seconds = {torch.float32: 0.002, torch.bfloat16: 0.004}
    monkeypatch.setattr(cuda, "MEASURE_SECONDS", 0.1)
    calls = []

    def layer_work(device, kind, rows, width):
        def work():
            calls.append(kind)
            compute(seconds[kind] + (0.03 if len(calls) % 5 == 0 else 0))

        return {"products": [work], "elementwise": [work]}

    monkeypatch.setattr(cuda, "layer_work", layer_work)
    times = cuda.layer_times("cpu", 64, ["float32", "bfloat16"])
    assert times.ratio == pytest.approx(0.5, rel=0.2) and times.float32_products < 4


def test_the_work_is_that_of_a_layer(monkeypatch):
    """It runs at all, in either dtype."""
    for kind in (torch.float32, torch.bfloat16):
        for parts in cuda.layer_work(torch.device("cpu"), kind, 8, 16).values():
            for work in parts:
                work()


def test_bfloat16_is_not_timed_where_it_is_emulated(cpu, monkeypatch):
    """The times are measured all the same where the size of the model follows from them."""
    commands = []
    monkeypatch.setattr(dtype.subprocess, "run", lambda command, **more: commands.append(command) or Done())
    dtype.output_of_measurement.cache_clear()
    measured = replace(cpu, measured=True)
    times_path(measured, WITHOUT).unlink(missing_ok=True)
    assert dtype.layer_rate(measured, WITHOUT, "float32") == pytest.approx(1359 / 4, rel=0.01)
    assert dtype.layer_rate(measured, WITHOUT, "bfloat16") == 0.0
    dtype.output_of_measurement.cache_clear()
    assert [command[3:] for command in commands] == [["cpu", "192", "float32"]]


class Done:
    stdout = json.dumps(asdict(LayerTimes(float32_products=3.0, float32_elementwise=1.0)))
