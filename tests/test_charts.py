"""Charts: every value can be read exactly, and every question has one answer."""
import pytest

from tasks import CATEGORIES, Task, verify
from tasks.base import box, stream
from tasks.charts import random_chart, Plot


def charts(level, count=60):
    for seed in range(count):
        yield random_chart(stream(Task("chart_read", seed, level)), level, False)


@pytest.mark.parametrize("level", range(5))
def test_figures_lie_on_gridlines_or_are_printed(level):
    kinds = set()
    for chart in charts(level):
        kinds.add(chart.kind)
        values = [value for _, _, value in chart.facts]
        places = [(series if chart.kind == "bar" else "", name, value)
                  for series, name, value in chart.facts]
        assert len(set(places)) == len(places)              # no mark hides another
        assert len(chart.series) == (1 if chart.kind == "pie" else (1, 1, 2, 2, 3)[level])
        if chart.kind == "pie":
            assert sum(values) == 100 and min(values) >= 6
        elif chart.step:
            assert all(value % chart.step == 0 for value in values)
        else:
            assert chart.kind == "bar" and len(chart.series) == 1
        assert max(values) < 1000                           # or they would be judged as years
    assert kinds == {"bar", "line", "pie", "scatter"}


def test_bars_and_dots_are_drawn_at_their_values():
    """At the place that the scale gives a figure, the picture has the colour of its series."""
    for seed in range(40):
        rng = stream(Task("chart_read", seed, 4))
        chart = random_chart(rng, 4, False)
        plot = Plot(chart, rng, 4, False, 512)
        if chart.kind not in ("scatter", "line"):
            continue
        for values, hue in zip(chart.series.values(), plot.hues):
            for i, (name, value) in enumerate(values.items()):
                spot = tuple(map(round, plot.at(*plot.spot(name, value, i))))
                assert plot.image.getpixel(spot) == hue


def test_sums_follow_from_the_facts():
    for seed in range(60):
        env = CATEGORIES["chart_arith"].env(Task("chart_arith", seed, 2))
        env.reset()
        values = [value for _, _, value in env.chart.facts]
        if " + " in env.why:
            assert any(a + b == env.gold for a in values for b in values)
        elif " - " in env.why:
            assert any(a - b == env.gold for a in values for b in values)
        else:
            assert str(env.gold) in env.why


def test_words_must_be_exact_and_numbers_close():
    assert verify.value({"reply": box("apr"), "gold": "Apr"}) == 1
    assert verify.value({"reply": box("Apr, May"), "gold": "Apr"}) == 0
    assert verify.value({"reply": box("101"), "gold": 100}) == 1
    assert verify.value({"reply": box("1985"), "gold": 1984}) == 0
