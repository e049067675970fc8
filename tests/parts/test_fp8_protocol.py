"""test_protocol.py's model with the barriers of kernels/fp8_decode.py: q in two slots of the ring, two slots of p."""

import random
from dataclasses import dataclass

import pytest

from .test_protocol import BOTH, Barrier, Kernel, some_items

P_SLOTS, INV_SLOTS = 2, 4


@dataclass
class Fp8Kernel(Kernel):
    q_slots: int = 2
    inv_slots: int = INV_SLOTS

    def __post_init__(self):
        super().__post_init__()
        make = lambda arrivals: [Barrier(arrivals) for _ in range(P_SLOTS)]
        self.p_full, self.p_empty = make(1), make(BOTH)

    def _contents(self):
        for it, item in enumerate(self.items):
            yield from (("q", it, part) for part in range(self.q_slots))
            yield from (("tile", it, tile) for tile in range(item.tiles))

    def score(self):
        (stage, phase), count = (0, 0), 0

        def scores(it, tile):
            yield self.slot_full[stage].passed(phase)
            yield lambda: True
            self.expect(("ring", stage), ("tile", it, tile))

        def store_p(it, tile):
            p, parity = count % P_SLOTS, count // P_SLOTS & 1
            yield self.p_empty[p].passed(parity ^ 1)
            self.memory["p", p] = it, tile
            if tile + 1 == self.items[it].tiles:
                self.memory["inv_sum", it % self.inv_slots] = it
            self.p_full[p].arrive()

        for it, item in enumerate(self.items):
            parts = []
            for _ in range(self.q_slots):
                yield self.slot_full[stage].passed(phase)
                parts.append(stage)
                stage, phase = self.advance(stage, phase)
            self.expect(("record", it % self.records), it)
            for part, at in enumerate(parts):
                self.expect(("ring", at), ("q", it, part))
                self.slot_empty[at].arrive(BOTH)
            yield from scores(it, 0)
            stage, phase = self.advance(stage, phase)
            for tile in range(item.tiles - 1):
                yield self.slot_full[stage].passed(phase)  # S2
                yield from store_p(it, tile)
                yield from scores(it, tile + 1)
                stage, phase = self.advance(stage, phase)
                count += 1
            yield from store_p(it, item.tiles - 1)
            count += 1

    def value(self, half: int):
        (stage, phase), count = (self.q_slots, 0), 0

        def refresh():
            if half == 1:
                yield self.slot_empty[stage].passed(phase)
                self.refill(stage)

        if half == 1:
            for i in range(self.slots):
                self.refill(i)
            for i in range(self.q_slots):
                yield self.slot_empty[i].passed(0)
                self.refill(i)
        for it, item in enumerate(self.items):
            for tile in range(item.tiles):
                p, parity = count % P_SLOTS, count // P_SLOTS & 1
                yield self.p_full[p].passed(parity)
                self.expect(("record", it % self.records), it)
                yield lambda: True
                self.expect(("p", p), (it, tile))
                self.expect(("ring", stage), ("tile", it, tile))
                self.p_empty[p].arrive()
                self.slot_empty[stage].arrive()
                yield from refresh()
                stage, phase = self.advance(stage, phase)
                count += 1
            for _ in range(self.q_slots):
                if it + 1 < len(self.items):
                    yield from refresh()
                stage, phase = self.advance(stage, phase)
            yield lambda: True
            self.expect(("inv_sum", it % self.inv_slots), it)


def run_some(q_slots: int, slots: int = 5, count: int = 300, **options):
    for seed in range(count):
        drawn = random.Random(seed)
        Fp8Kernel(some_items(drawn, shortest=0), slots, drawn, q_slots=q_slots, **options).run()


@pytest.mark.parametrize("slots", [3, 5])
@pytest.mark.parametrize("q_slots", [1, 2])
def test_every_order_of_the_roles_ends_and_reads_what_it_should(q_slots, slots):
    run_some(q_slots, slots)


def test_a_normalisation_slot_for_each_item_that_score_may_be_ahead():
    with pytest.raises(AssertionError, match="inv_sum"):
        run_some(1, inv_slots=1)
