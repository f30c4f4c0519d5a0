"""`autoresearch noise`: how much val_bpb differs between seeds."""

from statistics import mean

from launcher.console import say
from launcher.ledger import Flag, Row
from launcher.run import Request, exit_code, run_once
from launcher.setting import Setting
from launcher.verdict import pooled_noise


def measure_noise(setting: Setting, repeats: int) -> int:
    """Run the unchanged trainer with `repeats` seeds and say how large an improvement must be.

    Returns the exit code.
    """
    rows: list[Row] = []
    for seed in range(1, repeats + 1):
        say(f"noise: run {seed} of {repeats}")
        request = Request(setting, f"noise: seed {seed}", seed, flags=(Flag.NOISE,))
        row = run_once(request, repetition=True)
        if not row.scored:
            return exit_code(row)
        rows.append(row)
    values = [row.val_bpb for row in rows if row.comparable]
    noise = pooled_noise([values])
    if noise is None:
        print("noise: fewer than two of the runs count (see their marks): nothing to compare")
        return 1
    print(f"noise_sigma: {noise.sigma:.6f}")
    print(f"noise_mean: {mean(values):.6f}")
    print(f"noise_runs: {len(values)}")
    print(f"noise_margin: {noise.margin():.6f}")
    print(
        f"an improvement of one run counts from {noise.margin():.6f} (p < 0.01); "
        f"repeated with a second seed, from {noise.margin(2, 2):.6f}"
    )
    if setting.short:
        print(f"{setting.budget:g} s is not the rules' budget: this counts for runs of the same budget alone")
    return 0
