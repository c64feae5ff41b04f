"""The bar for notebooks and terminals."""

import io

import pytest
from rich.console import Console

import flashomni


@pytest.mark.parametrize("seen", [True, False])
def test_a_bar_follows_where_somebody_watches(seen):
    """Stage, count and total; a stage is text; nothing goes into a log file."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=seen, width=100)
    with flashomni.Bar(console) as bar:
        bar("recording", 3, 12)
        bar("[bold]trying\x1b[2J", 0, 0)
        bar("[bold]trying\x1b[2J", 12, 12)
    text = file.getvalue()
    assert (text != "") is seen
    if seen:
        assert "[bold]trying" in text and "12/12" in text and "\x1b[2J" not in text


def test_a_bar_ends_where_what_it_follows_fails():
    """The cursor is back, and so is the error."""
    file = io.StringIO()
    with (
        pytest.raises(ValueError, match="no prompt"),
        flashomni.Bar(Console(file=file, force_terminal=True)) as bar,
    ):
        bar("recording", 1, 2)
        raise ValueError("no prompt")
    assert file.getvalue().rstrip().endswith("\x1b[?25h")
