"""Everything that is specialised at compile time, as frozen dataclasses: they are the whole compile key."""

from dataclasses import dataclass

TILE = 64  # query rows of a CTA, and tokens of a KV tile: M of one WGMMA, and what two warpgroups can accumulate
BLOCK_BYTES = 128  # width of a swizzled column block of shared memory
SMEM_LIMIT = 232448  # bytes a CTA may have on sm_90; the DSL does not check it at compile time
LAUNCH_REGISTERS = 168  # ptxas gives 384 threads this many each; setmaxnreg only moves them between warpgroups


@dataclass(frozen=True)
class KVFormat:
    """How one token lies in the cache: latent columns, then rope columns, one element type."""

    dtype: str  # torch's name of the element type
    latent: int = 512
    rope: int = 64
    itemsize: int = 2

    @property
    def head_dim(self) -> int:
        return self.latent + self.rope

    @property
    def bytes_per_token(self) -> int:
        return self.head_dim * self.itemsize


FORMATS = {row.dtype: row for row in (KVFormat("bfloat16"), KVFormat("float16"))}


@dataclass(frozen=True)
class MLAConfig:
    """One configuration of the decode kernel.  First group: what is computed; second: how."""

    kv: KVFormat = FORMATS["bfloat16"]
    page: int = 64  # tokens of a cache page
    causal: bool = True  # bottom-right aligned over the query tokens

    head_tile: int = 0  # heads of one token that are neighbours in a row tile; 0: rows are one strided axis (parts/rows.py)
    split: str = "float16"  # element type of partial results: half the bytes of float32, -18 % at batch 1; clamps at 65504
    stages: int = 3  # 64 KB slots of the KV ring
    score_registers: int = 184
    value_registers: int = 160
    lazy_rescale: float = 8.0  # log2 units by which a row maximum must grow before o is rescaled
    lane_arrivals: bool = False  # debug: every writing lane arrives, so that racecheck can follow the hand-over

    def __post_init__(self):
        self.check()

    @property
    def latent_blocks(self) -> int:
        return self.kv.latent * self.kv.itemsize // BLOCK_BYTES

    @property
    def row_modes(self) -> tuple[int, int]:
        """(heads, query tokens) of a row tile"""
        return (self.head_tile, TILE // self.head_tile) if self.head_tile else (TILE, 1)

    @property
    def name(self) -> str:
        rows = f"h{self.head_tile}" if self.head_tile else "flat"
        mask = "causal" if self.causal else "full"
        split = "" if self.split == "float16" else f"_{self.split}"
        debug = "_lanes" if self.lane_arrivals else ""
        return f"dense_{self.kv.dtype}_{self.kv.latent}_{self.kv.rope}_page{self.page}_{mask}_{rows}{split}{debug}"

    def check(self):
        """Raises ValueError, naming the field, for a configuration that this kernel cannot run."""

        def need(ok, message):
            if not ok:
                raise ValueError(f"MLAConfig: {message}")

        need(self.kv in FORMATS.values(), f"kv is {self.kv}; the table has {', '.join(FORMATS)}")
        need(self.page == TILE, f"page is {self.page}; allowed: {TILE}")
        need(
            self.head_tile in (0, 1, 2, 4, 8, 16, 32, 64), f"head_tile is {self.head_tile}; allowed: 0 or a power of 2 up to 64"
        )
        need(self.split in ("float32", "float16"), f"split is {self.split}; allowed: float32, float16")
        registers = self.score_registers + 2 * self.value_registers
        need(
            registers <= 3 * LAUNCH_REGISTERS,
            f"{self.score_registers} + 2 * {self.value_registers} = {registers} registers a thread group exceed 3 * "
            f"{LAUNCH_REGISTERS}: setmaxnreg would dead-lock",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The cost model of the schedule, fitted on an H100 (perf/NOTES.md), in integers so that the device and its Python twin
    (flashmla_cute/schedule.py) agree exactly.  The unit of time is what one split piece costs for one row tile: its 64 KB of
    f16 partials are written and read again, through the L2 that all CTAs share.
    """

    item_tiles: int = 3  # what an item costs beside its tiles, in tiles: q in, o out
    tile_cost: int = 40  # a KV tile, in pieces
    max_batch: int = 16384  # prefix sums lie in shared memory, 8 bytes a request
    num_threads: int = 1024

    @property
    def name(self) -> str:
        return f"schedule_{self.item_tiles}_{self.tile_cost}"


# What the CPU tests compile and gate; the first is the one most callers get.
PRESETS = tuple(
    MLAConfig(kv=kv, causal=causal, head_tile=head_tile)
    for kv in FORMATS.values()
    for causal in (True, False)
    for head_tile in (0, 64, 16)
)
