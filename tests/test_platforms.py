"""Which platform a machine is, from recorded facts of machines that we do not have."""

import json
from types import SimpleNamespace

import pytest

from backends import platforms as machine
from backends.platforms import (
    amd_facts,
    apple_facts,
    cpu_facts,
    current_entries,
    load_platforms,
    match_platform,
    nvidia_facts,
    peak_tflops,
    read_mac_state,
    scored_tokens,
)
from prepare import UserError, load_tracks

IOREG = """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X>
    {{
      "gpu-core-count" = {}
      "IOClass" = "AGX"
    }}
"""
NVIDIA = {
    "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.159.04": ("h100", 989.5, True),
    "NVIDIA H100 PCIe, 81559, 9.0, 550.54": ("h100-pcie", 756, True),
    "NVIDIA H200, 143771, 9.0, 580.159.03": ("h100", 989.5, True),
    "NVIDIA A100-SXM4-80GB, 81920, 8.0, 535.104.05": ("a100", 312, True),
    "NVIDIA GeForce RTX 4090, 24564, 8.9, 560.35": ("rtx-4090", 165.2, True),
    "Tesla T4, 15360, 7.5, 535.104.05": ("t4", 8.1, False),
    "NVIDIA Imaginary X9, 49140, 8.6, 600.1": ("cuda-40gb", 0, True),
    "NVIDIA RTX A4000, 16376, 8.6, 535.1": ("cuda-16gb", 0, True),
    "Quadro P2000, 5120, 6.1, 470.1": ("cuda-small", 0, False),
}
APPLE = {
    ("Apple M1", 8, 16): ("apple", 2.6),
    ("Apple M3 Pro", 18, 36): ("apple-pro", 6.4),
    ("Apple M4 Max", 40, 128): ("apple-max", 16.2),
    ("Apple M2 Ultra", 76, 192): ("apple-ultra", 27.2),
    ("Apple M5", 10, 16): ("apple", 17.9),
}


@pytest.fixture
def platforms(monkeypatch):
    monkeypatch.delenv("AUTORESEARCH_CONFIG", raising=False)
    load_platforms.cache_clear()
    yield load_platforms()
    load_platforms.cache_clear()


@pytest.mark.parametrize("csv", NVIDIA)
def test_nvidia(platforms, csv):
    facts = nvidia_facts(csv + "\n")
    name, peak, bf16 = NVIDIA[csv]
    platform, why = match_platform(facts, platforms)
    assert platform.name == name and facts.bf16 == bf16 and peak_tflops(platform, facts) == peak
    assert "torch on gpu" in why


@pytest.mark.parametrize("chip, cores, memory", APPLE)
def test_apple(platforms, chip, cores, memory):
    facts = apple_facts(f"{chip}\n{memory * 2**30}\n", IOREG.format(cores))
    platform, _ = match_platform(facts, platforms)
    name, tflops = APPLE[chip, cores, memory]
    assert platform.name == name and platform.trainer == "train_mlx.py"
    assert facts.memory_gb == memory and facts.cores == cores
    assert peak_tflops(platform, facts) == pytest.approx(tflops, rel=0.02)


def rocm_smi(series, memory, gfx="", **more):
    """What `rocm-smi --showproductname --showmeminfo vram --json` says of a GPU."""
    return {
        "VRAM Total Memory (B)": str(memory),
        "VRAM Total Used Memory (B)": "27856896",
        "Card Series": series,
        "Card Model": "0x744c",
        "Card Vendor": "Advanced Micro Devices, Inc. [AMD/ATI]",
        "Card SKU": "D70401XT",
        "Node ID": "1",
        "GFX Version": gfx,
        **more,
    }


RX_7900 = rocm_smi("Radeon RX 7900 XT", 21458059264, "gfx1100")
OLDER = {"Card series": "Radeon RX 6800 XT", "VRAM Total Memory (B)": "17163091968"}
IN_CAR = rocm_smi("AMD Radeon 8060S Graphics", 536870912, "gfx1151")
MI300X = {
    "gpu": 0,
    "asic": {"market_name": "AMD Instinct MI300X", "target_graphics_version": "gfx942"},
    "vram": {"type": "HBM3", "vendor": "HYNIX", "size": {"value": 196592, "unit": "MB"}},
}
UNNAMED = rocm_smi("N/A", 0, "gfx1103", **{"VRAM Total Memory (B)": "N/A"})
AMD = [
    ({"card0": RX_7900}, 0, "radeon-16gb", 20.0, True),
    ({"card0": OLDER}, 0, "radeon", 16.0, False),  # it has 16 GB, but no bfloat16
    ({"card1": RX_7900, "card0": IN_CAR, "system": {"Driver version": "6"}}, 0, "radeon", 0.5, True),
    ({"card1": RX_7900, "card0": IN_CAR}, 1, "radeon-16gb", 20.0, True),
    ({"card10": RX_7900, "card2": IN_CAR}, 1, "radeon-16gb", 20.0, True),
    ({"card0": RX_7900}, 7, "radeon-16gb", 20.0, True),  # there is no such GPU: PyTorch will say so
    ([MI300X], 0, "mi300x", 192.0, True),
    ({"gpu_data": [MI300X]}, 0, "mi300x", 192.0, True),
    (
        {"card0": rocm_smi("AMD INSTINCT MI250 (MCM) OAM AC MBA", 68702699520, "gfx90a")},
        0,
        "instinct",
        64.0,
        True,
    ),
    ({"card0": UNNAMED}, 0, "radeon", 0.0, True),
]


@pytest.mark.parametrize("said, number, name, memory, bf16", AMD)
def test_amd(platforms, said, number, name, memory, bf16):
    warning = "WARNING: AMD GPU device(s) is/are in a low-power state. Check power control/runtime_status\n\n"
    for text in (json.dumps(said), warning + json.dumps(said) + "\n"):
        facts = amd_facts(text, number)
        platform, _ = match_platform(facts, platforms)
        assert (platform.name, facts.memory_gb, facts.bf16) == (name, memory, bf16)
        assert platform.trainer == "train_cuda.py"


NONSENSE = ["", "ERROR:root:Driver not initialized", "{", "[1, 2]", "null", "{}", '{"card0": 3}', "[" * 10**5]
NONSENSE += [
    '{"gpu_data": 3}',
    '{"cardx": {}}',
    '{"card0": {"size": {"value": [1e999]}}}',
    '[{"asic": [], "vram": 7}]',
]


@pytest.mark.parametrize("said", NONSENSE)
def test_a_tool_that_prints_nonsense_is_no_traceback(platforms, said):
    for number in (0, 3):
        facts = amd_facts(said, number)
        assert facts is None or (facts.device == "AMD GPU" and facts.memory_gb == 0)


@pytest.fixture
def amd_machine(monkeypatch):
    """A machine whose only tool is rocm-smi."""
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    said = json.dumps({"card0": IN_CAR, "card1": RX_7900})
    monkeypatch.setattr(machine, "output_of", lambda *command: said if command[0] == "rocm-smi" else "")
    machine.machine_facts.cache_clear()
    yield
    machine.machine_facts.cache_clear()


def test_an_amd_gpu_is_used_where_pytorch_is_built_for_it(amd_machine, platforms, monkeypatch):
    monkeypatch.setattr(machine, "hip_version", lambda: "6.4.43482")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert machine.machine_facts().device == "Radeon RX 7900 XT"


def test_a_build_for_cuda_leaves_an_amd_gpu_alone_and_says_so(amd_machine, platforms):
    facts = machine.machine_facts()
    assert machine.hip_version() == ""  # that of the tests
    assert facts.device_kind == "cpu" and match_platform(facts, platforms)[0].name == "cpu"
    assert facts.details == {"unused_gpu": "AMD Radeon 8060S Graphics: PyTorch is not built for ROCm"}


@pytest.mark.parametrize(
    "line, version",
    [
        ("hip: Optional[str] = '6.4.43482-0f2d60242'", "6.4.43482-0f2d60242"),
        ('hip = "7.0"', "7.0"),
        ("hip: Optional[str] = None", ""),
        ("hiphop = '1'", ""),
        ("", ""),
    ],
)
def test_what_pytorch_is_built_for_is_read_from_its_version(tmp_path, monkeypatch, line, version):
    (tmp_path / "version.py").write_text(f"debug = False\n{line}\ncuda: Optional[str] = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec)
    assert machine.hip_version() == version
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert machine.hip_version() == ""


def test_neither_gpu_nor_mac(platforms):
    assert nvidia_facts("") is None and apple_facts("Intel(R) Core(TM) i9\n16\n", "") is None
    facts = cpu_facts()
    assert facts.cores >= 1 and facts.memory_gb > 0
    assert match_platform(facts, platforms)[0].name == "cpu"


def test_a_machine_that_nothing_matches(platforms):
    only = {"h100": platforms["h100"]}
    with pytest.raises(UserError, match="no platform matches torch on gpu 'Tesla T4'"):
        match_platform(nvidia_facts("Tesla T4, 15360, 7.5, 535"), only)


def test_state_of_a_laptop():
    plugged = read_mac_state(
        "Now drawing from 'AC Power'\n",
        " lowpowermode         0\n",
        "Note: No thermal warning level has been recorded\n",
    )
    assert (
        not plugged["on_battery"] and not plugged["low_power_mode"] and plugged["thermal_speed_limit"] == 100
    )
    hot = read_mac_state(
        "Now drawing from 'Battery Power'\n", " lowpowermode         1\n", "CPU_Speed_Limit \t= 70\n"
    )
    assert hot["on_battery"] and hot["low_power_mode"] and hot["thermal_speed_limit"] == 70


GOOD = """tracks:
  a: {packages: [mpmath], vocab_size: 512, seq_len: 8, val_tokens: 64}
platforms:
  cpu:
    framework: torch
    device_kind: cpu
    trainer: train_cuda.py
    track: a
    start: {n_layer: 2, n_embd: 64, head_dim: 32, window_pattern: SL, short_window: 32,
            total_batch_size: 64, device_batch_size: 8, eval_batch_size: 8}
"""


@pytest.mark.parametrize(
    "old, new, line, says",
    [
        ("track: a", "track: b", 8, "no track 'b'"),
        ("train_cuda.py", "train_tpu.py", 7, "no trainer train_tpu.py"),
        ("framework: torch", "framework: jax", 5, "'torch' or 'mlx'"),
        ("framework: torch", "backend: tpu", 5, "unknown key 'backend'"),
        ("n_layer: 2", "n_layers: 2", 9, "unknown key 'n_layers'"),
        ("n_layer: 2", "n_layer: two", 9, "should be int"),
        ("n_layer: 2, ", "", 9, "n_layer"),
        ("eval_batch_size: 8", "eval_batch_size: 8.5", 10, "should be int"),
        ("n_layer: 2", "n_layer: 2, bigram_rows: 48", 9, "bigram_rows 48 is neither 0 nor a power of two"),
        ("n_layer: 2", "n_layer: 2, bigram_rows: -64", 9, "bigram_rows -64 is neither"),
        ("    track: a", "    track: a\n    match: '('", 9, "not a regular expression"),
        ("    track: a", "    track: a\n    colour: red", 9, "unknown key 'colour'"),
        ("    track: a\n", "", 4, "missing track"),
        ("    track: a", "    track: a\n    track: a", 9, "stands twice"),
        ("    track: a", "    track: a\n    peak_bf16_tflops: .inf", 9, "peak_bf16_tflops"),
        ("    track: a", "    track: [a", 9, "not valid YAML"),
    ],
)
def test_a_wrong_file_names_its_line(tmp_path, old, new, line, says):
    path = tmp_path / "p.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as error:
        load_platforms(path)
    assert says in str(error.value) and f"p.yaml:{line}:" in str(error.value) and error.value.code == 2


def test_bigram_tables_are_where_their_rows_are_stated(tmp_path, platforms):
    path = tmp_path / "p.yaml"
    path.write_text(GOOD)
    assert load_platforms(path)["cpu"].start.bigram_rows == 0
    path = tmp_path / "q.yaml"
    path.write_text(GOOD.replace("n_layer: 2", "n_layer: 2, bigram_rows: 64"))
    assert load_platforms(path)["cpu"].start.bigram_rows == 64
    with_tables = [name for name, platform in platforms.items() if platform.start.bigram_rows]
    assert with_tables == ["h100", "h100-pcie", "b200", "h100-max"]


def test_a_gpu_that_states_no_memory_is_no_traceback():
    facts = nvidia_facts("NVIDIA GB10, [N/A], 12.1, 580.95.05\n")
    assert facts.memory_gb == 0 and facts.bf16


@pytest.mark.parametrize("entries", ["x", "[]", "{}", '{"platform": 1, "track": 2}', "[" * 100_000])
def test_entries_that_no_launcher_wrote_are_a_line(monkeypatch, entries):
    monkeypatch.setenv("AUTORESEARCH_ENTRIES", entries)
    with pytest.raises(UserError, match="AUTORESEARCH_ENTRIES holds no entries"):
        current_entries()


def test_the_command_names_the_machine(autoresearch):
    done = autoresearch("platforms")
    assert done.returncode == 0 and "platform: cpu" in done.stdout and "why: " in done.stdout
    wrong = autoresearch("run", "--platform", "abacus")
    assert (
        wrong.returncode == 2
        and "unknown platform 'abacus'" in wrong.stderr
        and "Traceback" not in wrong.stderr
    )


def test_a_file_of_version_0_1_is_still_read(tmp_path):
    """It says `backend` where today's says framework and device_kind."""
    path = tmp_path / "p.yaml"
    for backend, facts in {
        "torch-cpu": ("torch", "cpu"),
        "cuda": ("torch", "gpu"),
        "mlx": ("mlx", "gpu"),
        "mlx-cpu": ("mlx", "cpu"),
    }.items():
        path.write_text(
            GOOD.replace("    framework: torch\n    device_kind: cpu\n", f"    backend: {backend}\n")
        )
        load_platforms.cache_clear()
        platform = load_platforms(path)["cpu"]
        assert (platform.framework, platform.device_kind) == facts


def test_whole_rows_are_scored(tmp_path):
    path = tmp_path / "p.yaml"
    for wanted, scored in ((0, 64), (1, 8), (8, 8), (9, 16), (64, 64)):
        path.write_text(GOOD.replace("    track: a\n", f"    track: a\n    val_tokens: {wanted}\n"))
        load_platforms.cache_clear()
        platform = load_platforms(path)["cpu"]
        assert scored_tokens(platform, load_tracks(path)["a"]) == scored
