"""Items mapped in threads: all of them, in any order, and what happens to errors."""

import threading

import pytest

from experiments.harness.parallel import map_as_finished


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_every_item_has_its_result(at_once):
    running, most = [], []

    def square(number):
        running.append(number)
        most.append(len(running))
        running.remove(number)
        return number**2

    assert dict(map_as_finished(square, range(7), at_once)) == {number: number**2 for number in range(7)}
    assert max(most) <= at_once


def test_items_are_mapped_at_once():
    both = threading.Barrier(2)
    assert sorted(map_as_finished(lambda number: both.wait(10) >= 0, range(2), 2)) == [(0, True), (1, True)]


def test_an_error_is_raised_at_once():
    released = threading.Event()

    def broken(number):
        if number == 0:
            raise ValueError("broken")
        released.wait(10)

    with pytest.raises(ValueError, match="broken"):
        list(map_as_finished(broken, range(2), 2))
    released.set()


def test_an_interrupt_waits_for_the_others_and_begins_nothing():
    begun, finished = [], []

    def interrupted(number):
        begun.append(number)
        if number == 0:
            raise KeyboardInterrupt
        finished.append(number)

    with pytest.raises(KeyboardInterrupt):
        list(map_as_finished(interrupted, iter(range(2)), 2))
    assert finished == [1]
    with pytest.raises(KeyboardInterrupt):
        list(map_as_finished(interrupted, range(5), 1))
    assert begun == [0, 1, 0]
