"""`autoresearch noise`: how much val_bpb differs between seeds."""

from dataclasses import dataclass
from statistics import mean, stdev

from launcher.belief import visible_change
from launcher.console import print_object, say
from launcher.exit_codes import EXIT_DONE, EXIT_FAILED
from launcher.harness import read_trainer, source_hash
from launcher.ledger import Flag, Row, facts_of
from launcher.run import Request, exit_code, run_once
from launcher.runs import ledger
from launcher.setting import Setting
from launcher.verdict import fresh_seed

NIGHT = 100  # experiments of a night, for the message


def measure_noise(setting: Setting, repeats: int, as_json: bool = False) -> int:
    """Run the unchanged trainer with `repeats` seeds and say how large a change can be seen.

    A night needs none of it: it learns the noise as it goes. What is measured here counts there too.

    as_json: print one object

    Returns the exit code.
    """
    setting.require_device()
    rows: list[Row] = []
    first = fresh_seed(ledger().rows(), [source_hash(read_trainer(setting.trainer))])
    code = EXIT_DONE
    for seed in range(first, first + repeats):
        say(f"noise: run {seed - first + 1} of {repeats}, seed {seed}")
        row = run_once(Request(setting, f"noise: seed {seed}", seed, flags=(Flag.NOISE,)))
        rows.append(row)
        if not row.scored:
            code = exit_code(row)
            break
    values = [row.val_bpb for row in rows if row.comparable]
    noise = Noise(values, setting.budget) if code == EXIT_DONE and len(values) > 1 else None
    if code == EXIT_DONE and noise is None:
        code = EXIT_FAILED
    if as_json:
        facts = noise.facts() if noise else {}
        print_object({"exit_code": code, **facts, "runs": [facts_of(row) for row in rows]})
    elif noise:
        noise.print_lines(setting.short)
    elif code == EXIT_FAILED and rows[-1].scored:
        print("noise: fewer than two of the runs count (see their marks): nothing to compare")
    return code


@dataclass(frozen=True)
class Noise:
    """What the runs of one trainer say."""

    values: list[float]  # val_bpb of the runs that count, two at least
    budget: float  # seconds

    def facts(self) -> dict[str, float]:
        """Return the numbers by their names."""
        sigma = stdev(self.values)
        visible = visible_change(sigma, NIGHT)
        return {
            "noise_sigma": sigma,
            "noise_mean": mean(self.values),
            "noise_runs": len(self.values),
            "visible_in_a_run": visible.run,
            "visible_in_a_night": visible.night,
        }

    def print_lines(self, is_short: bool) -> None:
        """Print the numbers, greppable, and what they mean. is_short: the budget is not that of the rules."""
        facts = self.facts()
        for name, value in facts.items():
            print(f"{name}: {value}" if isinstance(value, int) else f"{name}: {value:.6f}")
        print(
            f"one run shows a change of {facts['visible_in_a_run']:.6f} (19 times of 20), {NIGHT} runs of "
            f"two trainers one of {facts['visible_in_a_night']:.6f}"
        )
        if is_short:
            print(
                f"{self.budget:g} s is not the rules' budget: this counts for runs of the same budget alone"
            )
