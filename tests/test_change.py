"""What an edit changed: constants by name, other code as a patch."""

from made_up import TRAINER

from launcher.setting import resolve
from night.change import compare, resolve_constants


def change(house, *edits):
    new = TRAINER
    for old, by in edits:
        new = new.replace(old, by)
    return compare(TRAINER, new, resolve("cpu").platform.start)


def test_a_constant_is_told_by_its_values(house):
    told = change(house, ("START.n_embd  # the width", "640"), ("0.04", "0.05"))
    assert told.lines("f") == ["N_EMBD: START.n_embd (64) -> 640", "MATRIX_LR: 0.04 -> 0.05"]


def test_other_code_is_told_as_a_patch(house):
    told = change(house, ("x = x + attention(x)", "x = x + 2 * attention(x)"), ("0.04", "0.05"))
    assert told.constants == ["MATRIX_LR: 0.04 -> 0.05"]
    assert [line for line in told.patch if line[0] in "+-"] == [
        "-    x = x + attention(x)",
        "+    x = x + 2 * attention(x)",
    ]


def test_a_constant_that_is_new_or_gone_is_code(house):
    assert change(house, ("MATRIX_LR = 0.04\n", "")).lines("f")[1:] == [
        " N_EMBD = START.n_embd  # the width",
        "-MATRIX_LR = 0.04",
        " WARMUP_RATIO = 0.05",
    ]


def test_a_long_patch_is_told_by_its_size(house):
    told = change(house, ("    return x + mlp(x)\n", "    x = x\n" * 40))
    assert told.lines("runs/r1/train_cuda.py") == ["+40 -1 lines, runs/r1/train_cuda.py"]


def test_a_trainer_that_does_not_parse_is_told_as_a_patch(house):
    assert "-MATRIX_LR = 0.04" in change(house, ("MATRIX_LR = 0.04", "MATRIX_LR = = 1")).patch


def test_the_same_trainer_has_no_change(house):
    assert change(house).lines("f") == []


def test_constants_are_resolved_for_this_machine(house):
    start = resolve("cpu").platform.start
    assert resolve_constants(TRAINER, start) == {
        "N_LAYER": 2,
        "N_EMBD": 64,
        "MATRIX_LR": 0.04,
        "WARMUP_RATIO": 0.05,
    }
