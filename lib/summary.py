"""Figures over several categories of the gym: means by family and tier, composites, differences.

Everything is computed from a table of lib/evaluation.py, {category: row}, of which the rows'
`accuracy`, `low`, `high`, `blank` and `chance` are used, and for differences `solved`.
"""
import gym
from lib.scoring import mean_interval, paired_difference

FAMILIES = ("perception", "reasoning", "agent")
TIERS = ("perception", "grounding", "one action", "trajectory")     # the paper's hierarchy [C]

# Four composites after the groups of the paper's evaluation [C], of categories of ours [O]. The
# names are ours: a figure here can't be compared with the paper's, whose benchmarks are others.
COMPOSITES = {
    # multimodal coding: what has to be written is code, and it follows from a picture; reading a
    # program is a part of it
    "pictures to code": ("ui_to_code", "ui_polish", "code_output"),
    # multimodal tool use: the answer is not in the first picture, but in what tools make visible
    "tools for seeing": ("visual_tools", "image_mining"),
    # GUI agents: from finding an element to errands through several apps, and judging them
    "screens": ("ui_ground", "gui_click", "gui_next_action", "gui_form", "gui_navigate",
                "gui_multi_app", "gui_critic"),
    # text-only ability: the only categories without any picture, coding and tools again
    "text alone": ("text_code", "text_tools")}


def ahead(row: dict) -> bool:
    """Whether a category's accuracy is 20 points or more above blank pictures and above chance."""
    return row["accuracy"] >= 0.2 + max(row["blank"], row["chance"])


def groups(categories) -> dict[str, dict[str, list[str]]]:
    """{kind: {name: its categories}} of those that were played: by family, by tier, and the
    composites of which none is missing."""
    played = list(categories)
    env = {name: gym.CATEGORIES[name].env for name in played}
    families = {family: [name for name in played if env[name].family == family]
                for family in FAMILIES}
    tiers = {f"{tier} {words}": [name for name in played if env[name].tier == tier]
             for tier, words in enumerate(TIERS)}
    found = {"all": {"mean": played}, "family": families, "tier": tiers,
             "composite": {name: list(parts) for name, parts in COMPOSITES.items()
                           if set(parts) <= set(played)}}
    return {kind: {name: parts for name, parts in rows.items() if parts}
            for kind, rows in found.items()}


def not_played(categories) -> dict[str, list[str]]:
    """{composite: its categories that were not played} of the composites that are left out."""
    missing = {name: [part for part in parts if part not in categories]
               for name, parts in COMPOSITES.items()}
    return {name: parts for name, parts in missing.items() if parts}


def mean_of(rows: list[dict]) -> dict:
    """The mean over categories, each counting the same, with its 95% interval (`mean_interval`);
    and how many of them are `ahead`.

    The interval is about other tasks of the same categories. Categories are not drawn at random, so
    nothing is said about others.
    """
    mean, low, high = mean_interval([(r["accuracy"], r["low"], r["high"]) for r in rows])
    blank, chance = (sum(row[key] for row in rows) / len(rows) for key in ("blank", "chance"))
    return {"accuracy": mean, "low": low, "high": high, "blank": blank, "chance": chance,
            "categories": len(rows), "ahead": sum(map(ahead, rows))}


def summary(table: dict) -> dict[str, dict[str, dict]]:
    """{kind: {name: mean_of its categories}} of the `groups` of a table."""
    return {kind: {name: mean_of([table[part] for part in parts]) for name, parts in rows.items()}
            for kind, rows in groups(table).items()}


# ---- several tables beside each other ------------------------------------------------------------

def outcome(score) -> str:
    """A character for the score of a task: 1 solved, 0 not, x an error."""
    return "x" if score.error else str(int(score.solved))


def difference(first: dict, second: dict) -> tuple[float, float, float] | None:
    """(difference, low, high) between the accuracies of two rows about the same tasks, second minus
    first; None if no task has a score in both."""
    pairs = [(a, b) for a, b in zip(first["solved"], second["solved"], strict=True)
             if "x" not in a + b]
    if not pairs:
        return None
    return paired_difference([a == "1" for a, _ in pairs], [b == "1" for _, b in pairs])


def compare(tables: dict[str, dict], first: str) -> dict[str, dict[str, dict]]:
    """{row: {column: figures}}: several tables about the same tasks, each one a column.

    The rows are the categories that all tables have, and the `groups` of several of them, without
    those that equal an earlier one. figures: accuracy, low and high; of a category also replies, of
    a task; in every column but `first` also the `difference`, (difference, low, high) against
    `first`. That of a group is the mean of its categories' differences.
    """
    found = {}
    for name in tables[first]:
        if all(name in table for table in tables.values()):
            found[name] = {}
            for column, table in tables.items():
                kept = ("accuracy", "low", "high", "replies")
                row = found[name][column] = {key: table[name][key] for key in kept}
                moved = column != first and difference(tables[first][name], table[name])
                if moved:
                    row["difference"] = moved
    distinct = {}               # {name: categories}
    for rows in groups(found).values():
        distinct |= {name: parts for name, parts in rows.items()
                     if len(parts) > 1 and parts not in distinct.values()}
    for name, parts in distinct.items():
        found[name] = {}
        for column in tables:
            rows = [found[part][column] for part in parts]
            means = mean_interval([(row["accuracy"], row["low"], row["high"]) for row in rows])
            row = found[name][column] = dict(zip(("accuracy", "low", "high"), means))
            if all("difference" in part for part in rows):
                row["difference"] = mean_interval([part["difference"] for part in rows])
    return found


def percentages(found: dict[str, dict[str, dict]], first: str) -> dict[str, dict[str, float]]:
    """The result of `compare` as `figures` of a report.json, which `lab.report` shows: the
    accuracies in percent, and the differences in points."""
    figures = {}
    for name, columns in found.items():
        figures[name] = {f"{column}, %": 100 * row["accuracy"] for column, row in columns.items()}
        figures[name] |= {f"{column} - {first}": 100 * row["difference"][0]
                          for column, row in columns.items() if "difference" in row}
    return figures
