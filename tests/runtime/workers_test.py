"""Tests of finemem_jax/runtime/workers.py: every item comes back once, whatever stands between."""

import random

import pytest

from finemem_jax.runtime import workers


class Slow:
    """Returns one item a call, the newest first, in capitals; remembers what it was given and had taken back."""

    def __init__(self):
        self.given, self.cancelled, self._waiting = [], [], {}

    def submit(self, item):
        self.given.append(item)
        self._waiting[len(self.given)] = item
        return len(self.given)

    def collect(self, wait=True):
        if not (wait and self._waiting):
            return []
        request_id, item = self._waiting.popitem()
        return [(request_id, item.upper())]

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        return self._waiting.pop(request_id, None) is not None


def drained(worker):
    """All that is still to come, by request_id; nothing comes twice."""
    results = {}
    while done := worker.collect():
        assert not results.keys() & dict(done).keys()
        results |= done
    return results


def test_work_keeps_the_order_of_the_items():
    assert workers.run_all(Slow(), ["a", "b", "a", "c"]) == ["A", "B", "A", "C"]
    assert workers.run_all(Slow(), []) == []


def test_work_takes_back_what_it_does_not_wait_for():
    class Broken(Slow):
        def collect(self, wait=True):
            raise KeyboardInterrupt

    broken = Broken()
    with pytest.raises(KeyboardInterrupt):
        workers.run_all(broken, ["a", "b"])
    assert broken.cancelled == [1, 2]


def test_a_function_is_called_once_for_all():
    calls = []

    def double(items):
        calls.append(items)
        return [2 * item for item in items]

    batched = workers.Batched(double)
    first, second, third = (batched.submit(item) for item in (1, 5, 1))
    assert batched.cancel(second) and not batched.cancel(second)
    assert drained(batched) == {first: 2, third: 2}
    assert calls == [[1, 1]]
    assert workers.run_all(batched, [3]) == [6] and calls[1:] == [[3]]


def test_a_function_that_returns_too_few_is_an_error():
    batched = workers.Batched(lambda items: items[1:])
    batched.submit("a")
    with pytest.raises(ValueError, match="zip"):
        batched.collect()


def test_a_mapped_worker_translates_both_ways():
    slow = Slow()
    mapped = workers.Transformed(slow, lambda number: f"x{number}", lambda text: int(text[1:]))
    assert workers.run_all(mapped, [4, 2]) == [4, 2]
    assert slow.given == ["x4", "x2"]
    request_id = mapped.submit(7)
    assert mapped.cancel(request_id) and drained(mapped) == {}


def test_equal_items_are_given_on_once():
    slow = Slow()
    once = workers.Memoized(slow)
    assert workers.run_all(once, ["b", "a", "b", "a"]) == ["B", "A", "B", "A"]
    # And not again later; what is known comes before anything is waited for.
    request_ids = [once.submit(item) for item in ("c", "a")]
    assert once.collect() == [(request_ids[1], "A")]
    assert drained(once) == {request_ids[0]: "C"}
    assert slow.given == ["b", "a", "c"]


def test_an_item_is_taken_back_when_nobody_wants_it_any_more():
    slow = Slow()
    once = workers.Memoized(slow)
    one, two = once.submit("a"), once.submit("a")
    assert once.cancel(one) and slow.cancelled == []
    assert once.cancel(two) and slow.cancelled == [1] and not once.cancel(two)
    assert drained(once) == {}
    # It may be wanted again.
    assert workers.run_all(once, ["a"]) == ["A"] and slow.given == ["a", "a"]


def test_a_failure_is_not_remembered():
    class Flaky(Slow):
        broken = True

        def collect(self, wait=True):
            if self.broken:
                raise ConnectionError("down")
            return super().collect(wait)

    flaky = Flaky()
    once = workers.Memoized(flaky)
    once.submit("a")
    with pytest.raises(ConnectionError):
        once.collect()
    assert once.collect() == [] and flaky.cancelled == [1]
    flaky.broken = False
    assert workers.run_all(once, ["a"]) == ["A"]


def test_only_so_much_is_remembered(monkeypatch):
    monkeypatch.setattr(workers, "_REMEMBERED", 2)
    slow = Slow()
    once = workers.Memoized(slow)
    for item in "abcab":
        workers.run_all(once, [item])
    # "a" was forgotten when "c" came, "b" when "a" came again.
    assert slow.given == list("abcab")
    # Of three at once, the first to come back is forgotten: the newest, here.
    workers.run_all(once, list("xyz"))
    assert workers.run_all(once, ["x", "y"]) == ["X", "Y"] and slow.given[5:] == list("xyz")


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_or_comes_twice(seed):
    rng = random.Random(seed)
    once = workers.Memoized(Slow())
    wanted, got, taken_back = {}, {}, set()
    for _ in range(200):
        action = rng.random()
        if action < 0.5:
            item = rng.choice("abcdefghij")
            wanted[once.submit(item)] = item.upper()
        elif action < 0.7 and wanted:
            request_id = rng.choice(list(wanted))
            if once.cancel(request_id):
                assert request_id not in got and request_id not in taken_back
                taken_back.add(request_id)
        else:
            done = once.collect()
            assert not dict(done).keys() & (got.keys() | taken_back)
            got |= done
    got |= drained(once)
    assert got == {request_id: result for request_id, result in wanted.items() if request_id not in taken_back}


def test_who_does_not_wait_gets_what_is_there():
    slow = Slow()
    once = workers.Memoized(workers.Transformed(slow, str.lower, str))
    request_id = once.submit("A")
    assert once.collect(wait=False) == []
    assert once.collect() == [(request_id, "A")]
    later = once.submit("A")
    assert once.collect(wait=False) == [(later, "A")]
    batched = workers.Batched(list)
    request_id = batched.submit("x")
    assert batched.collect(wait=False) == [] and batched.collect() == [(request_id, "x")]


def test_users_of_one_worker_get_their_own():
    slow = Slow()
    shared = workers.Shared(slow)
    left, right = shared.port(), shared.port()
    first, second, third = left.submit("a"), right.submit("b"), right.submit("c")
    # The newest is done first; what belongs to others is kept for them.
    assert left.collect(wait=False) == []
    assert left.collect() == [(first, "A")]
    assert left.collect() == []
    assert right.cancel(second) and not right.cancel(second) and not left.cancel(third)
    assert right.collect(wait=False) == [(third, "C")]
    assert slow.cancelled == []
    fourth = left.submit("d")
    assert left.cancel(fourth) and slow.cancelled == [fourth] and drained(left) == drained(right) == {}


@pytest.mark.parametrize("seed", range(10))
def test_sharing_loses_nothing(seed):
    rng = random.Random(seed)
    shared = workers.Shared(Slow())
    ports = [workers.Memoized(shared.port()) for _ in range(3)]
    wanted, got = [{}, {}, {}], [{}, {}, {}]
    for _ in range(200):
        i = rng.randrange(3)
        if rng.random() < 0.6:
            item = rng.choice("abcdefghijkl") + str(i)
            wanted[i][ports[i].submit(item)] = item.upper()
        else:
            got[i] |= ports[i].collect(wait=rng.random() < 0.5)
    for port, results in zip(ports, got, strict=True):
        results |= drained(port)
    assert got == wanted
