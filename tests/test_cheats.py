"""Every trainer in tests/cheats/ is caught, by name; the honest ones pass."""

import ast
import shutil
from pathlib import Path

import pytest

from launcher.ledger import Ledger
from launcher.processes import processes_of

CHEATS = sorted((Path(__file__).parent / "cheats").glob("*.py"))


def expected(path):
    """The EXPECT of a cheat, read without running it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "EXPECT":
            return ast.literal_eval(node.value)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHEATS, ids=lambda p: p.stem)
def test_is_caught(path, autoresearch, house, tiny_cache, monkeypatch):
    status, says = expected(path)
    copy = house / "tiny"  # some of them write there
    copy.mkdir()
    shutil.copy(tiny_cache / "platforms.yaml", copy / "platforms.yaml")
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(copy / "platforms.yaml"))
    if "tokenizer" in path.stem and (tiny_cache / "cache").exists():
        monkeypatch.setenv("AUTORESEARCH_CACHE", str(copy / "cache"))
    done = autoresearch("run", "--budget", "2", "--platform", "cpu", "--trainer", path)
    [row] = Ledger(house / "results.tsv").rows()
    said = f"{row.status}: {row.reason}\n{done.stdout}{done.stderr}"
    assert (row.status, says in row.reason) == (status, True), said
    assert f"status: {status}" in done.stdout and says in done.stdout
    assert done.returncode == {"crash": 1, "timeout": 4, "invalid": 5}[status]
    assert row.val_bpb == 0 and not row.ranked
    assert processes_of(row.run) == []


def test_there_are_at_least_ten():
    assert len(CHEATS) >= 10 and all(expected(p) for p in CHEATS)
