"""The compiled code of earlier runs: found again, and bounded."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launcher import compiled, device
from launcher.compiled import environment, folder, remove_since, trim
from launcher.processes import remove_tree


def fill(house, monkeypatch, names):
    """Write a file of a KiB for each name, used in that order."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(house / "cache"))
    for age, name in enumerate(reversed(names)):
        path = folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1024)
        os.utime(path, (1e9 - age, 1e9 - age))


def left():
    return sorted(path.name for path in folder().rglob("*") if path.is_file())


def test_what_was_used_longest_ago_goes_first(house, monkeypatch):
    fill(house, monkeypatch, ["fx/a", "fy/b", "triton/0/c", "d"])
    assert trim(most=4096, rest=2048) == 0 and left() == ["a", "b", "c", "d"]
    assert trim(most=4095, rest=2048) == 2048 and left() == ["c", "d"]


def test_a_folder_goes_whole_and_by_its_newest_file(house, monkeypatch):
    """Triton takes a kernel of which a part is missing for one that is there."""
    fill(house, monkeypatch, ["triton/0/cubin", "triton/1/cubin", "triton/1/json", "triton/0/json"])
    assert trim(most=1, rest=2048) == 2048
    assert sorted(path.parent.name for path in folder().rglob("*") if path.is_file()) == ["0", "0"]


def test_a_cache_that_is_not_there_does_no_harm(house, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(house / "cache"))
    assert trim(most=0, rest=0) == 0


def test_a_trainer_is_told_where_unless_its_user_did(house, monkeypatch):
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    assert environment()[compiled.VARIABLE] == str(folder())
    monkeypatch.setenv(compiled.VARIABLE, "/mine")
    monkeypatch.setattr(compiled, "cores_if_some", list)
    assert environment()[compiled.VARIABLE] == "/mine" == str(folder())
    monkeypatch.setattr(compiled, "cores_if_some", lambda: [0, 2])
    assert str(folder()) == "/mine-cpu0-2"


def test_every_library_keeps_its_kernels_below_the_place(tmp_path):
    """In the home folder or the temporary one a boxed process cannot write, or what it wrote is soon gone."""
    places = environment(tmp_path)
    assert len(places) == 6 and all(path.startswith(str(tmp_path)) for path in places.values())
    assert len(set(places.values())) == 6


def test_kernels_of_earlier_runs_are_copied_not_linked(house, monkeypatch, tmp_path):
    fill(house, monkeypatch, ["kernels/quack/a", "fx/b"])
    compiled.copy_kernels(tmp_path / "own")
    copies = [path for path in (tmp_path / "own").rglob("*") if path.is_file()]
    assert [str(path.relative_to(tmp_path)) for path in copies] == ["own/kernels/quack/a"]
    assert copies[0].stat().st_nlink == 1 and copies[0].read_bytes() == b"x" * 1024


def test_a_copy_of_tritons_kernels_names_its_own_files(house, monkeypatch, tmp_path):
    """A process that may not read the place of all runs else finds a kernel that it cannot load."""
    cache = pytest.importorskip("triton.runtime.cache")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(house / "cache"))
    places = []
    for place in (folder(), tmp_path / "own"):
        monkeypatch.setenv("TRITON_CACHE_DIR", f"{environment(place)['TRITON_HOME']}/.triton/cache")
        if places:
            compiled.copy_kernels(place)
            remove_tree(folder())
        else:
            made = cache.FileCacheManager("AB" * 16)
            file = made.put("{}", "gated.json", binary=False)
            made.put_group("gated.json", {"gated.json": file})
        places.append(cache.FileCacheManager("AB" * 16).get_group("gated.json"))
    first, second = places
    assert first["gated.json"].startswith(str(house)) and Path(second["gated.json"]).read_text() == "{}"
    assert second["gated.json"].startswith(str(tmp_path / "own"))


def test_a_process_with_a_place_of_its_own_is_led_there(house, monkeypatch, tmp_path):
    """The second process that scores may not write where all runs do."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    own = tmp_path / "own"
    own.mkdir()
    compiled.link_from(tmp_path, "box", own)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert os.path.realpath(default_cache_dir()) == os.path.realpath(own)


def test_without_kernels_there_is_nothing_to_copy(house, monkeypatch, tmp_path):
    fill(house, monkeypatch, [])
    compiled.copy_kernels(tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("user", ["ann", "DOMAIN\\\\bob"])
def test_a_precompiled_header_outlives_the_run_that_made_it(house, monkeypatch, user):
    """PyTorch puts it below the folder for temporary files, which is the run's own."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("LOGNAME", user)
    for run in ("a", "b"):
        temporary = house / run
        temporary.mkdir()
        compiled.link_from(temporary, "box")
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        folder().mkdir(parents=True, exist_ok=True)
        assert os.path.realpath(default_cache_dir()) == os.path.realpath(folder())
        Path(default_cache_dir(), "header").touch()
        remove_tree(temporary)
        assert (folder() / "header").exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="MLX compiles for a CPU with g++")
def test_what_mlx_compiles_for_a_cpu_outlives_the_run(house):
    """A process of a run finds what the one of an earlier run left that did the same work, and no other."""
    code = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + mx.sin(x))(mx.ones(3)))
"""
    made = []
    for run, process in (("a", "box"), ("b", "box"), ("b", "first")):
        temporary = house / run / process
        temporary.mkdir(parents=True)
        compiled.link_from(temporary, process)
        environment = {**os.environ, "TMPDIR": str(temporary)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        remove_tree(temporary)
        kernels = folder().glob(f"mlx/{process}/**/*.so")
        made.append([(kernel.name, kernel.stat().st_mtime_ns) for kernel in kernels])
    first_run, second_run, other = made
    assert first_run and second_run == first_run
    assert [name for name, _ in other] == [name for name, _ in first_run] and other != first_run


def test_what_was_written_after_a_moment_is_forgotten(house, monkeypatch):
    """A run that has seen training rows leaves nothing here: no file, no name of a folder, no time of one."""
    fill(house, monkeypatch, ["fx/a", "fy/b", "fz/c", "triton/0/cubin", "triton/1/cubin"])
    time.sleep(0.05)
    moment = time.time()
    time.sleep(0.05)
    (folder() / "fx" / "weights").write_bytes(b"learned")  # beside another file
    (folder() / "a-name-that-says-much").mkdir()
    (folder() / "fz").rename(folder() / "learned")
    (folder() / "triton" / "2").mkdir()
    (folder() / "triton" / "2" / "cubin").write_bytes(b"learned")
    os.utime(folder() / "triton" / "1" / "cubin", (1, 123456789))
    (folder() / "link").symlink_to("learned-text")
    assert remove_since(moment) > 0
    rest = sorted(str(path.relative_to(folder())) for path in folder().rglob("*"))
    assert rest == ["fy", "fy/b", "triton", "triton/0", "triton/0/cubin"]


def test_runs_on_two_devices_have_two_folders(house, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(device, "usable_cores", lambda: [0, 1])
    both = compiled.folder()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa/b")
    one = compiled.folder()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    other = compiled.folder()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(device, "usable_cores", lambda: [0, 2])
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    part = compiled.folder()
    assert len({both, one, other, part}) == 4
    assert one.name.endswith("-GPU-aa-b") and part.name == "compiled-cpu0-2"
