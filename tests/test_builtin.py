"""The search in the place of an agent: it edits constants, learns from the ledger, and never repeats."""

import json
import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import conftest
import pytest
from conftest import ROOT, edit

from backends.platforms import load_platforms
from launcher.harness import source_hash
from launcher.ledger import STATUSES, Flag, Ledger, Row
from launcher.runs import home
from launcher.setting import resolve
from night import builtin, repo
from night.agents import parse_agent
from night.builtin import History, plain, propose, read_constants, read_history, searched_constants
from night.loop import run_night
from night.plan import Night
from prepare import UserError

TRAINERS = ("train_cuda.py", "train_mlx.py")


@pytest.fixture
def setting(house):
    return resolve()


def values_of(source, setting):
    return {name: c.value for name, c in read_constants(source, setting.platform.start).items()}


def record(setting, source, score, number=0, copy=True, **more):
    """Add a run to the ledger, and its copy of the trainer."""
    run = f"20260101-000000-{number:04x}"
    board = setting.board._asdict()
    del board["boxed"]  # a flag of the row
    values = {"run": run, "val_bpb": score or 0.0, "source": source_hash(source), **board}
    row = Row(**{**values, "status": "discard" if score else "crash", **more})
    Ledger(home() / "results.tsv").append(row)
    if copy:
        folder = home() / "runs" / run
        folder.mkdir(parents=True)
        (folder / "train_cuda.py").write_bytes(source)
        (folder / "run.json").write_text(json.dumps({"trainer": "train_cuda.py"}))
    return row


def history_of(setting):
    return read_history(Ledger(home() / "results.tsv").rows(), setting)


# --- The constants ------------------------------------------------------------------------------------------


def test_constants_are_read_where_they_stand(setting):
    source = (
        '"""A line of a string\nclass of its own\n"""\nMATRIX_LR = 0.04  # é Muon\nROPE_BASE = 200_000\n'
        "ADAM_BETAS = (0.8, 0.95)\nSCALAR_LR: float = (\n    0.5\n)\nN_LAYER = START.n_layer\n"
        "COMPILE = True\nSEED = -1\nEXPRESSION = 2 * 3\nPATTERN = START.window_pattern\nx = 3\nA = B = 4\n"
        "def f():\n    WEIGHT_DECAY = 1.0\n"
    ).encode()
    assert values_of(source, setting) == {
        "MATRIX_LR": 0.04,
        "ROPE_BASE": 200_000,
        "ADAM_BETAS[0]": 0.8,
        "ADAM_BETAS[1]": 0.95,
        "SCALAR_LR": 0.5,
        "N_LAYER": 2,
    }
    new = {"ADAM_BETAS[1]": 0.9, "ADAM_BETAS[0]": 0.75, "N_LAYER": 3, "SCALAR_LR": 0.6}
    edited = builtin.replace_constants(source, read_constants(source, setting.platform.start), new)
    expected = source.replace(b"(0.8, 0.95)", b"(0.75, 0.9)").replace(b"    0.5", b"    0.6")
    assert edited == expected.replace(b"START.n_layer", b"3")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_edit_of_the_real_trainers_changes_its_constants_and_no_other_byte(setting, trainer, newline):
    source = (ROOT / trainer).read_bytes().replace(b"\n", newline)
    start = setting.platform.start
    for seed in range(20):
        proposal = propose(source, History([], set()), setting, seed)
        changes = dict(part.split(" ", 1) for part in proposal.description.split(", "))
        before, after = values_of(source, setting), values_of(proposal.source, setting)
        assert {name for name in before if before[name] != after[name]} == changes.keys()
        for name, change in changes.items():
            assert change == f"{plain(before[name])} -> {plain(after[name])}"
        assert builtin.replace_constants(proposal.source, read_constants(proposal.source, start), before) == (
            builtin.replace_constants(source, read_constants(source, start), before)
        )
        compile(proposal.source, trainer, "exec")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_all_that_is_searched_is_in_the_trainers(trainer):
    start = load_platforms(ROOT / "platforms.yaml")["h100"].start
    values = {name: c.value for name, c in read_constants((ROOT / trainer).read_bytes(), start).items()}
    assert searched_constants(values, start, 2048).keys() == builtin.KNOBS.keys()


def test_numbers_are_written_plainly():
    rate, beta = builtin.RATE, builtin.BETA2
    assert [plain(rate.move(0.04, n)) for n in (-4, -1, 0, 1, 6)] == [
        "0.02",
        "0.0336",
        "0.04",
        "0.0476",
        "0.113",
    ]
    assert plain(builtin.KNOBS["WARMDOWN_RATIO"].move(0.3, -3)) == "0.15"
    assert [plain(beta.move(0.95, n)) for n in (-2, 0, 1, 4)] == ["0.9", "0.95", "0.965", "0.987"]
    assert plain(builtin.KNOBS["ROPE_BASE"].move(200_000, 1)) == "283000"


# --- The proposals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", load_platforms(ROOT / "platforms.yaml").values(), ids=lambda p: p.name)
def test_proposals_stay_in_range_and_divide(setting, platform):
    source = (ROOT / platform.trainer).read_bytes()
    track = replace(setting.track, seq_len=512 if platform.track != "climbmix" else 2048)
    there = replace(setting, platform=platform, track=track)
    before = {name: c.value for name, c in read_constants(source, platform.start).items()}
    changed = set()
    for seed in range(60):
        edited = propose(source, History([], set()), there, seed).source
        values = {name: c.value for name, c in read_constants(edited, platform.start).items()}
        moved = {name for name in values if values[name] != before[name]}
        changed |= moved
        assert 1 <= len(moved - {"DEVICE_BATCH_SIZE"}) <= 3
        assert values["TOTAL_BATCH_SIZE"] % (values["DEVICE_BATCH_SIZE"] * track.seq_len) == 0
        assert values["N_EMBD"] % values["HEAD_DIM"] == 0 and values["N_EMBD"] > 0 and values["N_LAYER"] > 0
        for name in moved & builtin.KNOBS.keys():
            knob = builtin.KNOBS[name]
            assert knob.low <= values[name] <= knob.high
            if knob.scale == "log":
                assert 2 ** -(knob.step * knob.reach) * 0.99 < values[name] / before[name]
                assert values[name] / before[name] < 2 ** (knob.step * knob.reach) * 1.01
    assert len(changed) > 10  # it looks everywhere


def test_a_smaller_batch_takes_the_device_batch_with_it(setting):
    values = {"DEVICE_BATCH_SIZE": 64.0}
    assert builtin.fit_device_batch(65536, values, 2048) == {"DEVICE_BATCH_SIZE": 32}
    assert builtin.fit_device_batch(262144, values, 2048) == {}


def test_a_source_that_was_run_is_never_proposed(setting):
    source = b"N_LAYER = 2\nWARMUP_RATIO = 0.0\n"
    history = History([], {source_hash(source)})
    for seed in range(
        24
    ):  # all there are: layers 1, 2, 3, 4 and the warmup 0.00 to 0.10, less this one itself
        if seed == 23:
            with pytest.raises(UserError, match="nothing that was not run before: N_LAYER, WARMUP_RATIO"):
                propose(source, history, setting, seed)
            return
        found = propose(source, history, setting, seed).source
        assert source_hash(found) not in history.sources
        history.sources.add(source_hash(found))


def test_equal_histories_give_equal_proposals(setting):
    source = (ROOT / "train_cuda.py").read_bytes()
    tried = [builtin.Tried(values_of(source, setting), 1.5)]
    proposals = [propose(source, History(tried, set()), setting, seed) for seed in (1, 1, 2)]
    assert proposals[0] == proposals[1] != proposals[2]


@pytest.mark.parametrize(
    "source", [b"SCORE = 1.5\n", b"WARMDOWN_RATIO = 1.7\n", b"N_EMBD = 64\nHEAD_DIM = 0\n"]
)
def test_a_trainer_without_a_constant_to_search_is_told(setting, source):
    with pytest.raises(
        UserError, match="train_cuda.py has none of the constants that builtin searches: N_LAYER"
    ):
        propose(source, History([], set()), setting, 1)


# --- What was tried -----------------------------------------------------------------------------------------


def test_the_ledger_is_read_for_this_board_alone(setting):
    def source(number):
        return f"MATRIX_LR = 0.0{number}\n".encode()

    record(setting, source(1), 1.5, 1)
    record(setting, source(1), 1.4, 2)  # another seed: the mean counts
    record(setting, source(2), None, 3)  # failed
    record(setting, source(3), None, 4, marks=Flag.INTERRUPTED)
    record(setting, source(4), 1.1, 5, marks=Flag.CONTENDED)
    record(setting, source(5), 1.1, 6, device="another CPU")
    record(setting, source(6), 1.1, 7, copy=False)
    record(setting, b"\0 no Python", 1.1, 8)
    refuted = record(setting, source(7), 0.1, 9)
    Ledger(home() / "results.tsv").append(replace(refuted, status="refuted"))
    Ledger(home() / "results.tsv").append(Row(val_bpb=0.9, status="keep", description="of the original"))
    history = history_of(setting)
    assert history.tried == [({"MATRIX_LR": 0.01}, pytest.approx(1.45)), ({"MATRIX_LR": 0.02}, None)]
    assert {source_hash(source(number)) for number in (1, 2, 6)} < history.sources
    assert source_hash(source(4)) not in history.sources


def test_an_edit_that_failed_its_dry_run_counts_as_failed(setting, repository):
    """There is no copy of it, but git has it."""
    record(setting, b"N_LAYER = 2\n", 1.5)
    commit = repo.commit_alone("train_cuda.py", "too large", b"N_LAYER = 4\n")
    repo.save_ref("20260101-000000-abcd", commit)
    dry = Row(run="20260101-000000-abcd", commit=commit[:7], status="crash", marks=Flag.DRY)
    dry = replace(dry, platform="cpu", track="tiny")
    Ledger(home() / "results.tsv").append(dry)
    history = history_of(setting)
    assert history.tried[1:] == [({"N_LAYER": 4}, None)]
    assert source_hash(b"N_LAYER = 4\n") in history.sources


def test_an_empty_ledger_asks_for_no_data(setting, monkeypatch):
    monkeypatch.setattr("launcher.setting.prepare_track", lambda track: pytest.fail("prepared a track"))
    assert history_of(setting) == ([], set())


# --- It learns ----------------------------------------------------------------------------------------------


def badness(source, setting):
    """Return a score that is lowest at a rate of 0.08, a warmdown of 0.6 and three layers."""
    values = values_of(source, setting)
    rate = builtin.RATE.steps(0.08, values["MATRIX_LR"]) / 4
    return 1.0 + 0.01 * (
        rate**2 + (values["WARMDOWN_RATIO"] - 0.6) ** 2 / 0.04 + (values["N_LAYER"] - 3) ** 2
    )


def search(setting, experiments, seed):
    """Return the true scores of the trainers that were kept, by runs with some noise."""
    others = "".join(f"{name} = 0.01\n" for name in ("EMBEDDING_LR", "SCALAR_LR", "UNEMBEDDING_LR"))
    source = f"MATRIX_LR = 0.03\nWARMDOWN_RATIO = 0.9\nN_LAYER = 5\n{others}".encode()
    noise = random.Random(seed)
    best, kept = 9.0, []
    for number in range(experiments + 1):
        tried = source if number == 0 else propose(source, history_of(setting), setting, seed + number).source
        score = badness(tried, setting) + noise.gauss(0, 0.002)
        record(setting, tried, score, number)
        if score < best:
            best, source = score, tried
            kept.append(badness(tried, setting))
    return kept


def test_sixty_experiments_come_close_to_the_best(setting):
    kept = search(setting, 60, seed=1)
    assert kept[0] > 1.07 and kept[-1] < 1.007, kept


def test_proposals_lie_nearer_to_what_was_good_than_by_chance():
    """Of 13 rates from -6 to 6 steps the best is 3: by chance a proposal is 4.2 steps away on average."""
    knobs = {"MATRIX_LR": builtin.RATE}
    noise = random.Random(1)
    tried = []
    for number in range(24):
        steps = number % 13 - 6
        rate = builtin.RATE.move(0.04, steps)
        tried.append(builtin.Tried({"MATRIX_LR": rate}, 1 + 0.002 * (steps - 3) ** 2 + noise.gauss(0, 0.002)))
    found = [builtin.ask(knobs, {"MATRIX_LR": 0.04}, tried, seed)["MATRIX_LR"] for seed in range(30)]
    assert sum(abs(steps - 3) for steps in found) / len(found) < 2.0


def test_where_runs_fail_is_avoided(setting):
    """Of the proposals of the layers most are those that did not fail."""
    values = {"N_LAYER": 5.0}
    knobs = {"N_LAYER": builtin.KNOBS["N_LAYER"]}
    tried = [
        builtin.Tried({"N_LAYER": layers}, 1.0 if layers < 6 else None) for layers in (3, 4, 5, 6, 6, 7, 7)
    ]
    found = [builtin.ask(knobs, values, tried, seed)["N_LAYER"] for seed in range(40)]
    assert sum(steps <= 0 for steps in found) > 34


# --- As an agent --------------------------------------------------------------------------------------------


def test_builtin_is_a_program_of_this_python():
    assert parse_agent("builtin").command == [sys.executable, "-P", "-m", "night.builtin"]


@pytest.fixture
def project(repository, monkeypatch):
    """The repository in which training is made up. Its few modules do not stand for the real ones."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return repository


def call_builtin(folder):
    command = parse_agent("builtin").command
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_it_edits_the_trainer_in_its_folder_and_says_how(setting, project):
    edit(project, "WARMDOWN_RATIO = 0.8  # of the budget\n")
    began = time.monotonic()
    done = call_builtin(project)
    assert time.monotonic() - began < 20  # about one second on an idle machine
    assert (done.returncode, done.stderr) == (0, "")
    new = re.fullmatch(r"experiment: WARMDOWN_RATIO 0\.8 -> ([\d.]+)\n", done.stdout)[1]
    assert (project / "train_cuda.py").read_text() == f"WARMDOWN_RATIO = {new}  # of the budget\n"


def test_a_trainer_that_it_cannot_search_is_one_line_and_exit_code_1(setting, project):
    done = call_builtin(project)
    assert done.returncode == 1 and (project / "train_cuda.py").read_text() == "SCORE = 1.5\n"
    [line] = done.stderr.splitlines()
    assert line.startswith("builtin: train_cuda.py has none of the constants that builtin searches")


@pytest.mark.parametrize("platform", ["cpu", "mlx-cpu"])
def test_a_night_without_a_language_model(project, monkeypatch, platform):
    """Real turns, each a process of its own; the score is made up from the constants."""
    really_supervise = conftest.supervise

    def supervise(trainer, *more):
        ratio = float(re.search(r"WARMDOWN_RATIO = ([\d.]+)", trainer.read_text())[1])
        told = home() / "told.py"
        told.write_text(f"SCORE = {1.0 + abs(ratio - 0.5):.3f}")
        return really_supervise(told, *more)

    monkeypatch.setattr("launcher.run.supervise", supervise)
    monkeypatch.setattr("night.failures.MOST", 2)
    setting = resolve(platform)
    setting.trainer.write_text("WARMDOWN_RATIO = 0.8\n")
    name = setting.trainer.name
    repo.advance_branch(repo.commit_alone(name, "a constant"), name)
    assert run_night(Night(parse_agent("builtin"), setting, experiments=5, pause=0.1)) == 0
    everything = Ledger(home() / "results.tsv").rows()
    rows = [row for row in everything if row.status in STATUSES and Flag.NOISE not in row.flags]
    assert len(rows) == 5 and rows[0].description.startswith("baseline")
    assert len({row.source for row in rows}) == 5 and {row.platform for row in rows} == {platform}
    assert all(row.description.startswith("WARMDOWN_RATIO 0.") for row in rows[1:])
    best = min(rows, key=lambda row: row.val_bpb)
    assert best.val_bpb < 1.3 and best.status == "keep"
    assert setting.trainer.read_text() != "WARMDOWN_RATIO = 0.8\n"
