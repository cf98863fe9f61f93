"""Tests of finemem_jax/sampling/slots.py: plans carried out on rows of token ids instead of keys and values."""

import random

import numpy as np
import pytest

from finemem_jax.sampling.slots import SLOTS, STORE, Slots
from finemem_jax.types import Request

SHARED_PREFIX, POSITIONS = (1, 2, 3), 24


def request(group_prefix=(), suffix=(9,), max_new_tokens=4):
    ids = (*SHARED_PREFIX, *group_prefix, *suffix)
    return Request(ids, (3, 3 + len(group_prefix), len(ids)), max_new_tokens, 1.0, (0, 0))


class Simulated:
    """Slots whose caches are lists of ids: computing a token appends it, copying a row copies it."""

    def __init__(self, num_slots, num_stored, data_shards=1, stored_positions=POSITIONS):
        def empty(rows, positions):
            return [(np.zeros((rows, 1, 1, positions)), np.zeros((rows, 1, positions, 1)))]

        caches = {SLOTS: empty(num_slots, POSITIONS), STORE: empty(num_stored, stored_positions)}
        self.slots = Slots(SHARED_PREFIX, None, caches, data_shards=data_shards)
        self.sizes = {SLOTS: num_slots // data_shards, STORE: num_stored // data_shards}
        self.rows = {SLOTS: [[] for _ in range(num_slots)], STORE: [[] for _ in range(num_stored)]}
        self.computed, self.stored_positions = 0, stored_positions

    def admit(self, numbered):
        admissions = self.slots.admit(numbered)
        for stage in range(1 + max(admission.stage for admission in admissions)):
            of_stage = [admission for admission in admissions if admission.stage == stage]
            for admission in of_stage:
                if admission.source:
                    name, row = admission.source
                    assert row // self.sizes[name] == admission.slot // self.sizes[SLOTS], "of another data shard"
                    # What a shorter row does not hold stays as it was.
                    came = self.rows[name][row]
                    self.rows[SLOTS][admission.slot] = came + self.rows[SLOTS][admission.slot][len(came) :]
            for admission in of_stage:
                row = self.rows[SLOTS][admission.slot]
                assert tuple(row[: admission.cached]) == admission.suffix[: admission.cached], (
                    "what it counts on is not there"
                )
                if admission.duplicate_of is None:
                    assert admission.cached < len(admission.suffix), "the last token's state must be computed"
                    self.computed += len(admission.suffix) - admission.cached
                row[admission.cached :] = admission.suffix[admission.cached :]
            for admission in of_stage:
                if admission.saved is not None:
                    self.rows[STORE][admission.saved] = self.rows[SLOTS][admission.slot][: self.stored_positions]
        return admissions

    def leave(self, slot, drawn):
        """The slot has drawn some tokens; all but the last went through the cache."""
        self.slots.occupants[slot].drawn[0].extend(drawn)
        self.rows[SLOTS][slot] += drawn[:-1]
        return self.slots.leave(slot)


def test_a_group_at_its_first_step():
    """Eight rollouts with one prompt: computed once, and one of them is no copy."""
    simulated = Simulated(8, 2)
    admissions = simulated.admit([(i, request((4, 5), (6, 7))) for i in range(8)])
    assert simulated.computed == 4
    assert [admission.duplicate_of is None for admission in admissions] == [True] + [False] * 7
    assert sorted(admission.slot for admission in admissions) == list(range(8))


def test_a_group_prefix_is_computed_once_for_those_that_go_on_otherwise():
    simulated = Simulated(4, 2)
    simulated.admit([(i, request((4, 5, 6), (7, i))) for i in range(4)])
    assert simulated.computed == 3 + 2 + 3 * 1  # Even the 7 is had from the first.


def test_a_group_prefix_outlives_its_slots():
    simulated = Simulated(1, 1)
    simulated.admit([(0, request((4, 5, 6)))])
    simulated.leave(0, [8])
    simulated.admit([(1, request((), (20, 21)))])
    simulated.leave(0, [8])
    before = simulated.computed
    simulated.admit([(2, request((4, 5, 6), (30,)))])
    assert simulated.computed == before + 1


def test_of_a_long_group_prefix_the_store_keeps_what_goes_in():
    simulated = Simulated(1, 1, stored_positions=2)
    before, admission = 0, None
    for i, (group_prefix, suffix) in enumerate([((4, 5, 6), (9,)), ((), (20, 21)), ((4, 5, 6), (30,))]):
        before = simulated.computed
        (admission,) = simulated.admit([(i, request(group_prefix, suffix))])
        simulated.leave(0, [8])
    assert simulated.computed == before + 2
    assert admission is not None and admission.saved is None


def test_a_conversation_goes_on_in_its_slot():
    simulated = Simulated(2, 1)
    simulated.admit([(0, request((), (10, 11)))])
    simulated.leave(0, [12, 13])
    (admission,) = simulated.admit([(1, request((), (10, 11, 12, 13, 14)))])
    # 12 went through the cache, 13 was drawn and did not.
    assert (admission.slot, admission.source, admission.cached) == (0, None, 3)


def test_another_shared_prefix_makes_all_worthless():
    simulated = Simulated(1, 1)
    simulated.admit([(0, request((4, 5)))])
    simulated.leave(0, [8])
    simulated.slots.take_over((7, 7, 7), None)
    simulated.admit([(1, request((4, 5)))])
    assert simulated.computed == 6


def test_data_shards_do_not_look_at_each_other():
    """Two data shards of two slots: a prompt goes where it is known, and is computed again once there is no room."""
    simulated = Simulated(4, 2, data_shards=2)
    admissions = simulated.admit([(i, request((4, 5), (6,))) for i in range(3)])
    assert [admission.slot // 2 for admission in admissions] in ([0, 0, 1], [1, 1, 0])
    assert simulated.computed == 2 * 3


def test_idle_slots_ask_for_no_cut_distribution():
    slots = Simulated(1, 0).slots
    slots.admit([(0, Request((*SHARED_PREFIX, 4), (3, 4), 4, 1.0, (0, 0), top_k=5, top_p=0.5))])
    assert (slots.state.sampling.top_k[0], slots.state.sampling.top_p[0]) == (5, 0.5)
    slots.leave(0)
    assert (slots.state.sampling.top_k[0], slots.state.sampling.top_p[0]) == (0, 1)


@pytest.mark.parametrize("seed", range(60))
def test_random_traffic(seed):
    """Few words and many copies; the assertions are in `Simulated.admit`."""
    rng = random.Random(seed)
    data_shards = rng.choice((1, 1, 2, 3))
    simulated = Simulated(
        num_slots := data_shards * rng.randint(1, 6),
        data_shards * rng.randint(0, 3),
        data_shards,
        rng.choice((2, 9, 24)),
    )
    group_prefixes = [tuple(rng.choices((4, 5), k=rng.randint(0, 4))) for _ in range(4)]
    naive = request_id = 0
    for _ in range(40):
        free = range(simulated.slots.num_free)
        if free and rng.random() < 0.7:
            group = [
                request(rng.choice(group_prefixes), tuple(rng.choices((4, 5, 6), k=rng.randint(1, 5)))) for _ in free
            ]
            group = group[: rng.randint(1, len(group))]
            admissions = simulated.admit([(request_id + i, one) for i, one in enumerate(group)])
            request_id += len(group)
            naive += sum(len(one.prompt_ids) - 3 for one in group)
            assert len({admission.slot for admission in admissions}) == len(admissions)
            for admission in admissions:
                assert tuple(simulated.rows[SLOTS][admission.slot]) == admission.suffix
                assert simulated.slots.state.filled[admission.slot] == len(admission.suffix)
        for slot, owner in enumerate(simulated.slots.occupants):
            if owner is not None and rng.random() < 0.5:
                simulated.leave(slot, rng.choices((4, 5, 6), k=rng.randint(1, 4)))
    assert simulated.slots.num_free <= num_slots
    assert simulated.computed <= naive
