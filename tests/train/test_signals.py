"""Requests to stop by signal."""

import os
import signal
import threading

import pytest

from train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_interrupt_is_an_order():
    # Python's own handler, also where a shell has started the tests in the background and ignores
    # interrupts.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


def test_further_terminations_change_nothing():
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGTERM


def test_handlers_come_back_after_an_error_and_nest():
    with StopRequest() as outer:
        with pytest.raises(ZeroDivisionError), StopRequest():
            raise ZeroDivisionError
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer.requested


def test_outside_the_main_thread_nothing_is_caught():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
