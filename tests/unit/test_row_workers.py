"""tools/rows/workers.py: rows of all shares, whatever becomes of one of the processes."""

import sys
import threading
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from rows import workers
from rows.ready import Listed

from flashomni.lab.fidelity.comparison import Picture

LISTED = [Listed("recipe", name) for name in ("a", "b", "c", "d")]


class Threads(workers.Workers):
    """Threads in the place of processes, which do what a test says."""

    def __init__(self, jobs, act):
        self.jobs, self._act, self._running = jobs, act, {}
        self.started, self.lines, self.ended = [], [], []
        for number in range(jobs):
            self._start(number)

    def _start(self, number):
        self._end(number)
        mine, theirs = Pipe()
        self.started.append(number)
        self.lines.append(mine)
        threading.Thread(target=self._act, args=(self, number, theirs), daemon=True).start()
        process = SimpleNamespace(
            is_alive=lambda: True,
            kill=lambda: None,  # its end of the line is the thread's own to close
            join=lambda seconds=None: None,
            close=lambda: self.ended.append(number),
        )
        self._running[number] = (process, mine)
        return mine


def share(number, place):
    return [Picture(LISTED[place].name, number, 0, 40.0, 0.9, None, 5, 0.5)]


def asked(until=float("inf"), count=2):
    return workers.Asked("model", count, 1, LISTED, 0, until)


def test_rows_are_of_all_shares():
    """A method that one share has not is left out; fewer prompts than processes are no matter."""

    def act(self, number, line):
        told = line.recv()
        for place in range(told.first, len(LISTED)):
            failed = number == 1 and place == 2
            line.send((place, [] if failed else share(number, place)))
        line.send((None, None))

    heard = []
    found = Threads(3, act).looked(asked(), lambda name, done: heard.append((name, done)))
    assert [(p.method, p.prompt) for p in found.pictures] == [
        (name, number) for name in "abd" for number in (0, 1)
    ]
    assert found.left_out == ("c",)
    assert sorted(heard) == sorted((name, done) for name in "abcd" for done in (1, 2))


def test_one_that_dies_goes_on_behind_what_killed_it():
    """Its method is left out; it is started again at the next one, and not for ever."""

    def act(self, number, line):
        told = line.recv()
        for place in range(told.first, len(LISTED)):
            if number == 0 and place in self.deadly:
                line.close()
                return
            line.send((place, share(number, place)))
        line.send((None, None))

    Threads.deadly = {1}
    team = Threads(2, act)
    found = team.looked(asked(), lambda *_: None)
    assert found.left_out == ("b",) and team.started == [0, 1, 0]
    Threads.deadly = {0, 1, 2, 3}
    team = Threads(2, act)
    found = team.looked(asked(), lambda *_: None)
    assert found.left_out == ("a", "b", "c", "d") and not found.pictures
    assert team.started.count(0) == 1 + workers.AGAIN


@pytest.mark.parametrize("raises", [False, True])
def test_processes_and_their_lines_are_ended(raises):
    """Each that was started, also those in whose place another came, and whatever is raised."""

    def act(self, number, line):
        told = line.recv()
        if number == 0 and told.first == 0:
            line.close()
            return
        for place in range(told.first, len(LISTED)):
            line.send((place, share(number, place)))
        line.send((None, None))

    with suppress(KeyboardInterrupt), Threads(2, act) as team:
        team.looked(asked(), lambda *_: None)
        assert sorted(line.closed for line in team.lines) == [False, False, True]
        if raises:
            raise KeyboardInterrupt
    assert all(line.closed for line in team.lines) and sorted(team.ended) == [0, 0, 1]


def test_one_that_is_late_is_not_waited_for():
    """What all shares have when the time is up is there."""
    sent, end = threading.Barrier(3), threading.Event()

    def act(self, number, line):
        line.send((0, share(number, 0)))
        if number == 0:
            line.send((1, share(number, 1)))
            line.send((None, None))
        sent.wait(60)
        end.wait(60)

    team = Threads(2, act)
    sent.wait(60)
    found = team.looked(asked(until=0.0), lambda *_: None)
    assert [line.closed for line in team.lines] == [False, True] and team.ended == [1]
    end.set()
    assert {p.method for p in found.pictures} == {"a"} and found.left_out == ("b", "c", "d")
