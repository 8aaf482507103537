"""What readers of a study's pictures rely on beyond there being one."""

from itertools import combinations

from matplotlib.text import Annotation

from train.plots import new_figure
from train.study.figures import _apart


def test_names_of_points_stay_inside_and_apart():
    """Also of points that lie together at the bottom, where moving all of them down would take them
    out of the picture."""
    figure, axes = new_figure(8, 5)
    points = [(0.1, y) for y in (0.01, 0.02, 0.03, 0.05, 0.99)]
    names: list[Annotation] = [
        axes.annotate(
            f"a name\nof two lines {y}", (x, y), xytext=(8, -3), textcoords="offset points"
        )
        for x, y in points
    ]
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _apart(figure, axes, names, points)
    boxes = [name.get_window_extent() for name in names]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes)
    # Beside its point where it can be.
    assert boxes[-1].y0 > frame.y0 + 0.85 * frame.height
