"""The picture of a forecast: the runs on their way to what it says, and the best size for the hours there are."""

from collections.abc import Sequence
from pathlib import Path

from nanogpt_lit.forecast.law import Forecast, Point
from nanogpt_lit.forecast.sizes import Sized

BLUE, ORANGE, GREY = "#33548f", "#e08f3e", "#999999"


def draw(
    own: Sized,
    points: Sequence[Point],
    forecast: Forecast,
    offers: Sequence[tuple[int, Forecast]],
    hours: float,
    path: Path,
) -> bool:
    """Draw the picture. Returns False without matplotlib, which is an extra.

    offers: weights of networks for so many hours, with what each would reach
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_work, by_size = figure.subplots(1, 2)
    whole = own.parameters * own.tokens
    sizes = sorted({point.parameters for point in points})
    for n, size in enumerate(sizes):
        of_size = sorted((p.parameters * p.tokens / whole, p.loss) for p in points if p.parameters == size)
        shade = (0.2 + 0.6 * n / len(sizes), 0.33 + 0.4 * n / len(sizes), 0.56 + 0.3 * n / len(sizes))
        by_work.plot(*zip(*of_size, strict=True), "o-", color=shade, markersize=4, label=f"{size:,} weights")
    error = [[forecast.loss - forecast.low], [forecast.high - forecast.loss]]
    by_work.errorbar([1], [forecast.loss], yerr=error, fmt="D", color=ORANGE, capsize=4, label="forecast, 90 %")
    by_work.set(xscale="log", xlabel="weights x tokens, as a share of the run's", title="validation loss of the runs")
    weights = [parameters for parameters, _ in offers]
    by_size.plot(weights, [each.loss for _, each in offers], color=BLUE)
    by_size.fill_between(
        weights,
        [each.low for _, each in offers],
        [each.high for _, each in offers],
        color=BLUE,
        alpha=0.2,
        label="90 %",
    )
    by_size.axvline(own.parameters, color=GREY, linestyle=":", label="yours")
    by_size.set(xscale="log", xlabel="weights", title=f"loss after {hours:.3g} hours, by the size of the network")
    for axes in (by_work, by_size):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
