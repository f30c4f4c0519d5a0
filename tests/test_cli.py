"""The command line: every command through click, its help, its exit codes, its mistakes."""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from backends import platforms
from launcher import cli, console
from launcher.command import SECTIONS
from launcher.exit_codes import EXIT_CODES, EXIT_INTERRUPTED, EXIT_NO_VERDICT, MEANINGS, in_a_line
from launcher.ledger import Ledger, Row
from launcher.runs import run_dir
from prepare import ROOT, RULES, UserError


@pytest.fixture
def call(house, monkeypatch):
    """call("run", "-m", "idea") -> click's Result, in this process."""
    monkeypatch.setattr("launcher.harness.harness_modified", lambda: False)

    def call(*arguments):
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def told(monkeypatch):
    """The requests that commands make, in place of running them."""
    requests = []

    def run_experiment(request):
        requests.append(request)
        return Row(
            run="20260101-000000-abcd", status="discard", reason="no improvement", val_bpb=1.5, rules=1
        )

    monkeypatch.setattr("launcher.run.run_experiment", run_experiment)
    return requests


COMMANDS = sorted(cli.main.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_a_sentence_and_an_example(call, command):
    done = call(command, "--help")
    assert done.exit_code == 0 and f"autoresearch {command}" in done.output
    assert max(map(len, done.output.splitlines())) < 100


@pytest.mark.parametrize("command", ["run", "try"])
def test_help_names_every_exit_code(call, command):
    codes = {*EXIT_CODES.values(), EXIT_NO_VERDICT, EXIT_INTERRUPTED, 2}
    text = call(command, "--help").output.split("Exit codes:")[1]
    assert {int(code) for code in re.findall(r"\b\d+\b", text)} == codes


def test_help_readme_and_docs_give_the_exit_codes_the_same_words(call):
    docs = (ROOT / "docs" / "troubleshooting.md").read_text()
    topic = call("help", "exit-codes").output
    for command in MEANINGS:
        line = in_a_line(command)
        assert line in " ".join(call(command, "--help").output.split())
        assert f"| `{command}` | {line} |" in docs
        of_command = topic.split(f"autoresearch {command}:")[1].split("\n\n")[0]
        for code, text in MEANINGS[command].items():
            assert f"{code:3}  {text}\n" in of_command + "\n"
    assert f"Exit codes of `run`: {in_a_line('run')}." in " ".join((ROOT / "README.md").read_text().split())


def test_the_commands_stand_in_the_order_of_use_and_every_summary_is_whole(call):
    text = call("--help").output
    places = [text.index(f"{section}:\n") for section in SECTIONS]
    assert places == sorted(places) and "..." not in text.split("Start:")[1]
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"^  ([a-z]+)  +[A-Z]", text.split("Start:")[1], re.M)
    assert sorted(listed) == COMMANDS and listed.index("run") < listed.index("report")


@pytest.mark.parametrize("topic", ["exit-codes", "names", "environment", "completion"])
def test_a_topic_has_a_page_that_fits(call, topic):
    done = call("help", topic)
    assert done.exit_code == 0 and max(map(len, done.output.splitlines())) <= 110
    assert topic in call("help").output and f"  {topic}" not in call("help", topic).output


def test_alone_the_command_prints_its_help(call):
    assert call().output == call("--help").output and call().exit_code == 0


def test_help_of_a_command_is_its_own_help(call):
    assert call("help", "run").output == call("run", "--help").output
    done = call("help", "nope")
    assert done.exit_code == 2 and "exit-codes" in done.output


def test_version_says_what_decides_whether_results_compare(call):
    from launcher.harness import harness_hash

    done = call("--version")
    assert done.exit_code == 0
    assert re.match(
        rf"autoresearch [\d.]+, rules {RULES}, harness {harness_hash()}, torch [\d.]+", done.output
    )


def test_run_passes_on_what_was_typed(call, told, tmp_path):
    done = call("run", "-m", "idea", "--seed", 7, "--budget", 12.5, "--platform", "cpu", "--keep-weights")
    [request] = told
    assert (request.description, request.seed, request.keep_weights) == ("idea", 7, True)
    assert (request.setting.platform.name, request.setting.budget) == ("cpu", 12.5)
    assert done.exit_code == 3 and done.output.endswith("status: discard\nreason: no improvement\n")


def test_a_night_needs_no_agent(call, monkeypatch):
    nights = []
    monkeypatch.setattr("night.loop.run_night", lambda night: nights.append(night) or 0)
    assert call("loop", "--experiments", 3).exit_code == 0
    assert nights[0].agent.is_builtin
    assert "[default: builtin]" in " ".join(call("loop", "--help").output.split())


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("run", "--budget", "nan"), "not a number of seconds"),
        (("run", "--budget", "inf"), "not in the range"),
        (("run", "--budget", "0"), "not in the range"),
        (("run", "--seed", "-1"), "not in the range"),
        (("loop", "--agent", "true", "--pause", "inf"), "not in the range"),
        (("loop", "--agent", "true", "--agent-seconds", "nan"), "not a number of seconds"),
        (("loop", "--agent", "true", "--until", ""), "--until"),
        (("loop", "--agent", "no-such-agent"), "no program 'no-such-agent'"),
        (("loop", "--agent", "'"), "--agent"),
        (("loop", "--agent", "true", "--agent-seconds", "1e308"), "not in the range"),
        (("loop", "--agent", "true", "--pause", "-1"), "not in the range"),
        (("loop", "--experiments", "9" * 5000), "not a valid integer"),
        (("run", "--seed", "1e3"), "not a valid integer"),
        (("run", "--platform", "\udce9"), "unknown platform"),
        (("show", "../x"), "the ledger has no run"),
        (("show", "\udce9\n"), "the ledger has no run"),
        (("noise", "--repeats", "1"), "not in the range"),
        (("leaderboard", "no-such-file"), "does not exist"),
        (("nonsense",), "No such command"),
        (("leaderboard", "--columns", "rank,nope"), "there is no column 'nope': the columns are rank"),
        (("leaderboard", "--sort", "-nope"), "there is no column 'nope'"),
        (("leaderboard", "--track", "nope"), "there is no track 'nope': the tracks are tiny"),
        (("report", "--track", "nope"), "there is no track 'nope': the tracks are tiny"),
        (("watch", "--platform", "nope"), "there is no platform 'nope': the platforms are cpu"),
        (("leaderbord",), "Did you mean 'leaderboard'?"),
        (("run", "--bugdet", "3"), "No such option"),
        (("show",), "Missing argument"),
    ],
)
def test_a_mistake_is_a_line_and_exit_code_2(call, arguments, says):
    done = call(*arguments)
    assert done.exit_code == 2 and says in done.output
    assert done.output.startswith("autoresearch: ") and done.output.count("\n") == 1


@pytest.mark.parametrize("code", [1, 2])
def test_a_user_error_is_one_line(call, monkeypatch, code):
    def fail(*arguments):
        raise UserError("the disk is full: free some", code)

    monkeypatch.setattr("launcher.show.show_run", fail)
    done = call("show", "best")
    assert done.exit_code == code and done.output == "autoresearch: the disk is full: free some\n"


@pytest.mark.parametrize(
    "place, says",
    [
        ("AUTORESEARCH_HOME", "a file/below/results.tsv: Not a directory"),
        ("AUTORESEARCH_CONFIG", "a file/below: cannot be read"),
        ("AUTORESEARCH_CACHE", "cannot write"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_one_line(call, house, monkeypatch, place, says):
    (house / "a file").write_text("")
    monkeypatch.setenv(place, str(house / "a file" / "below"))
    platforms.load_platforms.cache_clear()
    done = call("run", "--budget", 1)
    assert done.exit_code in (1, 2) and done.output.startswith("autoresearch: ") and says in done.output
    assert done.output.count("\n") == 1


@pytest.mark.parametrize("typed", ["caf\udce9", "a\tb\nc\x1b[31m", "\ud800", "\x85"])
def test_any_description_is_a_line_of_the_ledger(call, told, house, typed):
    call("run", "-m", typed)
    row = Row(run="r1", description=told[0].description)
    Ledger(house / "results.tsv").append(row)
    assert Ledger(house / "results.tsv").rows() == [row]
    assert not told[0].description or told[0].description.isprintable()


def test_an_interruption_has_its_exit_code(call, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.show.show_run", fail)
    assert call("show", "best").exit_code == 130


@pytest.mark.parametrize("arguments", [["platforms"], ["--help"], ["run", "--help"], ["leaderboard"]])
def test_a_reader_that_goes_away_is_no_crash(house, arguments):
    """As `autoresearch platforms | head -1` does."""
    command = [sys.executable, "-m", "launcher.entry", *arguments]
    done = subprocess.run(
        ["bash", "-c", '(sleep 0.5; exec "$0" "$@") | true; echo "${PIPESTATUS[0]}"', *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "141\n" and done.stderr == ""


def test_an_empty_ledger_is_a_hint_everywhere(call):
    assert "no experiments yet" in call("leaderboard").output
    for arguments in (("show", "best"), ("restore", "last"), ("verify", "best")):
        done = call(*arguments)
        assert done.exit_code == 2 and "the ledger has no run" in done.output
    assert "no scored experiment" in call("report").output
    assert "would free" in call("clean").output


def add_run(house):
    row = Row(
        run="20260101-000000-abcd",
        status="keep",
        rules=RULES,
        val_bpb=1.5,
        track="tiny",
        platform="cpu",
        budget=300.0,
    )
    Ledger(house / "results.tsv").append(row)
    folder = run_dir(row.run)
    folder.path.mkdir(parents=True)
    (folder.path / "train_cuda.py").write_text("pass\n")
    folder.record.write_text(json.dumps({"trainer": "train_cuda.py"}))
    return row


def test_commands_that_read_the_ledger(call, house):
    row = add_run(house)
    assert row.run in call("leaderboard").output
    assert json.loads(call("leaderboard", "--json").output)["boards"][0]["rows"][0]["run"] == row.run
    assert call("leaderboard", "--tsv").output.startswith("track\tdevice\trank")
    assert "val_bpb: 1.5" in call("show", "best").output
    verify = call("verify", "best")
    assert verify.exit_code == 1 and "has no weights" in verify.output


def test_report_writes_where_it_says(call, house):
    add_run(house)
    done = call("report", "-o", house / "page")
    assert done.exit_code == 0 and done.output.split() == [
        str(house / "page" / name) for name in ("report.html", "report.png")
    ]
    assert all(map(lambda path: (house / "page" / path).stat().st_size > 1000, ("report.html", "report.png")))


@pytest.mark.parametrize(
    "arguments, keys",
    [
        (("show", "best"), {"row", "board", "loss", "diff"}),
        (("leaderboard",), {"boards", "across", "unranked"}),
        (("log", "best"), {"run", "path", "lines"}),
        (("diff", "best", "baseline"), {"old", "new", "diff"}),
        (("clean",), {"items", "bytes", "freed"}),
        (("prepare", "--track", "tiny"), {"track", "path", "fingerprint"}),
        (("program",), {"platform", "track", "trainer", "text"}),
        (("report", "-o", "page"), {"page", "card"}),
        (("platforms",), {"facts", "platform", "why"}),
        (("run", "-m", "idea"), {"exit_code", "row", "result"}),
    ],
)
def test_what_a_program_may_read_is_one_object(call, told, house, monkeypatch, arguments, keys):
    row = add_run(house)
    run_dir(row.run).log.write_text("step 1\n")
    monkeypatch.chdir(house)
    done = call(*arguments, "--json")
    assert keys <= json.loads(done.stdout).keys()
    assert done.exit_code == (3 if arguments[0] == "run" else 0)


def test_prepare_and_platforms(call, house):
    done = call("prepare", "--track", "tiny")
    assert done.exit_code == 0 and "tiny-" in done.output
    facts = json.loads(call("platforms", "--json").output)
    assert (
        facts["platform"] == "cpu"
        and facts["facts"]["framework"] == "torch"
        and facts["trainer"] == "train_cuda.py"
    )
    text = call("platforms").output
    assert "why: " in text and re.search(
        r"^\* cpu +torch cpu +tiny +2 layers, width 64, 1,024 tokens a step$", text, re.M
    )


def test_program_prints_the_page_of_this_machine(call):
    done = call("program")
    assert (
        done.exit_code == 0 and "Program for cpu" in done.output and "trainer: train_cuda.py" in done.output
    )


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "try -m x",
        "loop",
        "confirm",
        "noise",
        "verify best",
        "prepare --force",
        "clean --yes",
        "report",
    ],
)
def test_an_agent_of_the_loop_may_only_look(call, monkeypatch, house, command):
    monkeypatch.setenv("AUTORESEARCH_LOOP", str(house))
    done = call(*command.split())
    assert done.exit_code == 1 and "an agent of the loop may call show, restore" in done.output
    assert call("leaderboard").exit_code != 1 or "an agent of the loop" not in call("leaderboard").output
    assert os.listdir(house) == []


# --- How much is said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("-q", "run"), ("run", "--quiet")])
def test_quiet_leaves_warnings_and_results(call, told, monkeypatch, arguments):
    def run_experiment(request):
        console.say("training")
        console.warn_once("contended: something else computed")
        return Row(run="r1", status="discard", reason="no improvement")

    monkeypatch.setattr("launcher.run.run_experiment", run_experiment)
    assert call("run").stderr == "training\nwarning: contended: something else computed\n"
    done = call(*arguments)
    assert done.stderr == "warning: contended: something else computed\n"
    assert done.stdout == "run: r1\nstatus: discard\nreason: no improvement\n"
    assert "training" in call("run").stderr  # the next command is as loud as ever


def test_verbose_says_where_an_error_came_from(call, monkeypatch):
    def fail(*arguments):
        raise UserError("the disk is full: free some")

    monkeypatch.setattr("launcher.show.show_run", fail)
    assert "Traceback" not in call("show", "best").stderr
    loud = call("-v", "show", "best").stderr
    assert "Traceback" in loud and loud.endswith("\nautoresearch: the disk is full: free some\n")


def test_quiet_prepares_without_a_word(autoresearch):
    loud = autoresearch("prepare", "--track", "tiny", "--force")
    quiet = autoresearch("-q", "prepare", "--track", "tiny", "--force")
    assert loud.stdout == quiet.stdout and loud.stderr != "" and quiet.stderr == ""


# --- What a person is asked ---------------------------------------------------------------------------------


def on_a_terminal(house, arguments, typed):
    """Run a command on a terminal, type a line when it asks, and return all that the terminal showed."""
    process, terminal = os.forkpty()
    if process == 0:
        code = "import sys; sys.argv[1:] = sys.argv[2:]; " + FAKE_RUN
        os.execv(sys.executable, [sys.executable, "-c", code, "-", *arguments])
    shown = b""
    with contextlib.suppress(OSError):  # the terminal closes when the command ends
        while chunk := os.read(terminal, 4096):
            shown += chunk
            if typed and b"What does it change" in shown:
                os.write(terminal, typed)
                typed = b""
    os.waitpid(process, 0)
    return shown.decode()


FAKE_RUN = """
import launcher.run
from launcher.ledger import Row

def run_experiment(request):
    print(f"description={request.description!r}")
    return Row(run="r1", status="discard", reason="no improvement")

launcher.run.run_experiment = run_experiment
from launcher.cli import main
main()
"""


def test_on_a_terminal_run_asks_what_changed(house, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "description='a wider window'" in on_a_terminal(house, ["run"], b"a wider window\n")
    said = on_a_terminal(house, ["run", "-m", "typed"], b"")
    assert "description='typed'" in said and "What does it change" not in said


def test_in_a_pipe_run_asks_nothing(call, told):
    assert "What does it change" not in call("run").output and told[0].description == ""


# --- What a shell completes ---------------------------------------------------------------------------------


def completed(words):
    """Return what bash would offer after these words, as our own completion script asks for it."""
    variables = {
        **os.environ,
        "_AUTORESEARCH_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["autoresearch", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'autoresearch'; " + BLIND]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stderr == ""
    return [line.split(",", 1)[1] for line in done.stdout.splitlines() if line]


# No framework, and neither numpy nor pydantic: a person waits after each key.
BLIND = """
import atexit
from launcher.entry import main
atexit.register(lambda: sys.modules.keys() & {"torch", "numpy", "pydantic"} and print("plain,slow"))
main()
"""


@pytest.mark.parametrize(
    "words, offered",
    [
        (["lea"], ["leaderboard"]),
        (["run", "--track", ""], ["tiny"]),
        (["run", "--platform", "mlx"], ["mlx-cpu"]),
        (["show", ""], ["best", "last", "baseline", "20260101-000000-abcd"]),
        (["diff", "best", "2026"], ["20260101-000000-abcd"]),
        (["confirm", "--against", "ba"], ["baseline"]),
        (["loop", "--agent", "cl"], ["claude"]),
        (["loop", "--busy", ""], ["go-on", "wait", "refuse"]),
        (["leaderboard", "--columns", "rank,val_"], ["rank,val_bpb"]),
        (["help", "exit"], ["exit-codes"]),
    ],
)
def test_a_shell_completes_names(house, words, offered):
    add_run(house)
    assert completed(words) == offered


def test_where_names_cannot_be_looked_up_a_shell_gets_none(house, monkeypatch):
    (house / "results.tsv").write_bytes(b"\xff\0 no ledger")
    monkeypatch.setenv("AUTORESEARCH_CONFIG", str(house / "absent.yaml"))
    assert completed(["run", "--track", ""]) == [] and completed(["show", ""]) == ["best", "last", "baseline"]
