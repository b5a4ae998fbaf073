"""Peers at two and three bits: the same model, calibration text and evaluation as our own rows.

    python experiments/peers/run.py --quick
    python experiments/peers/run.py --model smollm2 --env hqq=/venvs/hqq/bin/python --only ":2 bit"

Each peer runs in a process of its own, with the Python that ``--env PEER=PYTHON`` names, or with ours and, on its path,
the folder ``--env PEER=FOLDER`` that its packages were installed to (``pip install --no-deps --target FOLDER hqq``).
One that is not installed or fails is a row with its last words.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import Bench, Record, Row, benches, parse, parser  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import framequant as fq  # noqa: E402
from framequant.checkpoint import read_json  # noqa: E402
from framequant.integrations.sources import open_model  # noqa: E402

#: Peer, its runner, and its widths.
PEERS = {
    "HQQ": ("hqq", (2, 3)),
    "GPTQModel": ("gptqmodel", (2, 3)),
    "AutoRound": ("autoround", (2, 3)),
    "bitsandbytes": ("bitsandbytes", (2, 3, 4)),
}
#: Peers that optimize or need minutes on two cores; a quick run has them only where ``--env`` names them.
SLOW = {"gptqmodel", "autoround"}


def run_peer(bench: Bench, folder: Path, runner: str, bits: int, place: str | None, device: str) -> Row:
    """One row of a peer.

    Raises:
        FrameQuantError: it is not installed, failed or took too long; with its last words.
    """
    out = folder / f"{runner}-{bits}"
    is_folder = place is not None and Path(place).is_dir()
    python = sys.executable if place is None or is_folder else place
    path = os.pathsep.join(filter(None, [place if is_folder else "", os.environ.get("PYTHONPATH", "")]))
    command = [
        python,
        str(HERE / f"run_{runner}.py"),
        str(folder / "float"),
        str(folder / "windows.safetensors"),
        str(out),
    ]
    command += ["--bits", str(bits), "--device", device]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=1200, cwd=folder, env={**os.environ, "PYTHONPATH": path}
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise fq.FrameQuantError(f"{runner}: {error}") from error
    if done.returncode:
        words = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise fq.FrameQuantError(words[-1] if words else f"{runner} ended with {done.returncode}")
    model = open_model(str(out), device=device).model
    return {**read_json(out / "peer.json"), **bench.evaluate(model)}


def prepare(bench: Bench, folder: Path) -> None:
    """Write the float model and the calibration windows for the peers."""
    model = bench.model
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder / "float")
    bench.opened.require_tokenizer().save_pretrained(folder / "float")
    save_file({"windows": bench.data().cpu().contiguous()}, folder / "windows.safetensors")


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--env", action="append", default=[], metavar="PEER=PYTHON|FOLDER")
    options.add_argument(
        "--only", action="append", metavar="WORDS", help="rows that have these in their name"
    )
    args = parse(options, __file__, argv)
    places = dict(
        entry.partition("=")[::2] for entry in [*os.environ.get("FRAMEQUANT_PEERS", "").split(), *args.env]
    )
    record = Record(args, "peers")
    for bench in benches(args, record, ["smollm2"]):
        if bench.kind != "language":
            continue
        device = next(bench.model.parameters()).device.type
        record.attempt(bench.float_row, model=bench.name, method="float")
        with TemporaryDirectory() as name:
            folder = Path(name)
            prepare(bench, folder)
            for peer, (runner, widths) in PEERS.items():
                if args.quick and runner in SLOW and runner not in places:
                    if wanted(peer, args.only):
                        record.add(
                            model=bench.name,
                            method=peer,
                            error="left out of a quick run: minutes on two cores",
                        )
                    continue
                for bits in widths:
                    known = {"model": bench.name, "method": f"{peer}:{bits} bit"}
                    if not wanted(known["method"], args.only):
                        continue
                    record.attempt(
                        lambda b=bench, f=folder, r=runner, n=bits, d=device: run_peer(b, f, r, n, places.get(r), d),
                        **known,
                    )  # fmt: skip
        own(bench, record, args.quick, args.only)
    text = (
        "Real peers on the same model, the same calibration windows and the same evaluation; groups of 64, what they "
        "store counted as bits. One that is not installed or fails is listed with its last words."
    )
    record.plots("Peers", text)


def wanted(method: str, only: Sequence[str] | None) -> bool:
    """Whether a row is among those asked for."""
    return not only or any(words in method for words in only)


def own(bench: Bench, record: Record, quick: bool, only: Sequence[str] | None = None) -> None:
    """Our own rows at the same widths; those of a quick run are among the tables' rows."""
    for bits in (2,) if quick else (2, 3):
        both = fq.preset("framequant-paper", bits=bits, redundancy=1.1)
        rows = {"GPTQ (ours)": fq.preset("gptq", bits=bits), "FrameQuant, both sides, r = 1.1 (ours)": both}
        if not quick:
            groups = fq.preset("gptq", bits=bits, group_size=64, grid="search")
            rows["GPTQ groups of 64 (ours)"] = groups
            rows["framequant-scalar, r = 1.125 (ours)"] = fq.preset("framequant-scalar", bits=bits)
            rows["framequant, trellis (ours)"] = fq.preset("framequant", bits=bits + 0.25)
        for method, config in rows.items():
            name = f"{method}:{bits} bit"
            if wanted(name, only):
                record.attempt(lambda c=config: bench.row(c), model=bench.name, method=name)


if __name__ == "__main__":
    main()
