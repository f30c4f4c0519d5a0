"""The exit codes of all commands: code and help take them from here. Nothing is imported: entry.py does."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_VERDICT = 6
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # what a shell says of a process that SIGPIPE ended

EXIT_CODES = {"keep": EXIT_DONE, "discard": 3, "crash": EXIT_FAILED, "timeout": 4, "invalid": 5}  # by status

# What every command says with its exit code, where MEANINGS has no other word.
COMMON = {
    EXIT_DONE: "done",
    EXIT_FAILED: "an error that the message names",
    EXIT_USAGE: "usage",
    EXIT_INTERRUPTED: "interrupted",
    EXIT_READER_GONE: "the reader went away (| head)",
}
_TRIED = {
    EXIT_CODES["keep"]: "keep",
    EXIT_CODES["discard"]: "discard",
    EXIT_CODES["crash"]: "crash, or an error that the message names",
    EXIT_CODES["timeout"]: "timeout",
    EXIT_CODES["invalid"]: "invalid",
    EXIT_NO_VERDICT: "no verdict (something else used the device, or a laptop without power)",
}
# By command, where a code says more than done or failed.
MEANINGS: dict[str, dict[int, str]] = {
    "doctor": {EXIT_DONE: "nothing keeps an experiment from running", EXIT_FAILED: "something does"},
    "run": _TRIED,
    "try": {**_TRIED, EXIT_USAGE: "usage, or nothing was edited"},
    "loop": {
        EXIT_DONE: "at its end",
        EXIT_FAILED: "turn after turn led to no experiment, or an error that the message names",
        EXIT_NO_VERDICT: "--busy refuse, and other processes compute",
    },
    "stop": {EXIT_DONE: "the loop is asked", EXIT_FAILED: "no loop runs in this repository"},
    "noise": {
        EXIT_DONE: "measured",
        EXIT_FAILED: "too few of the runs count, or one crashed",
        EXIT_CODES["timeout"]: "timeout",
        EXIT_CODES["invalid"]: "invalid",
    },
    "verify": {
        EXIT_DONE: "verified",
        EXIT_FAILED: "no weights or other data",
        EXIT_CODES["invalid"]: "refuted",
        EXIT_NO_VERDICT: "unverifiable",
    },
    "confirm": {EXIT_DONE: "better", EXIT_CODES["discard"]: "not shown"},
}


def meanings(command: str) -> dict[int, str]:
    """Return what each exit code of a command says, by code."""
    return dict(sorted({**COMMON, **MEANINGS.get(command, {})}.items()))


def in_a_line(command: str) -> str:
    """Return the exit codes of a command in a line: its own, then those that all commands share."""
    own = MEANINGS.get(command, {})
    shared = {code: text for code, text in COMMON.items() if code not in own and code != EXIT_READER_GONE}
    return ", ".join(f"{code} {text}" for code, text in {**own, **shared}.items())
