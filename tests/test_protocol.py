"""The contract between launcher and trainer: what one side writes, the other reads, and nothing else."""

import contextlib
import json
import math
from dataclasses import asdict, replace

import pytest
from conftest import RESULT, START
from hypothesis import given
from hypothesis import strategies as st

from backends.protocol import (
    EVENT_BYTES,
    EventError,
    Failure,
    Invalid,
    Log,
    RunDir,
    RunSettings,
    Stop,
    format_event,
    parse_event,
    read_json,
    write_json,
)
from prepare import UserError

EVENTS = [
    replace(START, laptop={"on_battery": False}),
    Log(7, 3.5, 3.6, 8192, 1.5, 5461.0, 33.3),
    Stop(1079, 8839168, 512.5),
    Invalid("the trainer set its own random seed"),
    Failure("oom", "out of memory"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_an_event_is_read_as_it_was_written(event):
    line = format_event(event)
    assert line.endswith("\n") and line.count("\n") == 1
    assert parse_event(line) == event == parse_event(line.encode())


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"num_params_M": float("nan")}, "num_params_M: Input should be a finite number"),
        ({"peak_tflops": float("inf")}, "peak_tflops: Input should be a finite number"),
        ({"budget": 0}, "budget: Input should be greater than 0"),
        ({"startup": "1.2"}, "startup: Input should be a valid number"),
        ({"depth": 2.5}, "depth: Input should be a valid integer"),
        ({"flops_per_token": -1}, "flops_per_token"),
        ({"seed": None}, "seed"),
        ({"platform": 3}, "platform"),
        ({"weights": {"w": ["a"]}}, "weights"),
        ({"event": "strat"}, "does not match any of the expected tags"),
    ],
)
def test_an_event_with_a_wrong_field_is_refused_by_its_name(changes, says):
    with pytest.raises(EventError, match=says):
        parse_event(json.dumps({**asdict(START), **changes}))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b"\xff\xfe",
        b'{"event": ["start"]}',
        b'{"event": "log"}',
        b'{"a":' * 5000,
    ]
    + [
        b'{"event": "invalid", "message": "\\ud800"}',
        b'{"event": "stop", "num_steps": 1e999, "tokens": 1, "peak_memory_mb": 1}',
    ]
    + [b'{"event": "invalid", "message": "' + b"x" * EVENT_BYTES + b'"}'],
)
def test_a_hostile_line_is_an_event_error(line):
    with pytest.raises(EventError) as error:
        parse_event(line)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 2.5},
        {"depth": 10**400},
        {"weights": {"w": [-1]}},
        {"weights": {"w": [10**400]}},
        {"laptop": {"a": {"b": 1}}},
        {"laptop": {"a": 10**400}},
        {"laptop": {"a": math.nan}},
    ],
)
def test_a_start_that_could_not_be_written_again_is_an_event_error(change):
    with pytest.raises(EventError):
        parse_event(json.dumps({**asdict(START), **change}))


@given(
    st.binary(max_size=200)
    | st.text(max_size=200)
    | st.recursive(st.none() | st.floats(), st.lists).map(json.dumps)
)
def test_any_line_is_an_event_or_an_event_error(line):
    with contextlib.suppress(EventError):
        parse_event(line)


def test_settings_survive_the_environment():
    settings = RunSettings("cpu", "tiny", "{}", "/data", 7, 12.5, "/run/w", 5, "20260101-000000-abcd", 1)
    env = settings.to_env()
    assert RunSettings.from_env(env) == settings and env["AUTORESEARCH_SEED"] == "7"
    assert RunSettings.from_env({}) == RunSettings()


@pytest.mark.parametrize(
    "env, says",
    [
        ({"AUTORESEARCH_SEED": "two"}, "AUTORESEARCH_SEED is 'two': expected int"),
        ({"AUTORESEARCH_BUDGET": "nan"}, "AUTORESEARCH_BUDGET is nan"),
        ({"AUTORESEARCH_BUDGET": "-1"}, "AUTORESEARCH_BUDGET is -1"),
        ({"AUTORESEARCH_LAUNCHER_FD": "1e3"}, "expected int"),
    ],
)
def test_an_odd_variable_is_named(env, says):
    with pytest.raises(UserError, match=says) as error:
        RunSettings.from_env(env)
    assert error.value.code == 2


def test_the_files_of_a_run(tmp_path):
    run = RunDir(tmp_path / "20260101-000000-abcd")
    run.path.mkdir()
    assert run.run_id == "20260101-000000-abcd" and run.read_record() == {} and run.trainer() is None
    assert list(run.read_events()) == [] and run.log_tail() == ""
    write_json(run.record, {"trainer": "train_cuda.py"})
    assert run.trainer() is None  # named, and not there
    (run.path / "train_cuda.py").write_text("pass")
    assert run.trainer() == run.path / "train_cuda.py"
    run.log.write_bytes(b"first\nsecond\xff\nthird\n")
    assert run.log_tail(2) == "second\ufffd\nthird"


def test_a_score_is_read_whole_or_not_at_all(tmp_path):
    run = RunDir(tmp_path)
    assert run.read_score() is None
    write_json(run.result, asdict(RESULT))
    assert run.read_score() == RESULT
    for damage in ({"val_bpb": 0.0}, {"val_bpb": -1.0}, {"val_bpb": "1.5"}, {"depth": 2.5}, {"seed": None}):
        write_json(run.result, {**asdict(RESULT), **damage})
        assert run.read_score() is None


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"[" * 100_000, b"9" * 5000, b"\0"])
def test_what_is_no_object_of_json_is_an_empty_one(tmp_path, content):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    path.write_bytes(content)
    assert read_json(path) == {}


def test_events_are_read_past_damage(tmp_path):
    run = RunDir(tmp_path)
    good = json.dumps({"at": 1.5, **asdict(EVENTS[1])})
    run.events.write_text(
        f"{good}\nnot JSON\n[]\n{{}}\n{json.dumps({'at': 'x', **asdict(EVENTS[1])})}\n{good}"
    )
    assert list(run.read_events()) == [(1.5, EVENTS[1])] * 2


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "null", "{", '{"trainer": 3}', '{"trainer": "../../etc/passwd"}', '{"trainer": ""}'),
        *('{"trainer": "a\\u0000b"}', f'{{"trainer": "{"x" * 300}"}}', '{"trainer": []}', '{"trainer": "."}'),
    ],
)
def test_a_damaged_record_names_no_trainer(tmp_path, content):
    run = RunDir(tmp_path)
    run.record.write_text(content)
    assert run.trainer() is None


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
