"""The paper's claims as lab sheets: a command each, an answer with an interval, a verdict.

    python -m lab list                      all sheets, how long they take, what we found
    python -m lab show qk_norm              the answer that lies beside a sheet; without a name, all
    python -m lab qk_norm muon              run sheets; an interrupted one goes on
    python -m lab qk_norm --seed=4711       with other seeds, such as your student number
    python -m lab all                       all that take less than 20 minutes on two cores
    python -m lab all --kind=night          all that take longer

Each leaves a page, out/lab/NAME/report.html. lab/sheet.py explains the verdicts.
"""
import lib  # first of all, before torch: see lib/__init__.py

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab import sheet
from lib.cli import cli, main, Natural, Seed
from lib.common import clock


@dataclass
class Args:
    what: list[str] = dataclasses.field(default_factory=list)   # list, all, show, or sheets' names
    seed: Seed = 0                # the first seed
    seeds: Natural = 0            # how many; 0: as many as the sheet says, three at least
    kind: Literal["bench", "night"] = "bench"   # which ones `all` means
    out: str = "out/lab"          # a folder a sheet: report.html, answer.json, a folder a run
    keep: bool = False            # put the answers beside the sheets, in lab/sheets/


def print_list(names: list[str]):
    """A line for each sheet: name, kind, minutes, verdict; then its claim."""
    for name in names:
        plan, found = sheet.load(name).SHEET, sheet.kept(name)
        verdict = found["verdict"] if found else "not yet run"
        print(f"{name:<15} {plan.kind:<6} {clock(60 * plan.minutes):>9}  {verdict}\n"
              f"{'':<15} {sheet.claim(name)}")
    print("\nbench: 20 minutes of two cores at most; night: longer. Times are those of all runs on "
          "one core.\n`python -m lab NAME` runs one, `python -m lab show NAME` prints our answer.")


def run(args: Args):
    first, *others = args.what or ["list"]
    if first == "list":
        return print_list(others or sheet.names())
    if first == "show":
        for name in others or sheet.names():
            sheet.load(name)
            if found := sheet.kept(name):
                sheet.show(name, found)
            else:
                print(f"\n{sheet.claim(name)}\nnot yet run")
        return
    chosen = [first, *others]
    if chosen == ["all"]:
        chosen = [name for name in sheet.names() if sheet.load(name).SHEET.kind == args.kind]
    plans = [sheet.load(name).SHEET for name in chosen]     # refuses an unknown name at once
    if args.keep:
        for name, plan in zip(chosen, plans):
            sheet.check_rule(name, sheet.rule_of(name), args.seeds or plan.seeds)
    for done, name in enumerate(chosen, 1):
        found = sheet.run(name, args.seed, args.seeds, Path(args.out))
        sheet.show(name, found)
        print(f"the page is {Path(args.out) / name / 'report.html'}")
        if args.keep:
            sheet.keep(name, found)
        if left := plans[done:]:
            minutes = sum(plan.minutes_of(args.seeds or plan.seeds) for plan in left)
            print(f"\nsheets left: {len(left)}, about {clock(60 * minutes)}")


if __name__ == "__main__":
    main(lambda: run(cli(Args, about=__doc__, positional="what")))
