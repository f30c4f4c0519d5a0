"""`autoresearch noise`: how much val_bpb differs between seeds."""

from statistics import mean, stdev

from launcher.belief import visible_change
from launcher.console import say
from launcher.harness import read_trainer, source_hash
from launcher.ledger import Flag, Row
from launcher.run import Request, exit_code, run_once
from launcher.runs import ledger
from launcher.setting import Setting
from launcher.verdict import fresh_seed

NIGHT = 100  # experiments of a night, for the message


def measure_noise(setting: Setting, repeats: int) -> int:
    """Run the unchanged trainer with `repeats` seeds and say how large a change can be seen.

    A night needs none of it: it learns the noise as it goes. What is measured here counts there too.

    Returns the exit code.
    """
    setting.require_device()
    rows: list[Row] = []
    first = fresh_seed(ledger().rows(), [source_hash(read_trainer(setting.trainer))])
    for seed in range(first, first + repeats):
        say(f"noise: run {seed - first + 1} of {repeats}, seed {seed}")
        row = run_once(Request(setting, f"noise: seed {seed}", seed, flags=(Flag.NOISE,)))
        if not row.scored:
            return exit_code(row)
        rows.append(row)
    values = [row.val_bpb for row in rows if row.comparable]
    if len(values) < 2:
        print("noise: fewer than two of the runs count (see their marks): nothing to compare")
        return 1
    sigma = stdev(values)
    visible = visible_change(sigma, NIGHT)
    print(f"noise_sigma: {sigma:.6f}")
    print(f"noise_mean: {mean(values):.6f}")
    print(f"noise_runs: {len(values)}")
    print(f"visible_in_a_run: {visible.run:.6f}")
    print(f"visible_in_a_night: {visible.night:.6f}")
    print(
        f"one run shows a change of {visible.run:.6f} (19 times of 20), {NIGHT} runs of two trainers one of "
        f"{visible.night:.6f}"
    )
    if setting.short:
        print(f"{setting.budget:g} s is not the rules' budget: this counts for runs of the same budget alone")
    return 0
