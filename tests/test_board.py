"""The leaderboard: what is ranked with what, and how it is printed."""

import io
import json
import subprocess
import sys

import pytest

from launcher.board import RankedRun, Wanted, gather, list_ranked, print_leaderboard, why_unranked
from launcher.ledger import COLUMNS, BoardKey, Ledger, Row, to_line
from prepare import ROOT, UserError

H100 = "NVIDIA H100 80GB HBM3"
MAC = "Apple M4 Max"


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def row(run, val_bpb, **values):
    defaults = {
        "status": "keep",
        "rules": 1,
        "budget": 300.0,
        "track": "climbmix",
        "fingerprint": "f" * 16,
        "val_tokens": 1000,
        "platform": "h100",
        "device": H100,
        "time": f"2026-01-01T00:00:{len(run):02}Z",
        "description": run,
    }
    return Row(**{"run": run, "val_bpb": val_bpb, **defaults, **values})


def write(path, *rows):
    for each in rows:
        Ledger(path).append(each)
    return path


def printed(paths, kind="text", out=None, **more):
    """Return what print_leaderboard prints."""
    out = out or io.StringIO()
    print_leaderboard(paths, kind=kind, out=out, **more)
    return out.getvalue()


def runs_of(boards):
    return [[row.run for row in board.rows] for board in boards.boards]


# --- What is ranked with what -------------------------------------------------------------------------------


def test_runs_are_ranked_by_device_and_the_rest_is_unranked(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        row("a", 1.0),
        row("bb", 0.9),
        row("ccc", 0.95, status="discard"),
        row("mac", 1.5, device=MAC, platform="apple-max"),
        row("old", 0.1, rules=0),
        row("short", 0.2, marks="short", budget=20.0),
        row("busy", 0.3, marks="contended"),
        row("dead", 0.0, status="crash"),
    )
    found = gather([path])
    assert runs_of(found) == [["bb", "ccc", "a"], ["mac"]]
    assert {row.run for row in found.unranked} == {"short", "busy", "dead"}
    [foreign] = found.foreign
    assert [row.run for row in foreign.rows] == ["old"]  # its rules are unknown
    assert found.boards[0].baseline.run == "a" and found.boards[0].best.run == "bb"


def test_a_board_has_a_key_with_named_fields(tmp_path):
    [board] = gather([write(tmp_path / "a.tsv", row("a", 1.0))]).boards
    assert board.key == BoardKey(
        track="climbmix",
        fingerprint="f" * 16,
        rules=1,
        budget=300.0,
        val_tokens=1000,
        platform="h100",
        device=H100,
    )
    assert board.title == (
        f"climbmix on {H100} (h100): 1 runs, 300 s, 1,000 tokens scored, rules 1, data ffffffff"
    )


def test_one_track_or_platform_alone(tmp_path):
    path = write(
        tmp_path / "a.tsv", row("a", 1.0), row("b", 1.1, track="pysource"), row("c", 1.2, platform="x")
    )
    assert runs_of(gather([path], track="pysource")) == [["b"]]
    assert runs_of(gather([path], platform="x")) == [["c"]]


def test_other_rules_and_other_data_do_not_mix(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        row("a", 1.0, rules=2),
        row("b", 0.5, rules=1),
        row("c", 0.4, rules=2, fingerprint="other"),
        row("d", 1.1, rules=2),
    )
    found = gather([path])
    assert runs_of(found) == [["a", "d"]]
    assert {row.run: why_unranked(row, {}) for row in found.unranked} == {
        "b": "other rules or other data",
        "c": "other rules or other data",
    }


def test_ledgers_merge_by_run(tmp_path):
    one = write(tmp_path / "one.tsv", row("a", 1.0), row("b", 0.9))
    two = write(tmp_path / "two.tsv", row("b", 0.9), row("c", 1.2, device=MAC))
    assert runs_of(gather([one, two])) == [["b", "a"], ["c"]]


def test_a_line_that_cannot_be_read_is_complained_about(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0))
    with open(path, "a") as f:
        f.write("abc\tbroken\n")
    said = []
    assert runs_of(gather([path], complain=said.append)) == [["a"]]
    assert len(said) == 1 and f"{path}:3" in said[0]


def test_a_claim_is_shown_and_refuted_is_not_ranked(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        row("good", 1.0),
        row("fair", 1.1),
        row("fake", 0.5),
        row("good", 1.0, status="verified"),
        row("good", 1.0, status="confirmed"),
        row("fair", 1.1, status="confirmed"),
        row("fair", 1.1, status="unconfirmed"),  # the last one counts
        row("fake", 1.4, status="refuted", reason="differs"),
    )
    assert set(gather([path]).verifications) == {"good", "fake"}
    data = json.loads(printed([path], "json"))
    marks = [(line["run"], line["verified"]) for line in data["boards"][0]["rows"]]
    assert marks == [("good", True), ("fair", False)]
    assert data["unranked"][0]["why"] == "refuted: differs"


def test_under_its_title_a_board_says_what_is_claimed_or_believed(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        row("a", 1.0, source="s", belief_after=1.01, belief_after_error=0.02),
        row("bb", 0.9, source="t", belief_after=0.95, belief_after_error=0.01),
    )
    assert "believed of the trainer to build on: 0.950000 +- 0.010000, not confirmed" in printed([path])
    write(
        path,
        row("bb", 0.9, source="t", status="confirmed", reason="0.05 better", time="2026-01-03T00:00:00Z"),
    )
    assert "claimed on 2026-01-03 (run bb): 0.05 better" in printed([path]).splitlines()[1]
    assert json.loads(printed([path], "json"))["boards"][0]["result"].startswith("claimed on 2026-01-03")


def test_a_claim_is_dropped_where_a_run_of_its_trainer_is_refuted(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        row("a", 1.0, source="s"),
        row("bb", 0.9, source="t"),
        row("ccc", 0.8, source="t"),
        row("bb", 0.9, source="t", status="confirmed", reason="0.05 better"),
    )
    assert set(gather([path]).claims) == {"bb"}
    write(path, row("ccc", 0.8, source="t", status="refuted", reason="it learned the validation text"))
    assert gather([path]).claims == {} and "claimed" not in printed([path])


@pytest.mark.parametrize(
    "values, why",
    [
        ({"status": "crash", "reason": "out of memory"}, "crash: out of memory"),
        ({"status": "timeout"}, "timeout"),
        ({"rules": 0}, "from another tool: its rules are unknown"),
        (
            {"marks": "noise,short,contended"},
            "a budget other than the rules', something else used the device",
        ),
    ],
)
def test_why_a_run_is_unranked(values, why):
    assert why_unranked(row("a", 1.0, **values), {}) == why


def test_the_comparison_of_devices(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        row("a", 1.0),
        row("bb", 0.9),
        row("m", 1.5, device=MAC),
        row("mm", 1.2, device=MAC, energy_kj=12.5),
    )
    [mac] = [line for line in json.loads(printed([path], "json"))["across"] if line["device"] == MAC]
    assert mac["baseline_val_bpb"] == 1.5 and mac["best_val_bpb"] == 1.2
    assert mac["gap_closed_percent"] == 50.0 and mac["energy_kj"] == 12.5


# --- How it is printed --------------------------------------------------------------------------------------


def test_text(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0, tokens_per_second=1.93e6), row("m", 1.5, device=MAC))
    text = printed([path])
    assert "climbmix on NVIDIA H100" in text and "across devices" in text and "not ranked" not in text
    assert "1.000000" in text and "1,930,000" in text


def test_a_ledger_without_runs_says_how_to_make_one(tmp_path):
    assert printed([tmp_path / "absent.tsv"]) == "no experiments yet: autoresearch run\n"


def test_tsv_has_a_line_for_each_ranked_run(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0), row("m", 1.5, device=MAC), row("x", 1.0, marks="slept"))
    text = path.read_text().replace("\tm\t", "\tm \x1b[31m\t")  # by hand: what we write is clean
    path.write_text(text)
    header, *lines = (line.split("\t") for line in printed([path], "tsv").splitlines())
    assert len(lines) == 2 and {len(line) for line in lines} == {len(header)}
    assert dict(zip(header, lines[0], strict=True))["device"] == H100


def test_a_pipe_gets_every_run_on_one_whole_line(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # of no meaning where no terminal is
    long = "warmdown over more of the budget, " * 20
    path = write(
        tmp_path / "a.tsv",
        row("first", 1.0, description=long + "end"),
        row("fails", 0.0, status="crash", reason=long + "end"),
    )
    lines = printed([path]).splitlines()
    assert len([line for line in lines if f"  {long}end" in line]) == 1
    assert len([line for line in lines if f"crash: {long}end" in line]) == 1
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_gets_what_fits(tmp_path, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    path = write(
        tmp_path / "a.tsv",
        row(
            "20260101-000000-abcd",
            1.0,
            description="warmdown over more of the budget " * 4 + "end",
            mfu_percent=45.1,
        ),
        row("20260101-000001-abcd", 1.5, device=MAC, marks="slept,contended"),
    )
    text = printed([path], out=Terminal()).replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert max(len(line) for line in text.splitlines()) <= width
    assert "1.000000" in text and "20260101-000000-abcd" in text and "end" in text
    assert ("mfu_percent" in text) == (width == 200)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 250])
def test_columns_are_dropped_by_width_and_never_a_line_too_long(tmp_path, monkeypatch, width):
    """The first columns stay at any width, and nothing that is shown is cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    rows = [
        row(
            f"20260101-0000{i:02}-abcd", 1.0 + i / 100, description=f"{'a wider window ' * i}end", seed=i + 1,
            tokens_per_second=1.84e6, mfu_percent=45.1, memory_gb=17.2, num_params_M=50.3, val_stderr=0.02,
        )
        for i in range(9)
    ]  # fmt: skip
    text = printed([write(tmp_path / "a.tsv", *rows)], out=Terminal())
    text = text.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    names = next(line for line in text.splitlines() if line.startswith("rank")).split()
    assert names[:3] == ["rank", "val_bpb", "description"]  # beside the number stands what was done
    assert ("run" in names) == (width >= 80) and ("tokens_per_second" in names) == (width >= 120)
    assert "verified" not in names and "flags" not in names  # no line has a value there
    assert ("seed" in names) == (width >= 160)


def test_the_best_is_marked_and_what_is_missing_is_a_dash(tmp_path):
    path = write(
        tmp_path / "a.tsv", row("a", 1.1, mfu_percent=45.0), row("b", 1.0), row("c", 0.0, status="crash")
    )
    lines = printed([path]).splitlines()
    best = next(line for line in lines if " b " in f"{line} ")
    assert best.split()[:3] == ["*", "1", "1.000000"] and "-" in best.split()
    assert printed([path]).count("*") == 1
    crashed = next(line for line in lines if "crash" in line)
    assert crashed.split()[0] == "-" and "0.000000" not in crashed.split()[0]
    data = json.loads(printed([path], "json"))
    assert data["boards"][0]["rows"][0]["mfu_percent"] is None and data["unranked"][0]["val_bpb"] is None


def test_columns_and_order_are_those_asked_for(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        row("slow", 1.0, tokens_per_second=10.0),
        row("none", 1.1),
        row("fast", 1.2, tokens_per_second=99.0),
        row("busy", 1.3, marks="contended"),
    )
    wanted = Wanted(("run", "tokens_per_second"), "-tokens_per_second")
    lines = [line.split() for line in printed([path], wanted=wanted).splitlines()]
    assert lines[2:6] == [["run", "tokens_per_second"], ["fast", "99"], ["slow", "10"], ["none", "-"]]
    tsv = printed([path], "tsv", wanted=wanted).splitlines()
    assert tsv[0].split("\t") == ["track", "device", "run", "tokens_per_second"]
    assert [line.split("\t")[2] for line in tsv[1:]] == ["fast", "slow", "none"]
    board = gather([path]).boards[0]
    for column in RankedRun._fields:  # each can be sorted by, and loses no line
        for sign in ("", "-"):
            assert len(list_ranked(board, {}, sort=sign + column)) == 3
    assert [line.run for line in list_ranked(board, {}, 1, "-val_bpb")] == ["fast"]


def test_a_program_reads_when_with_what_and_why(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0, seed=7, marks="harness-modified", reason="first result"))
    [line] = json.loads(printed([path], "json"))["boards"][0]["rows"]
    assert (line["time"], line["seed"]) == ("2026-01-01T00:00:01Z", 7)
    assert (line["flags"], line["reason"]) == (["harness-modified"], "first result")


def test_a_track_that_is_none_is_an_error_that_lists_those_there_are(house, tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0))
    with pytest.raises(UserError, match="there is no track 'nope': the tracks are climbmix, tiny") as caught:
        printed([path], track="nope")
    assert caught.value.code == 2
    with pytest.raises(UserError, match="there is no platform 'nope': the platforms are cpu, h100, mlx-cpu"):
        printed([path], platform="nope")
    assert (
        printed([path], track="tiny") == "no experiments yet: autoresearch run\n"
    )  # known, and nothing there


# --- Ledgers of other tools ---------------------------------------------------------------------------------


def write_original(path, scores):
    """Write a ledger as the original does: five columns, in the order of the night."""
    lines = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription"]
    for number, score in enumerate(scores):
        status = "keep" if score and score == min(filter(None, scores[: number + 1])) else "discard"
        lines.append(f"abc{number:04}\t{score:.6f}\t44.0\t{status if score else 'crash'}\tidea {number}")
    path.write_text("\n".join([*lines, ""]))
    return path


def test_a_ledger_of_the_original_has_a_board_of_its_own(tmp_path):
    night = [0.998 - 0.0001 * (i * 37 % 126) if i % 20 != 19 else 0.0 for i in range(126)]
    theirs = write_original(tmp_path / "theirs.tsv", night)
    fork = write_original(tmp_path / "fork.tsv", [1.2, 1.1])
    ours = write(tmp_path / "ours.tsv", row("a", 1.0))
    found = gather([theirs, ours, fork])
    assert runs_of(found) == [["a"]] and [board.ledger for board in found.foreign] == [str(theirs), str(fork)]
    values = [row.val_bpb for row in found.foreign[0].rows]
    assert values == sorted(values) and len(values) == 120 and len(found.unranked) == 6
    text = printed([theirs, ours, fork])
    assert f"unverified: {theirs}, 120 runs of another tool" in text and "not ranked: 6" in text
    first = next(line for line in text.split("unverified")[1].splitlines() if "*" in line)
    assert first.split()[2] == f"{values[0]:.6f}" and "abc" in first  # a commit in the place of a run
    data = json.loads(printed([theirs], "json"))
    assert data["boards"] == [] and data["foreign"][0]["rows"][0]["gain"] == round(night[0] - values[0], 6)
    assert "across devices" not in printed([theirs, ours])


def test_text_of_a_description_is_shown_as_it_is(tmp_path):
    path = write(tmp_path / "a.tsv", row("a", 1.0, description="[bold]x[/bold] :smile: {y}"))
    path.write_text(path.read_text().replace("{y}", "\x1b[31mred"))
    text = printed([path])
    assert "[bold]x[/bold] :smile:" in text and "\x1b" not in text


def test_a_long_board_says_how_much_is_left_out(tmp_path):
    rows = [row(f"r{i}", 1 + i / 100) for i in range(5)]
    slept = [row(f"s{i}", 1.0, marks="slept") for i in range(4)]
    text = printed([write(tmp_path / "a.tsv", *rows, *slept)], wanted=Wanted(most=3))
    assert "... 2 more (--rows, --json or --tsv has them)" in text and "r3" not in text
    assert "not ranked: 4, the last 3 of them" in text and "s0" not in text and "s3" in text


# --- What is damaged, and what is missing -------------------------------------------------------------------


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "0", "-1", "-0.0", "x"])
def test_a_score_that_is_none_is_never_ranked(tmp_path, score):
    path = write(tmp_path / "results.tsv", row("honest", 1.5), row("odd", 1.25))
    path.write_text(path.read_text().replace("1.250000", score))
    assert runs_of(gather([path])) == [["honest"]]
    assert "odd" not in printed([path]).split("not ranked")[0]


def test_it_says_when_the_ledger_lacks_runs_that_have_a_row(tmp_path, capsys):
    path = write(tmp_path / "results.tsv", row("there", 1.5))
    for run, names in {
        "there": ["run.json", "row.json"],
        "lost": ["run.json", "row.json"],
        "now": ["run.json"],
    }.items():
        (tmp_path / "runs" / run).mkdir(parents=True)
        for name in names:
            (tmp_path / "runs" / run / name).write_text("{}")
    printed([path], runs=tmp_path / "runs")
    assert "the ledger lacks 1 of the runs" in capsys.readouterr().err
    printed([path], runs=tmp_path / "runs", track="climbmix")  # rows of other tracks were not read
    printed([path])
    assert capsys.readouterr().err == ""


# --- How long it takes --------------------------------------------------------------------------------------

BLINK = """
import sys, time
sys.argv[1:] = ["leaderboard", sys.argv[1]]
try:
    from launcher.cli import main
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "mlx", "numpy", "scipy", "pydantic", "matplotlib", "datasets"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
print(time.process_time())  # of the processor: other work on the machine does not count
"""

# Resident memory when all is read and ranked: the peak that getrusage names is the parent's after a fork.
LARGE = """
import io, sys, time
import psutil
from launcher.board import gather, print_leaderboard
held = gather([sys.argv[1]])
print(psutil.Process().memory_info().rss / 2**20)
del held
began = time.process_time()
print_leaderboard([sys.argv[1]], out=io.StringIO())
print(time.process_time() - began)
"""


def python(code, *arguments):
    """Run Python in a process of its own, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_answers_in_a_blink_without_a_framework(tmp_path):
    path = write(tmp_path / "results.tsv", *[row(f"r{i}", 1 + i / 1000) for i in range(200)])
    times = [float(python(BLINK, str(path)).splitlines()[-1]) for _ in range(5)]
    assert min(times) < 0.6, times  # 0.35 s on a quiet machine


def test_a_hundred_thousand_rows(tmp_path):
    path = tmp_path / "big.tsv"
    lines = [to_line(row(f"r{i}", 1 + (i * 7919 % 100003) / 1e5)) for i in range(100_000)]
    path.write_text("\n".join(["\t".join(COLUMNS), *lines, ""]))
    megabytes, seconds = map(float, python(LARGE, str(path)).split())
    assert seconds < 4 and megabytes < 500, (seconds, megabytes)  # 1.5 s on a quiet machine
