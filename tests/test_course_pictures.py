"""The pictures of lectures 6 to 10 show what the code does now: drawn again, they are the same."""
import json

import pytest
from PIL import Image

from course import draw_rl
from lib.cli import UserError
from lib.common import ROOT


@pytest.mark.parametrize("name", ["drafts", "rewards"])
def test_a_picture_is_drawn_as_it_is_kept(name, tmp_path):
    draw_rl.run(draw_rl.Args(what=[name], out=str(tmp_path)))
    file = draw_rl.PICTURES[name][1]
    drawn, kept = (Image.open(folder / file).convert("RGB")
                   for folder in (tmp_path, ROOT / "course" / "pictures"))
    assert drawn.size == kept.size and drawn.tobytes() == kept.tobytes()


def test_a_timeline_is_as_long_as_its_run(tmp_path):
    """The longer of two runs takes the whole width, the other one half of it."""
    for name, dt in (("slow", 4.0), ("fast", 2.0)):
        (tmp_path / name).mkdir()
        steps = [{"step": i, "dt": dt, "waited": dt / 2, "idle": 0.0} for i in range(1, 4)]
        lines = "".join(json.dumps(step) + "\n" for step in steps)
        (tmp_path / name / "log.jsonl").write_text(lines)
    runs = f"{tmp_path / 'slow'},{tmp_path / 'fast'}"
    draw_rl.run(draw_rl.Args(what=["timeline"], runs=runs, out=str(tmp_path)))
    page = Image.open(tmp_path / "09-timeline.png").convert("RGB")
    rows = [[page.getpixel((x, y)) for x in range(page.width)] for y in (115, 320)]
    blue = [[x for x, (red, _, b) in enumerate(row) if b > 180 > red] for row in rows]
    assert abs(max(blue[0]) - 1780) < 5 and abs(max(blue[1]) - 1040) < 5


def test_what_can_not_be_drawn_is_one_clear_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "dt": 2.0}\n')
    for what, runs, said in (("other", "", "no picture"), ("timeline", "", "two run folders"),
                             ("timeline", str(tmp_path), "two run folders"),
                             ("timeline", f"{tmp_path},{tmp_path}", "not the runs of lecture 9")):
        with pytest.raises(UserError, match=said):
            draw_rl.run(draw_rl.Args(what=[what], runs=runs))
