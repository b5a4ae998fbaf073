"""How the Triton kernels are launched: tiles, splits, what is held in registers. Pure arithmetic, no triton.

Chosen by measurement on an H100 (``benchmarks/kernel_linear.py``); they change speed, and results in the last bits
only. What is ``tunable`` is measured anew on other GPUs (``tuning``). Must not import layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from framequant.kernels.tuned import tunable

#: Most tokens whose transforms take a program for each index of the first axis.
VECTOR_TOKENS = 2
#: Most tokens of scalar codes that meet bytes: more cost as much in halves, and less in the transforms.
BYTE_TOKENS = 4
#: Most tokens whose codes go through registers alone, warps of a program there, and shared memory that it may have.
LANE_TOKENS, LANE_WARPS, LANE_SHARED = 1, 8, 48 << 10
#: Most tokens of scalar codes whose products go through registers alone, and warps' shares of rows that a
#: multiprocessor has there, at least: with fewer there are not bytes enough on their way. And warps of a program.
MOST_LANE_TOKENS, LEAST_LANE_SHARES, TOKEN_WARPS = 16, 4, 16
#: Most times 32 rows that spare warps have there (``lane_tokens_triton``): as many counters there are.
MOST_SPARE = 64
#: Programs of an analysis of several tokens for each of them, all but one of which hold a place until what was before
#: has ended: the first multiprocessors to be free have place for five, and five tokens take one 4 µs, one takes 1.5.
TOKEN_PLACES = 5
#: Rows of a trellis up to which that is faster where a synthesis follows.
LANE_TRELLIS_ROWS = 8192
#: Bytes and rows that a warp takes at a time there, and the blocks of a local output frame that its lanes can rotate.
LANE_CHUNK, LANE_ROWS, LANE_BLOCKS = 64, 32, (16, 32)
#: Most tokens of one launch of the kernels that decode in their own loop.
FEW_TOKENS = 64
#: Coefficients from which on two, three, four launches of these, one after another, are faster than a prompt, for which
#: D̃ is decoded in panels: where lines through what was measured meet (``benchmarks/kernel_tokens_h100.csv``), for
#: scalar codes and a trellis.
LOOPED = {False: (24e6, 43e6, 75e6), True: (88e6,)}
#: Bytes of a panel, at most, and of one that an L2 cache of 50 MB mostly holds until it is multiplied.
PANEL_BYTES, CACHED_BYTES = 64 << 20, 48 << 20
#: With as many tokens, rows that make 128 of cuBLAS' tiles (128 by 256): a full round of 132 multiprocessors.
ROUND_ROWS = 2048
#: Most splits: synthesis reads every part again in each of its programs.
MOST_SPLITS = 9


def most_loops(trellis: bool, coefficients: int) -> int:
    """How many launches of the kernels for few tokens a prompt may take, for a matrix of so many coefficients."""
    return 1 + sum(coefficients >= least for least in LOOPED[trellis])


def lane_columns(tokens: int) -> int:
    """The columns of tensor-core tiles that so many tokens take in a product through registers alone.

    A constant for ``torch.compile``, whatever it knows of ``tokens``.
    """
    return 8 if tokens <= 8 else MOST_LANE_TOKENS


def tokens_to_check(tokens: int, loops: int) -> int:
    """A number of tokens that is launched as ``tokens`` are: each way of launching is checked once.

    Args:
        tokens: how many.
        loops: from ``most_loops``.
    """
    if tokens <= LANE_TOKENS:
        return LANE_TOKENS
    if tokens <= VECTOR_TOKENS:
        return VECTOR_TOKENS
    if tokens <= BYTE_TOKENS:
        return BYTE_TOKENS
    if tokens <= MOST_LANE_TOKENS:
        return lane_columns(tokens)
    return MOST_LANE_TOKENS + 1 if tokens <= loops * FEW_TOKENS else loops * FEW_TOKENS + 1


def loop_tokens(tokens: int, loops: int) -> int:
    """Tokens of a launch where that many take several, all of one kind; 0 where they take one, or panels."""
    if not FEW_TOKENS < tokens <= loops * FEW_TOKENS:
        return 0
    return -(-tokens // -(-tokens // FEW_TOKENS))


class Tile(NamedTuple):
    """One program's share of a step, and how many programs are aimed at.

    Attributes:
        rows: of D̃.
        step: words or bytes of a row that are taken at a time.
        columns: tokens; with bytes, four of them are one token.
        stages: steps on their way at a time, in the loop.
        warps: of a program.
        programs: what splitting should come close to.
        held: steps whose codes are in registers before the coefficients are there.
        groups: warps that share out a step's words: each takes ``step`` of them, for all rows.
    """

    rows: int
    step: int
    columns: int
    stages: int
    warps: int
    programs: int
    held: int = 0
    groups: int = 1


class Launch(NamedTuple):
    """A tile, into how many parts a row is cut, and the words or bytes of each."""

    tile: Tile
    splits: int
    span: int

    @property
    def held(self) -> int:
        """Steps held: no more than a program has."""
        return min(self.tile.held, self.span // (self.tile.step * self.tile.groups))

    @property
    def loop(self) -> bool:
        """Whether steps are left that are not held."""
        return self.span > self.held * self.tile.step * self.tile.groups


def launch(tile: Tile, rows: int, count: int, columns: int) -> Launch:
    """Cut rows of ``count`` words into spans of whole steps so that there are about ``tile.programs`` programs."""
    steps = -(-count // tile.step)
    blocks = -(-rows // tile.rows) * -(-columns // tile.columns)
    wanted = max(1, min(steps, round(tile.programs / blocks), MOST_SPLITS))
    span = -(-steps // wanted) * tile.step
    return Launch(tile, -(-count // span), span)


@tunable
def byte_tile(rows: int, tokens: int) -> Tile:
    """For scalar codes and few tokens.

    An H100 keeps four programs of 128 rows on each of its 132 multiprocessors; 512 of them leave no second round.
    Fewer rows need smaller blocks to have that many, as every split costs synthesis another reading of its input.
    """
    if tokens > 2:
        return Tile(64, 128, 16, 3, 4, 512)
    if rows <= 8192:
        return Tile(32, 128, 8, 4, 2, 512, held=1)
    if rows <= 24576:
        return Tile(128, 128, 8, 3, 4, 512, held=1)
    return Tile(64, 128, 8, 3, 4, 1024, held=1)


@tunable
def half_tile(trellis: bool, rows: int, tokens: int, compiled: bool) -> Tile:
    """For a trellis, and for scalar codes and more tokens."""
    if not trellis:
        return (
            Tile(64, 64, 16, 3, 4, 512)
            if tokens <= 16
            else Tile(128, 32, 32 if tokens <= 32 else 64, 3, 8, 512)
        )
    if tokens <= 8:
        columns = 8 if compiled else 16  # the interpreter asks for 16
        if rows <= 8192:
            return Tile(64, 32, columns, 3, 4, 300)
        return Tile(64, 32, columns, 2 if rows <= 24576 else 3, 4, 1024)
    if tokens <= 16:
        return Tile(64, 32, 16, 2, 4, 700)
    return Tile(128, 32, 32, 2, 8, 512)


@tunable
def packed_tile(codes: int, tokens: int, compiled: bool) -> Tile:
    """For scalar codes in planes; so many ``codes`` are a unit, and as many tiles of coefficients are a step's."""
    columns = 8 if tokens <= 8 and compiled else 16
    if codes == 16 and tokens > 16:
        columns = 32 if tokens <= 32 else 64
    return Tile(64, 32, columns, 3 if codes * columns <= 256 else 2, 4, 512)


#: Rows up to which the programs of a local output frame take eight warps: there are few of them.
FEW_ROWS = 12288


def block_launch(tile: Tile, count: int) -> Launch:
    """All columns to one program: rows of whole blocks become outputs there."""
    step = tile.step * tile.groups
    return Launch(tile, 1, -(-count // step) * step)


@tunable
def block_byte_tile(rows: int, tokens: int, block: int) -> Tile:
    """For scalar codes, few tokens and a local output frame: few rows, whose columns are shared out to warps.

    Of many rows a program takes 64 at a time: groups of columns in programs of 32 rows took twice as long on an H200.
    """
    columns = 8 if tokens <= 2 else 16
    if rows <= FEW_ROWS:
        return Tile(max(32, block), 32, columns, 3, 8, 0, held=5 if block <= 32 else 2, groups=8)
    return Tile(max(64, block), 128, columns, 3, 4, 0, held=1)


@tunable
def block_half_tile(trellis: bool, rows: int, tokens: int, block: int, compiled: bool) -> Tile:
    """For a trellis, and for scalar codes and more tokens."""
    least, few = max(32, block), rows <= FEW_ROWS
    if tokens > 16:
        columns = 32 if trellis or tokens <= 32 else 64
        if few and block <= 32:
            return Tile(least, 16, columns, 2, 8, 0, groups=8)
        return Tile(max(64, block), 32, columns, 2, 4 if block <= 64 else 8, 0)
    columns = 8 if tokens <= 8 and compiled and trellis else 16
    if few:
        return Tile(least, 16, columns, 2 if trellis else 3, 8, 0, groups=8)
    return Tile(max(64, block), 32 if trellis else 64, columns, 2 if trellis else 3, 4, 0)


class LaneLaunch(NamedTuple):
    """How ``lane_product`` is launched.

    Attributes:
        warps: of a program.
        warps_k: warps that share out a row's bytes.
        chunks: of 64 bytes that a warp has on their way at a time.
        rounds: of so many chunks until a row is through.
        programs: how many.
        ahead: of a program's turns whose codes it asks for while its input is analysed, after the first.
    """

    warps: int
    warps_k: int
    chunks: int
    rounds: int
    programs: int
    ahead: int = 0


@tunable
def lane_launch(rows: int, row_bytes: int, multiprocessors: int) -> LaneLaunch:
    """A program for each multiprocessor, whose eight warps have all of a row on their way where registers allow.

    Short rows leave two rows' share of warps a program: the analysis that every program repeats costs more than it.
    """
    return usual_lane_launch(rows, row_bytes, multiprocessors)


@tunable
def trellis_launch(rows: int, row_bytes: int, multiprocessors: int) -> LaneLaunch:
    """The same for a trellis, whose decoding does not wait for memory."""
    return usual_lane_launch(rows, row_bytes, multiprocessors)._replace(ahead=0)


def usual_lane_launch(rows: int, row_bytes: int, multiprocessors: int) -> LaneLaunch:
    """What was measured to be fastest on an H200."""
    if row_bytes <= 20 * LANE_CHUNK:
        return lane_launch_of(rows, row_bytes, multiprocessors, LANE_WARPS, LANE_WARPS // 2, 5)
    return lane_launch_of(rows, row_bytes, multiprocessors, LANE_WARPS, LANE_WARPS, 7)


def lane_launch_of(
    rows: int, row_bytes: int, programs: int, warps: int, warps_k: int, most: int
) -> LaneLaunch:
    """A launch of so many programs, or as many as there are chunks of rows, with ``most`` chunks of bytes or fewer.

    Two turns are asked for ahead, if there are as many.
    """
    total, groups, blocks = -(-row_bytes // LANE_CHUNK), warps // warps_k, -(-rows // LANE_ROWS)
    rounds = -(-total // (warps_k * most))
    chunks = -(-total // (warps_k * rounds))
    shares = -(-blocks // groups)
    programs = min(programs, shares)
    return LaneLaunch(warps, warps_k, chunks, rounds, programs, min(2, -(-shares // programs) - 1))


#: Positions of a cache that one program attends to before they are shared out, and numbers of a tile of keys.
QUERY_POSITIONS, QUERY_NUMBERS = 256, 1 << 14


#: Positions up to which our attention is the faster where query heads share keys, which it reads again for each.
SHARED_POSITIONS = 2048


def query_pays(shared: int, longest: int) -> bool:
    """Whether our attention of one query is faster than torch's: where lines through what was measured meet.

    Args:
        shared: query heads that share a head of the cache.
        longest: positions of the cache.
    """
    return shared == 1 or longest <= SHARED_POSITIONS


def query_tile(dim: int) -> int:
    """Positions that a program with one query takes at a time."""
    return min(128, QUERY_NUMBERS // dim)


def query_splits(programs: int, longest: int) -> int:
    """Into how many parts positions are cut where there are so many programs without: about two a multiprocessor."""
    if longest <= QUERY_POSITIONS:
        return 1
    return max(1, min(-(-longest // QUERY_POSITIONS), 264 // programs))


@tunable
def lanes_pay(trellis: bool, rows: int, local: bool) -> bool:
    """Whether the linear of one token is faster through registers alone; ``local`` to blocks of rows or not."""
    return local or not trellis or rows <= LANE_TRELLIS_ROWS


@tunable
def lane_tokens_pay(rows: int, columns: int, tokens: int, local: bool, multiprocessors: int) -> bool:
    """Whether a product of several tokens is faster through registers alone; ``local`` to blocks of rows or not.

    With a synthesis after it the tiled product was faster.
    """
    return local and rows >= multiprocessors * LEAST_LANE_SHARES * LANE_ROWS


class TokenLaunch(NamedTuple):
    """How ``lane_tokens`` is launched.

    Attributes:
        share: warps that share 32 rows.
        once: whether one turn of all programs has all rows.
        left: how many times 32 rows are left to spare warps.
    """

    share: int
    once: bool
    left: int = 0


def token_launch(rows: int, row_bytes: int, multiprocessors: int, spare: int = MOST_SPARE) -> TokenLaunch:
    """Two warps share rows, or three where that is fewer steps of 64 bytes a warp and no more than one turn.

    Three: five times 32 rows for each multiprocessor, and as many for three spare warps as there are.

    Args:
        row_bytes: of codes.
        spare: most times 32 rows that spare warps may have; 0 if three cannot share.
    """
    blocks, chunks = -(-rows // LANE_ROWS), -(-row_bytes // LANE_CHUNK)
    turns = -(-blocks // (TOKEN_WARPS // 2 * multiprocessors))
    left = max(0, blocks - TOKEN_WARPS // 3 * multiprocessors)
    if spare and left <= min(multiprocessors // 3, spare) and -(-chunks // 3) < turns * -(-chunks // 2):
        return TokenLaunch(3, True, left)
    return TokenLaunch(2, turns == 1)


def lane_alternatives(usual: LaneLaunch, rows: int, row_bytes: int, multiprocessors: int) -> list[LaneLaunch]:
    """Other launches of ``lane_product``: warps that share a row, chunks on their way, two programs side by side.

    And fewer turns that are asked for ahead.
    """
    tried = [usual._replace(ahead=turns) for turns in range(usual.ahead)]
    tried += [
        lane_launch_of(rows, row_bytes, multiprocessors * programs, LANE_WARPS, LANE_WARPS // share, most)
        for share in (1, 2)
        for most in (3, 5, 7)
        for programs in (1, 2)
    ]
    return [launch for launch in dict.fromkeys(tried) if launch != usual]


def trellis_alternatives(
    usual: LaneLaunch, rows: int, row_bytes: int, multiprocessors: int
) -> list[LaneLaunch]:
    """Two chunks on their way leave registers for two programs side by side: more warps, and each analyses."""
    tried = [
        lane_launch_of(rows, row_bytes, multiprocessors * programs, LANE_WARPS, LANE_WARPS, 2)._replace(
            ahead=0
        )
        for programs in (2, 1)
    ]
    return [launch for launch in dict.fromkeys(tried) if launch != usual]


def tile_alternatives(usual: Tile) -> list[Tile]:
    """Neighbours of a tile: stages, steps that are held, warps, and how many programs are aimed at."""
    tried = [usual._replace(stages=stages) for stages in (2, 3, 4)]
    tried += [usual._replace(held=held) for held in (0, 1, 2)]
    tried += [usual._replace(warps=warps) for warps in (4, 8) if usual.groups == 1]
    tried += [usual._replace(programs=usual.programs * k // 2) for k in (1, 4) if usual.programs]
    return [tile for tile in dict.fromkeys(tried) if tile != usual]


class PanelTile(NamedTuple):
    """What one program decodes: ``rows`` of ``words``, of which ``step`` rows at a time; and its warps."""

    rows: int
    step: int
    words: int
    warps: int


def panel_tile(trellis: bool) -> PanelTile:
    """A word, or half a row of a trellis tile, for each thread, so that its codes are one vector to store.

    Of a trellis one row at a time: Triton 3.6 gives the threads of a warp two, and then moves all values through shared
    memory.
    """
    return PanelTile(16, 1, 64, 2) if trellis else PanelTile(16, 2, 64, 4)


#: The same for codes in planes: a word a thread, all rows at a time.
PACKED_PANEL_TILE = PanelTile(4, 4, 128, 4)


def block_panel_tile(block: int) -> PanelTile:
    """For a local output frame: a program decodes two blocks of rows and rotates each."""
    return PanelTile(2 * block, block, 32, 4 if block <= 32 else 8)


class FoldTile(NamedTuple):
    """What makes a rotated panel: units of a warp, warps of a program, registers of a thread."""

    units: int
    warps: int
    registers: int


#: A program each for 16 places of a multiprocessor: 4096 rows of 4096 coordinates are one round of them, and a warp of
#: the analysis makes room for one when it ends.
FOLD_TILE = FoldTile(2, 1, 128)

#: Trellises take longer than to write a panel: in two rounds some decode while others write.
TURN_TILE = FoldTile(1, 2, 112)


def panel_ends(ends: Sequence[int], width: int, tokens: int) -> list[int]:
    """One past the last row of each panel, for chunks of rows that stay together.

    Args:
        ends: the same of each chunk.
        width: coefficients of a row.
        tokens: of the prompt.
    """
    found, start, most = [], 0, panel_rows(ends[-1], width, tokens)
    for end, after in zip(ends, [*ends[1:], ends[-1] + most + 1], strict=True):
        if after - start > most:
            found.append(end)
            start = end
    return found


def panel_rows(rows: int, width: int, tokens: int) -> int:
    """Rows of a panel, in whole tiles of cuBLAS.

    Many tokens: whole rounds of tiles that stay in the cache. Fewer: all that is allowed, to have tiles enough.
    """
    most, cached = PANEL_BYTES // (2 * width), CACHED_BYTES // (2 * width)
    if tokens >= ROUND_ROWS // 2 and cached >= ROUND_ROWS:
        return min(rows, cached // ROUND_ROWS * ROUND_ROWS)
    return min(rows, max(16, most // 256 * 256))


def power_of_two(size: int) -> int:
    """The smallest power of two that is no smaller, from 1 on."""
    return 1 << max(0, size - 1).bit_length()


def vector_warps(sizes: list[int]) -> int:
    """Warps of a program that makes one index of the first axis: 32 of the vector a thread, 64 of the last matrix."""
    first, second, third_in, third_out = sizes[4:]
    return min(16, max(4, first * second * third_in // 1024, third_in * third_out // 2048))


def prompt_warps(sizes: list[int]) -> int:
    """Warps of a program that makes a whole token: 64 float32 registers of each thread for the padded vector.

    And no more than 64 for the last matrix, as halves. Where no frame makes the last axis longer 128, but four warps at
    least: faster at all three sizes that were measured (``benchmarks/README.md``).
    """
    first, second, third_in, third_out = sizes[4:]
    if third_in == third_out:
        return min(16, max(4, first * second * third_in // 4096))
    return min(16, max(2, first * second * max(third_in, third_out) // 2048, third_in * third_out // 4096))


#: Warps of a program of ``prompt_walsh_triton``, a token each. Alone a warp has 128 registers, so 16 share a
#: multiprocessor. No limit of registers: told of one, ptxas 12.8 spills them, even where it needs fewer without.
WALSH_WARPS = 1
#: Bytes of shared memory of each that nothing uses. A multiprocessor divides its memory anew, for programs with more of
#: it, when it is idle: so folds of a panel begin beside this kernel's programs (1 % of a prompt of 4096²).
WALSH_SPARE = 6144


def prompt_registers(sizes: list[int]) -> int:
    """Registers of a thread of a prompt's transform: two programs of eight warps, or more, share a multiprocessor."""
    first, second, third_in, third_out = sizes[4:]
    long = first * second * third_in >= 1 << 14
    return 168 if long and third_in == third_out else 128
