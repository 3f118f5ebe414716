"""A picture of a load: a row for each request, its wait for the first token and its tokens over time."""

from __future__ import annotations

from pathlib import Path

from pellucid.bench.serve_load import LoadRun
from pellucid.errors import InvalidRequestError
from pellucid.files import whole_file

_WAIT, _TOKENS, _FAILED = "#c9c9c9", "#2a6f97", "#bc4749"
_FORMATS = (".png", ".svg")


def check_timeline(path: Path) -> None:
    """Refused before anything runs, not after.

    Raises:
        InvalidRequestError: another format, a folder that does not exist, or matplotlib is missing.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InvalidRequestError(
            None, f"plot_timeline is {path}", limit=f"it takes a file that ends in {' or '.join(_FORMATS)}"
        )
    if not path.absolute().parent.is_dir():
        raise InvalidRequestError("plot_timeline", (f"{path} cannot be written: its folder does not exist",))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        text = "plot_timeline needs matplotlib, which is not installed: pip install 'pellucid[bench]'"
        raise InvalidRequestError("plot_timeline", (text,)) from None


def draw_timeline(run: LoadRun, path: Path, title: str) -> None:
    """Requests from the top down in the order in which they were sent; a dot for each chunk."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    answers = sorted(run.answers.values(), key=lambda answer: answer.started)
    figure, axis = plt.subplots(figsize=(9, min(20.0, 1.8 + 0.16 * len(answers))))
    dot = max(0.3, min(3.0, 120 / max(len(answers), 1)))
    for row, answer in enumerate(answers):
        start, ttft = answer.started - run.began, answer.ttft if answer.ttft is not None else answer.seconds
        axis.broken_barh([(start, ttft)], (row - 0.4, 0.8), color=_FAILED if answer.error else _WAIT)
        axis.broken_barh([(start + ttft, answer.latency - ttft)], (row - 0.4, 0.8), color=_TOKENS, alpha=0.35)
        axis.plot(
            [start + at for at in answer.chunk_times], [row] * len(answer.chunk_times), ".", ms=dot, color=_TOKENS
        )
    axis.set_ylim(len(answers) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("seconds")
    axis.set_ylabel("request")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (_WAIT, _TOKENS, _FAILED)]
    axis.legend(handles, ("to the first token", "tokens", "failed"), loc="upper right", fontsize=8, frameon=False)
    figure.tight_layout()
    with whole_file(path) as file:
        figure.savefig(file, dpi=130, format=path.suffix[1:].lower())
    plt.close(figure)
