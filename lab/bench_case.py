"""A case of lab.bench: two sides that were measured in turn, A B A B, and the ratio of them.

    "ours", "theirs"    speeds of two programs: a `row` each; or instead of these two
    "sides"             times under two conditions: {name: row}
    "ratio", "ratios"   the median of the ratios within a round, and the least and the most of them;
                        within a round, since a load from outside falls on both sides alike there
    "aim"               if the case has an aim of its own, or None; otherwise the bench's counts
"""
import statistics


def row(values: list[float], setting: str = "") -> dict:
    """One side: what it has measured in all rounds, and what its setting was."""
    return {"setting": setting, "median": statistics.median(values), "least": min(values),
            "most": max(values)}


def ratio(values: list[float], over: list[float]) -> dict:
    ratios = [a / b for a, b in zip(values, over, strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}


def case_of_speeds(ours: list[float], theirs: list[float], settings, **more) -> dict:
    """A case of two programs: ours over theirs; the aim is the smallest ratio."""
    return {"ours": row(ours, settings[0]), "theirs": row(theirs, settings[1]),
            **ratio(ours, theirs), **more}


def case_of_times(sides: dict[str, list[float]], setting: str = "", **more) -> dict:
    """A case of two conditions, {name: times}: the second over the first; the aim, None unless it
    is given, is the largest ratio."""
    first, second = sides.values()
    return {"sides": {name: row(values, setting) for name, values in sides.items()},
            **ratio(second, first), "aim": None, **more}


def print_case(name: str, case: dict, aim: float):
    """Print both sides of a case, their ratio with its range, and whether the aim is reached: the
    case's own, otherwise `aim`."""
    print(name)
    for side, found in (case.get("sides") or {k: case[k] for k in ("ours", "theirs")}).items():
        print(f"  {side:<24} {found['median']:>9,.4g} {found['least']:>9,.4g} "
              f"{found['most']:>9,.4g}  {found['setting']}")
    (low, high), aim, verdict = case["ratios"], case.get("aim", aim), ""
    if aim is not None:
        reached = case["ratio"] <= aim if "sides" in case else case["ratio"] >= aim
        verdict = f"  aim {aim}: {'reached' if reached else 'missed'}"
    print(f"  {'ratio':<24} {case['ratio']:>9.2f} {low:>9.2f} {high:>9.2f}{verdict}")
