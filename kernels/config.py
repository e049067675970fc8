"""Everything that is specialised at compile time, as frozen dataclasses: they are the whole compile key."""

from dataclasses import dataclass

TILE = 64  # query rows of a CTA, and tokens of a KV tile: M of one WGMMA, and what two warpgroups can accumulate
BLOCK_BYTES = 128  # width of a swizzled column block of shared memory
RING_BYTES = 3 * 64 * 1024  # of shared memory for KV tiles and q in flight
PAGE_STEP, MAX_PAGE = 8, 1024  # tokens: a row group of the swizzle; what the tests cover
SMEM_LIMIT = 232448  # bytes a CTA may have on sm_90; the DSL does not check it at compile time
MAX_PIECES, MAX_PIECE_GAIN, MAX_ROW_TILES = 32, 256, 32768  # within these, the maths of fixed pieces fits 32 bits
MANY_TILES = 1 << 22  # of which a request has the pieces of so many
LAUNCH_REGISTERS = 168  # ptxas gives 384 threads this many each; setmaxnreg only moves them between warpgroups


@dataclass(frozen=True)
class KVFormat:
    """How one token lies in the cache: latent columns, then rope columns, one element type."""

    dtype: str  # torch's name of the element type
    latent: int = 512
    rope: int = 64
    itemsize: int = 2
    scales: int = 0  # fp32 scales of a token's latent columns, each of as many; their rope columns are bf16 then

    @property
    def head_dim(self) -> int:
        return self.latent + self.rope

    @property
    def bytes_per_token(self) -> int:
        return self.rope_byte + self.rope * 2 if self.scales else self.head_dim * self.itemsize

    @property
    def rope_byte(self) -> int:
        """where the bf16 rope columns begin, behind 16 bytes of scales"""
        return self.latent * self.itemsize + SCALE_BYTES


FORMATS = {row.dtype: row for row in (KVFormat("bfloat16"), KVFormat("float16"))}
SCALE_BYTES = 16  # of a token: what TMA moves at least, and a rope behind it is aligned
FP8_FORMATS = {row.dtype: row for row in (KVFormat("float8_e4m3fn", itemsize=1),)}  # one scale for all of a layer's cache
# 656 bytes a token.  4: what vLLM calls fp8_ds_mla; 1: the same bytes, four equal scales (644 bytes without three of them would
# have to be padded to 656 for TMA, whose strides are multiples of 16).
SCALED_FORMATS = {row.scales: row for row in (KVFormat("float8_e4m3fn", itemsize=1, scales=n) for n in (4, 1))}
DIMS = ((512, 64), (512, 0), (256, 64), (256, 32), (128, 32))  # (latent, rope): a new pair is a row here


@dataclass(frozen=True)
class DecodeOptions:
    """What some models and engines want of attention beyond the plain one.  All of it is compiled in, and free when off."""

    window: int = 0  # tokens that a query token sees at most, itself among them; 0: all
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: as they are
    out: str = ""  # element type of out: "float32", or "": q's
    lse_by_token: bool = False  # lse as (token, head), tokens request after request; else (request, head, query token)
    lse_log2: bool = False  # lse to base 2; else natural

    @property
    def name(self) -> str:
        """empty when all is off"""
        words = {
            f"window{self.window}": self.window,
            f"cap{self.softcap:g}": self.softcap,
            f"out_{self.out}": self.out,
            "lse_by_token": self.lse_by_token,
            "lse_log2": self.lse_log2,
        }
        return "".join(f"_{word}" for word, on in words.items() if on)


PLAIN = DecodeOptions()


@dataclass(frozen=True)
class MLAConfig:
    """One configuration of the decode kernel.  First group: what is computed; second: how."""

    kv: KVFormat = FORMATS["bfloat16"]
    page: int = 64  # tokens of a cache page
    causal: bool = True  # bottom-right aligned over the query tokens
    options: DecodeOptions = PLAIN
    q_pair: bool = False  # the rope columns of q are a tensor of their own
    sink: bool = False  # a logit per head joins the softmax's sum, without a value
    ragged: bool = False  # requests of different query counts, their tokens one after the other in q, out and lse
    fixed_pieces: bool = False  # an item may be several pieces of a request, each with a result of its own (parts/pieces.py)

    head_tile: int = 0  # heads of one token that are neighbours in a row tile; 0: rows are one strided axis (parts/rows.py)
    split: str = "float16"  # element type of partial results: half the bytes of float32, -18 % at batch 1; clamps at 65504
    stages: int = 0  # slots of the KV ring; 0: as many as RING_BYTES hold
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
    def ring_slots(self) -> int:
        return self.stages or RING_BYTES // (TILE * self.kv.latent * self.kv.itemsize)

    @property
    def box_tokens(self) -> int:
        """tokens that one TMA instruction brings: a whole tile, where pages hold whole tiles"""
        return TILE if self.page % TILE == 0 else PAGE_STEP

    @property
    def row_modes(self) -> tuple[int, int]:
        """(heads, query tokens) of a row tile"""
        return (self.head_tile, TILE // self.head_tile) if self.head_tile else (TILE, 1)

    @property
    def out(self) -> str:
        return self.options.out or self.kv.dtype

    @property
    def name(self) -> str:
        rows = f"h{self.head_tile}" if self.head_tile else "flat"
        mask = "causal" if self.causal else "full"
        split = "" if self.split == "float16" else f"_{self.split}"
        flags = "".join(f"_{word}" for word, on in self._flags.items() if on)
        dims = f"{self.kv.dtype}_{self.kv.latent}_{self.kv.rope}_page{self.page}"
        return f"dense_{dims}_{mask}_{rows}{split}{self.options.name}{flags}"

    @property
    def _flags(self) -> dict[str, bool]:
        return {
            "pair": self.q_pair,
            "sink": self.sink,
            "ragged": self.ragged,
            "pieces": self.fixed_pieces,
            "lanes": self.lane_arrivals,
        }

    def check(self):
        """Raises ValueError, naming the field, for a configuration that this kernel cannot run."""

        def need(ok, message):
            if not ok:
                raise ValueError(f"MLAConfig: {message}")

        kv = self.kv
        need(kv.dtype in FORMATS, f"kv.dtype is {kv.dtype}; allowed: {', '.join(FORMATS)}")
        need((kv.latent, kv.rope) in DIMS, f"kv is {kv}; (latent, rope) of the table: {', '.join(map(str, DIMS))}")
        need(kv.latent in (128, 256, 512), f"kv.latent is {kv.latent}; allowed: 128, 256 or 512, which the tiles divide evenly")
        need(kv.rope % 16 == 0 and kv.rope <= TILE, f"kv.rope is {kv.rope}; allowed: multiples of 16 up to {TILE}, one block")
        need(
            self.page % PAGE_STEP == 0 and PAGE_STEP <= self.page <= MAX_PAGE,
            f"page is {self.page}; allowed: multiples of {PAGE_STEP} up to {MAX_PAGE}",
        )
        need(
            self.head_tile in (0, 1, 2, 4, 8, 16, 32, 64), f"head_tile is {self.head_tile}; allowed: 0 or a power of 2 up to 64"
        )
        splits = ("float32", "float16", "bfloat16")  # (bfloat16: what GPUs exchange, flashmla_cute/parallel.py)
        need(self.split in splits, f"split is {self.split}; allowed: {', '.join(splits)}")
        options = self.options
        need(options.window >= 0, f"options.window is {options.window}; allowed: 0 (all tokens) or a number of tokens")
        need(
            0.0 <= options.softcap < float("inf"),
            f"options.softcap is {options.softcap}; allowed: 0 (none) or a positive number",
        )
        need(options.out in ("", "float32"), f'options.out is {options.out}; allowed: "" (q\'s) or "float32"')
        need(
            not self.fixed_pieces or self.split == "float16",
            f"split is {self.split}; allowed: float16 with fixed_pieces, a partial result is a slot of the ring",
        )
        need(not self.q_pair or self.kv.rope > 0, f"q_pair is {self.q_pair}; allowed: False, there are no rope columns")
        registers = self.score_registers + 2 * self.value_registers
        need(
            registers <= 3 * LAUNCH_REGISTERS,
            f"{self.score_registers} + 2 * {self.value_registers} = {registers} registers a thread group exceed 3 * "
            f"{LAUNCH_REGISTERS}: setmaxnreg would dead-lock",
        )
        value = self.kv.latent // 2  # f32 accumulators of a VALUE thread: 64 rows x half the latent over 128 threads
        need(
            TILE * value // 128 + 24 <= self.value_registers,
            f"kv.latent is {kv.latent}: {TILE} * {value} / 128 accumulators + 24 exceed {self.value_registers} registers",
        )


@dataclass(frozen=True)
class Fp8Config:
    """One configuration of the decode kernel of an e4m3 cache."""

    base: MLAConfig = MLAConfig()  # the same decode over a cache of out's element type
    kv: KVFormat = FP8_FORMATS["float8_e4m3fn"]
    q_dtype: str = "bfloat16"  # float8_e4m3fn: quantised by the caller, with a scale
    q_terms: int = 2  # e4m3 numbers that add up to an element of q: 2 hold bf16 exactly, 1 halves the work of q k^T

    stages: int = 5  # 36 KB slots of the KV ring
    open_steps: int = 24  # k-steps of q k^T issued before p of the last tile is stored

    def __post_init__(self):
        self.check()

    @property
    def q_slots(self) -> int:
        """ring slots of q: 16-bit columns take two"""
        return 1 if self.q_dtype == self.kv.dtype else 2

    @property
    def name(self) -> str:
        tuned = f"s{self.stages}o{self.open_steps}"
        return f"fp8_{self.q_dtype}x{self.q_terms}_{tuned}_{self.base.name}"

    def check(self):
        """Raises ValueError, naming the field, for a configuration that the kernel cannot run."""

        def need(ok, message):
            if not ok:
                raise ValueError(f"Fp8Config: {message}")

        base, kv, q_dtypes = self.base, self.kv, (*FORMATS, self.kv.dtype)
        need(kv in FP8_FORMATS.values(), f"kv is {kv}; the table has {', '.join(FP8_FORMATS)}")
        dims = (base.kv.latent, base.kv.rope)
        need(dims == (kv.latent, kv.rope), f"base.kv is {base.kv}; (latent, rope) of an e4m3 cache: {(kv.latent, kv.rope)}")
        need(self.q_dtype in q_dtypes, f"q_dtype is {self.q_dtype}; allowed: {', '.join(q_dtypes)}")
        need(self.q_terms in (1, 2), f"q_terms is {self.q_terms}; allowed: 1, 2")
        need(self.q_slots == 2 or self.q_terms == 1, f"q_terms is {self.q_terms}; allowed: 1 with q_dtype {self.q_dtype}")
        need(self.stages >= 3, f"stages is {self.stages}; allowed: 3 or more, q takes 2")
        need(
            0 < self.open_steps <= 18 * self.q_terms - 1,
            f"open_steps is {self.open_steps}; allowed: 1 .. {18 * self.q_terms - 1}",
        )


@dataclass(frozen=True)
class UpcastConfig:
    """One configuration of the decode kernel of an e4m3 cache whose tokens have scales of their own."""

    base: MLAConfig = MLAConfig()  # the same decode over a cache of q's element type
    kv: KVFormat = SCALED_FORMATS[4]
    stages: int = 2  # 33 KB slots of the ring of raw tiles

    def __post_init__(self):
        self.check()

    @property
    def name(self) -> str:
        return f"upcast_s{self.stages}_{self.base.name}"

    def check(self):
        """Raises ValueError, naming the field, for a configuration that the kernel cannot run."""

        def need(ok, message):
            if not ok:
                raise ValueError(f"UpcastConfig: {message}")

        base, kv = self.base, self.kv
        need(kv == SCALED_FORMATS[4], f"kv is {kv}; allowed: {SCALED_FORMATS[4]}, as which any scaled cache can be read")
        dims = (base.kv.latent, base.kv.rope)
        need(dims == (kv.latent, kv.rope), f"base.kv is {base.kv}; (latent, rope) of an e4m3 cache: {(kv.latent, kv.rope)}")
        need(self.stages == 2, f"stages is {self.stages}; allowed: 2, the two of q, and all that shared memory has room for")


@dataclass(frozen=True)
class Fp8AppendConfig:
    """How the append kernel quantises: from 16-bit rows, or e4m3 ones that it copies where tokens have no scales."""

    kv: KVFormat = FP8_FORMATS["float8_e4m3fn"]
    source: str = "bfloat16"
    page: int = 64

    def __post_init__(self):
        sources = (*FORMATS, *([] if self.kv.scales else [self.kv.dtype]))
        if self.source not in sources:
            raise ValueError(f"Fp8AppendConfig: source is {self.source}; allowed: {', '.join(sources)}")

    @property
    def name(self) -> str:
        scales = f"x{self.kv.scales}" if self.kv.scales else ""
        return f"{self.kv.dtype}{scales}_from_{self.source}_{self.kv.latent}_{self.kv.rope}_page{self.page}"


@dataclass(frozen=True)
class ScheduleConfig:
    """The cost model of the schedule, fitted on an H100 (perf/NOTES.md), in integers so that the device and its Python twin
    (flashmla_cute/schedule.py) agree exactly.  The unit of time is what one split piece costs for one row tile: its 64 KB of
    f16 partials are written and read again, through the L2 that all CTAs share.
    """

    item_tiles: int = 3  # what an item costs beside its tiles, in tiles: q in, o out
    tile_cost: int = 40  # a KV tile, in pieces
    max_pieces: int = 0  # of a request cut by its own length alone (batch invariance); 0: cuts where they balance the batch
    piece_gain: int = 9  # such a request of n tiles has sqrt(piece_gain / 32 * n / row tiles) pieces,
    piece_tiles: int = 36  # or as many of this length as it holds, if that is more
    runs: int = 0  # 1: an item may be several pieces, and a request that is one joins its own; 0: a piece is an item
    max_batch: int = 16384  # prefix sums lie in shared memory, 8 bytes a request (fixed pieces: 12)
    num_threads: int = 1024

    def __post_init__(self):
        for name, least, most in (
            ("max_pieces", 0, MAX_PIECES),
            ("piece_gain", 1, MAX_PIECE_GAIN),
            ("piece_tiles", 1, 1 << 25),
            ("runs", 0, 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"ScheduleConfig: {name} is {value}; allowed: {least} .. {most}")

    @property
    def name(self) -> str:
        fixed = f"_pieces{self.max_pieces}_{self.piece_gain}_{self.piece_tiles}_{self.runs}" if self.max_pieces else ""
        return f"schedule_{self.item_tiles}_{self.tile_cost}{fixed}"


BATCH_INVARIANT = ScheduleConfig(max_pieces=32)

# What the CPU tests compile and gate; the first is the one most callers get.
PRESETS = tuple(
    MLAConfig(kv=kv, causal=causal, head_tile=head_tile)
    for kv in FORMATS.values()
    for causal in (True, False)
    for head_tile in (0, 64, 16)
)
