"""A model of the decode kernel's barriers (the tables of kernels/dense_decode.py): its roles as coroutines that run in a random
order, TMA that lands whenever it likes, mbarriers with the hardware's parity.  It dead-locks where the kernel would, and a role
that reads a slot finds in it what it should, or the test fails.  What it models is written twice: here and in the kernel."""

import random
from dataclasses import dataclass, field

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
    pieces: tuple[int, ...] = ()  # lengths, if it gathers them or has several

    @property
    def edges(self) -> list[int]:
        return [sum(self.pieces[: i + 1]) for i in range(len(self.pieces) - 1)]


@dataclass
class Kernel:
    items: list[Item]
    slots: int
    drawn: random.Random
    signal_tiles: bool = True  # rope_full has a phase for each tile
    await_pieces: bool = True  # SCORE waits for the slots that only VALUE reads,
    leave_pieces: bool = True  # and they are not filled again before it has
    memory: dict = field(default_factory=dict)
    landing: list = field(default_factory=list)
    stored: dict = field(default_factory=dict)

    def __post_init__(self):
        make = lambda n, arrivals: [Barrier(arrivals) for _ in range(n)]
        self.slot_full, self.slot_empty = make(self.slots, 1), make(self.slots, BOTH)
        self.rope_full, self.rope_empty, self.q_tail_full = (Barrier(1) for _ in range(3))
        self.p_full, self.p_empty, self.pv_go = Barrier(1), Barrier(BOTH), Barrier(1)
        self.contents = iter(list(self._contents()))
        self.feeds = iter([(it, tile) for it, item in enumerate(self.items) for tile in range(item.tiles)])
        self.records, self.met = record_slots(self.slots), [0, 0]

    def _contents(self):
        for it, item in enumerate(self.items):
            yield "q", it
            yield from (("tile", it, tile) for tile in range(item.tiles))
            yield from (("piece", it, i) for i in reversed(range(len(item.pieces) - 1)))

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
        if content[0] == "piece":
            assert len(self.stored.get(content[1:], ())) == BOTH, f"{content} is read before it is stored"
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
            item = self.items[it]
            if tile + 1 == item.tiles or tile + 1 in item.edges:
                self.memory["inv_sum", it & 1] = it, tile + 1
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
            for _ in range(len(item.pieces) - 1):
                if self.await_pieces:
                    yield self.slot_full[stage].passed(phase)
                if self.leave_pieces:
                    self.slot_empty[stage].arrive()
                stage, phase = self.advance(stage, phase)

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

        def leave(arrives=True):
            if arrives:
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
                if tile + 1 in item.edges:
                    yield lambda: True
                    self.expect(("inv_sum", it & 1), (it, tile + 1))
                    self.stored.setdefault((it, item.edges.index(tile + 1)), set()).add(half)
            for i in reversed(range(len(item.pieces) - 1)):
                yield self.slot_full[stage].passed(phase)
                self.expect(("ring", stage), ("piece", it, i))
                self.met[half] += 1
                mine = self.met[half]
                yield lambda mine=mine: min(self.met) >= mine
                yield from leave(arrives=half == 1 or not self.leave_pieces)
                stage, phase = self.advance(stage, phase)
            if half == 1 and it + 1 < len(self.items):
                yield self.slot_empty[stage].passed(phase)
                self.refill(stage)
            stage, phase = self.advance(stage, phase)
            yield lambda: True
            self.expect(("inv_sum", it & 1), (it, item.tiles))

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


def some_items(drawn: random.Random, slots: int, pieces: bool) -> list[Item]:
    def one():
        if pieces and drawn.random() < 0.6:
            length, count = drawn.randint(slots, slots + 3), drawn.randint(2, 6)
            lengths = sorted((length + drawn.randint(0, 1) for _ in range(count)), reverse=True)
            return Item(sum(lengths), tuple(lengths))
        return Item(drawn.choice((1, 1, 2, 3, 5, 9)))

    return [one() for _ in range(drawn.randint(1, 12))]


def run_some(slots: int, pieces: bool = False, count: int = 150, **options):
    for seed in range(count):
        drawn = random.Random(seed)
        Kernel(some_items(drawn, slots, pieces), slots, drawn, **options).run()


@pytest.mark.parametrize("slots", [3, 6, 12])
@pytest.mark.parametrize("pieces", [False, True])
def test_every_order_of_the_roles_ends_and_reads_what_it_should(slots, pieces):
    run_some(slots, pieces)


def test_tiles_without_rope_must_be_signalled():
    """(as it was with (512, 0): the fuzzer's kernels hung)"""
    with pytest.raises(AssertionError, match="dead-lock"):
        run_some(3, signal_tiles=False, count=1000)


@pytest.mark.parametrize("broken", [dict(await_pieces=False, leave_pieces=False), dict(leave_pieces=False)], ids=str)
def test_score_must_see_every_phase_of_a_slot(broken):
    """or it takes the phase before last for the last, or waits for one that has gone by"""
    with pytest.raises(AssertionError):
        run_some(3, pieces=True, count=1000, **broken)
