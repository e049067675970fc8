"""A model of the decode kernel's barriers (the tables of kernels/dense_decode.py): its roles as coroutines that run in a random
order, TMA that lands whenever it likes, mbarriers with the hardware's parity.  It dead-locks where the kernel would, and a role
that reads a slot finds in it what it should, or the test fails.  What it models is written twice: here and in the kernel."""

import random
from dataclasses import dataclass, field
from itertools import accumulate

import pytest

from flashmla_cute.kernels.parts.work import record_slots

BOTH = 2  # arrivals of a phase that both VALUE warpgroups end; one of SCORE's where it is a q slot


class Barrier:
    def __init__(self, arrivals: int):
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self, count: int = 1):
        self.pending -= count
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals

    def passed(self, parity: int):
        """what mbarrier.try_wait.parity tells: that the phase before the one in progress has this parity"""
        return lambda: (self.phase - 1) & 1 == parity


@dataclass
class Item:
    tiles: int
    pieces: tuple[int, ...] = ()  # lengths, if it has several

    def ends(self, tile: int) -> bool:
        """a piece ends with this tile"""
        return tile + 1 in accumulate(self.pieces or (self.tiles,))


@dataclass
class Kernel:
    items: list[Item]
    slots: int
    drawn: random.Random
    signal_tiles: bool = True  # rope_full has a phase for each tile
    memory: dict = field(default_factory=dict)
    landing: list = field(default_factory=list)

    def __post_init__(self):
        make = lambda n, arrivals: [Barrier(arrivals) for _ in range(n)]
        self.slot_full, self.slot_empty = make(self.slots, 1), make(self.slots, BOTH)
        self.rope_full, self.rope_empty, self.q_tail_full = (Barrier(1) for _ in range(3))
        self.p_full, self.p_empty, self.pv_go = Barrier(1), Barrier(BOTH), Barrier(1)
        self.contents = iter(list(self._contents()))
        self.feeds = iter([(it, tile) for it, item in enumerate(self.items) for tile in range(item.tiles)])
        self.records = record_slots(self.slots)

    def _contents(self):
        for it, item in enumerate(self.items):
            yield "q", it
            yield from (("tile", it, tile) for tile in range(item.tiles))

    # ------------------------------------------------------------------ memory
    def load(self, place, content, full: Barrier):
        self.memory[place] = None  # (until it lands, there is neither the old nor the new)
        self.landing.append((place, content, full))

    def expect(self, place, content):
        assert self.memory.get(place) == content, f"{place} holds {self.memory.get(place)}, not {content}"

    def refill(self, stage: int):
        content = next(self.contents, None)
        if content is None:
            return
        if content[0] == "q":
            self.memory["record", content[1] % self.records] = content[1]
        self.load(("ring", stage), content, self.slot_full[stage])

    def feed(self):
        at = next(self.feeds, None)
        if at is None:
            return
        if at[1] == 0:
            self.load("q tail", at[0], self.q_tail_full)
        if self.signal_tiles:
            self.load("rope", at, self.rope_full)

    # ------------------------------------------------------------------ roles
    def advance(self, stage, phase):
        return (0, phase ^ 1) if stage == self.slots - 1 else (stage + 1, phase)

    def score(self):
        (stage, phase), parity = (0, 0), 0

        def scores(it, tile, parity):
            yield self.slot_full[stage].passed(phase)
            self.expect(("ring", stage), ("tile", it, tile))
            if self.signal_tiles:
                yield self.rope_full.passed(parity)
                self.expect("rope", (it, tile))
            self.expect("q tail", it)

        def store_p(it, tile, parity):
            yield self.p_empty.passed(parity ^ 1)
            self.memory["p"] = it, tile
            if self.items[it].ends(tile):
                self.memory["inv_sum", it & 1] = it, tile
                if self.items[it].pieces:
                    self.memory["joined"] = it, tile
            self.p_full.arrive()

        for it, item in enumerate(self.items):
            yield self.slot_full[stage].passed(phase)
            self.expect(("ring", stage), ("q", it))
            self.expect(("record", it % self.records), it)
            self.slot_empty[stage].arrive(BOTH)
            stage, phase = self.advance(stage, phase)
            yield self.q_tail_full.passed(it & 1)
            yield from scores(it, 0, parity)
            self.rope_empty.arrive()
            stage, phase = self.advance(stage, phase)
            for tile in range(item.tiles - 1):
                yield self.slot_full[stage].passed(phase)  # S2
                yield from store_p(it, tile, parity)
                yield from scores(it, tile + 1, parity ^ 1)
                self.pv_go.arrive()
                yield lambda: True
                self.rope_empty.arrive()
                stage, phase = self.advance(stage, phase)
                parity ^= 1
            yield from store_p(it, item.tiles - 1, parity)
            self.pv_go.arrive()
            parity ^= 1

    def value(self, half: int):
        """half 0 feeds, half 1 refills"""
        if half == 0:
            self.feed()
        else:
            for stage in range(self.slots):
                self.refill(stage)
            yield self.slot_empty[0].passed(0)
            self.refill(0)
        (stage, phase), parity = self.advance(0, 0), 0

        def leave():
            self.slot_empty[stage].arrive()
            if half == 1:
                yield self.slot_empty[stage].passed(phase)
                self.refill(stage)

        for it, item in enumerate(self.items):
            if half == 0:
                yield self.rope_empty.passed(parity)
                self.feed()
            yield self.p_full.passed(parity)
            self.expect(("record", it % self.records), it)
            for tile in range(item.tiles):
                yield self.p_full.passed(parity)
                yield self.pv_go.passed(parity)
                if half == 0 and tile + 1 < item.tiles:
                    yield self.rope_empty.passed(parity ^ 1)
                    self.feed()
                yield lambda: True
                self.expect("p", (it, tile))
                self.expect(("ring", stage), ("tile", it, tile))
                self.p_empty.arrive()
                yield from leave()
                stage, phase = self.advance(stage, phase)
                parity ^= 1
                if item.pieces and item.ends(tile):
                    yield lambda: True
                    self.expect(("inv_sum", it & 1), (it, tile))
                    self.expect("joined", (it, tile))
            if half == 1 and it + 1 < len(self.items):
                yield self.slot_empty[stage].passed(phase)
                self.refill(stage)
            stage, phase = self.advance(stage, phase)
            yield lambda: True
            self.expect(("inv_sum", it & 1), (it, item.tiles - 1))

    def run(self):
        """raises AssertionError: a dead-lock, or something read that is not there"""
        waiting = {
            name: (role, lambda: True) for name, role in (("score", self.score()), (0, self.value(0)), (1, self.value(1)))
        }
        while waiting:
            ready = [name for name, (_, may_go) in waiting.items() if may_go()]
            choices = ready + ["tma"] * bool(self.landing)
            assert choices, f"dead-lock: {list(waiting)} wait"
            chosen = self.drawn.choice(choices)
            if chosen == "tma":
                place, content, full = self.landing.pop(self.drawn.randrange(len(self.landing)))
                self.memory[place] = content
                full.arrive()
                continue
            role = waiting[chosen][0]
            try:
                waiting[chosen] = role, next(role)
            except StopIteration:
                del waiting[chosen]


def some_items(drawn: random.Random, shortest: int) -> list[Item]:
    """shortest: tiles of a piece; 0: no item has several"""

    def one():
        if shortest and drawn.random() < 0.6:
            length, count = drawn.randint(shortest, shortest + 3), drawn.randint(2, 6)
            lengths = sorted((length + drawn.randint(0, 1) for _ in range(count)), reverse=True)
            return Item(sum(lengths), tuple(lengths))
        return Item(drawn.choice((1, 1, 2, 3, 5, 9)))

    return [one() for _ in range(drawn.randint(1, 12))]


def run_some(slots: int, shortest: int = 0, count: int = 150, **options):
    for seed in range(count):
        drawn = random.Random(seed)
        Kernel(some_items(drawn, shortest), slots, drawn, **options).run()


@pytest.mark.parametrize("slots", [3, 6, 12])
@pytest.mark.parametrize("shortest", [0, 2])
def test_every_order_of_the_roles_ends_and_reads_what_it_should(slots, shortest):
    run_some(slots, shortest)


def test_tiles_without_rope_must_be_signalled():
    """(as it was with (512, 0): the fuzzer's kernels hung)"""
    with pytest.raises(AssertionError, match="dead-lock"):
        run_some(3, signal_tiles=False, count=1000)


def test_pieces_of_one_tile_would_be_overwritten():
    """(num_pieces gives them two or more) SCORE is a tile ahead, and the pieces of an item share inv_sum and joined"""
    with pytest.raises(AssertionError, match=r"inv_sum|joined"):
        run_some(3, shortest=1, count=1000)
