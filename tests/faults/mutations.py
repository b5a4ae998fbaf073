"""Ways to damage a checkpoint directory, each chosen and applied by a seeded generator."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

CONFIG, INDEX, CHECKSUMS = "config.json", "model.safetensors.index.json", "framequant_checksums.json"
HUGE = [2**31, 2**63 - 1, 2**64, 10**12, 10**30, 10**400]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        255,
        65537,
        0.5,
        -0.0,
        1e308,
        "",
        "0",
        "none",
        "../x",
        "/etc/passwd",
    ),
    *([], {}, [0], [[[]]], {"a": 1}, ["x", None], "float32", "bfloat16", "\u0000", "é" * 50, *HUGE),
]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "[" * 5000, '{"a":' * 2000, "01", "'x'"]
DTYPES = [
    "U8",
    "I8",
    "I16",
    "U16",
    "BF16",
    "F16",
    "F32",
    "F64",
    "I32",
    "I64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "Q9",
    "",
]
PATHS = [
    "../outside.safetensors",
    "/etc/passwd",
    "a/../../outside.safetensors",
    "..",
    "",
    "model.bin",
    "no.safetensors",
]


def weights(directory: Path, random: Random) -> Path:
    return random.choice(sorted(directory.glob("*.safetensors")))


def read(path: Path) -> tuple[int, dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: dict[str, Any] | str, body: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def flip_payload(directory: Path, random: Random) -> str:
    """Flip one bit of a tensor."""
    path = weights(directory, random)
    length, _, body = read(path)
    if not body:
        return "nothing"
    data, place = bytearray(body), random.randrange(len(body))
    data[place] ^= 1 << random.randrange(8)
    path.write_bytes(path.read_bytes()[: 8 + length] + bytes(data))
    return f"bit of byte {place}"


def flip_header(directory: Path, random: Random) -> str:
    """Change a byte of a safetensors header or of its length."""
    path = weights(directory, random)
    length, _, _ = read(path)
    data = bytearray(path.read_bytes())
    place = random.randrange(8) if random.random() < 0.2 else random.randrange(8 + length)
    data[place] = random.randrange(256)
    path.write_bytes(bytes(data))
    return f"byte {place}"


def truncate(directory: Path, random: Random) -> str:
    """Cut a file off."""
    path = random.choice(sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors")))
    size = random.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} to {size}"


def append(directory: Path, random: Random) -> str:
    """Add bytes behind a file's end."""
    path = random.choice(sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors")))
    extra = random.randbytes(random.randrange(1, 64))
    path.write_bytes(path.read_bytes() + extra)
    return f"{path.name} by {len(extra)}"


def edit_header(directory: Path, random: Random) -> str:
    """Change shape, dtype, offsets or key of one tensor, or the metadata, in well-formed JSON."""
    path = weights(directory, random)
    _, header, body = read(path)
    keys = [key for key in header if key != "__metadata__"]
    key = random.choice(keys)
    entry = header[key]
    kind = random.choice(
        ["shape", "size", "dtype", "offset", "swap", "rename", "drop", "double", "metadata", "value"]
    )
    if kind == "shape" and entry["shape"]:
        entry["shape"][random.randrange(len(entry["shape"]))] = random.choice([*HUGE, *VALUES, 2**40])
    elif kind == "size":
        entry["shape"] = random.choice(
            [[], entry["shape"][::-1], [*entry["shape"], 1], [-1], [2**32, 2**32], "x"]
        )
    elif kind == "dtype":
        entry["dtype"] = random.choice([*DTYPES, None, 3])
    elif kind == "offset":
        end = random.randrange(2)
        entry["data_offsets"][end] = random.choice([*HUGE, -1, 0, entry["data_offsets"][end] + 1, None, "7"])
    elif kind == "swap":
        other = header[random.choice(keys)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif kind == "rename":
        header[key[:-1] + random.choice("abcxyz")] = header.pop(key)
    elif kind == "drop":
        del header[key]
    elif kind == "double":
        write(path, json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}}}", body)
        return f"{key} twice"
    elif kind == "metadata":
        header["__metadata__"] = random.choice([{"format": "pt", "a": 1}, [], None, {"format": "tf"}, {}])
    else:
        header[key] = random.choice(VALUES)
    write(path, header, body)
    return f"{kind} of {key}"


def _containers(value: Any) -> list[Any]:
    found = [value] if isinstance(value, dict | list) and value else []
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        found += _containers(part)
    return found


def edit_json(directory: Path, random: Random, name: str = CONFIG, inside: Any = None) -> str:
    """Replace, drop, rename or double a random value of a JSON file."""
    path = directory / name
    data = json.loads(path.read_text())
    place = random.choice(_containers(inside(data) if inside else data))
    key = random.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
    kind = random.choice(["value", "value", "value", "number", "drop", "rename", "raw", "double", "deep"])
    old = place[key]
    if kind == "value":
        place[key] = random.choice(VALUES)
    elif kind == "number" and isinstance(old, int | float):
        place[key] = random.choice([old + 1, old - 1, -old, old * 2, float(old), str(old), bool(old), *HUGE])
    elif kind == "drop":
        del place[key]
    elif kind == "rename" and isinstance(place, dict):
        place[str(key) + random.choice(["x", "_", " "])] = place.pop(key)
    elif kind in ("raw", "double"):
        place[key] = "@@"
        text = json.dumps(data)
        again = f"{json.dumps(old)}, {json.dumps(str(key))}: {json.dumps(random.choice(VALUES[:12]))}"
        raw = again if kind == "double" and isinstance(place, dict) else random.choice(RAW)
        path.write_text(text.replace('"@@"', raw))
        return f"{kind} of {key}"
    else:
        place[key] = [old] * random.randrange(4)
    path.write_text(json.dumps(data))
    return f"{kind} of {key}: {str(old)[:30]!r}"


def edit_quantization(directory: Path, random: Random) -> str:
    """Damage ``quantization_config``."""
    return edit_json(directory, random, inside=lambda data: data["quantization_config"])


def edit_model(directory: Path, random: Random) -> str:
    """Damage the library's part of the config: sizes, names, types; one value of the top level or below."""

    def container(data: dict[str, Any]) -> Any:
        theirs = [key for key in data if key != "quantization_config"]
        nested = [data[key] for key in theirs if isinstance(data[key], dict | list) and data[key]]
        return random.choice(nested) if nested and random.random() < 0.3 else {"": data}

    path = directory / CONFIG
    data = json.loads(path.read_text())
    place = container(data)
    keys = sorted(place) if isinstance(place, dict) else range(len(place))
    if "" in keys:
        place = data
        keys = [key for key in data if key != "quantization_config"]
    if not keys:
        return "nothing"
    key = random.choice(keys)
    old = place[key]
    if isinstance(old, int | float) and random.random() < 0.5:
        place[key] = random.choice(
            [old + 1, old - 1, -old, 2 * old, 0, float(old), str(old), bool(old), *HUGE]
        )
    elif random.random() < 0.2:
        del place[key]
    else:
        place[key] = random.choice(VALUES)
    path.write_text(json.dumps(data))
    return f"{key}: {str(old)[:30]!r}"


def edit_linears(directory: Path, random: Random) -> str:
    """Damage the entry of one linear: its scheme, its seeds, its name."""
    path = directory / CONFIG
    data = json.loads(path.read_text())
    linears = data["quantization_config"]["linears"]
    name = random.choice(sorted(linears))
    kind = random.choice(["scheme", "seed", "name", "swap", "value", "drop"])
    if kind == "scheme":
        linears[name][0] = random.choice([-1, 1, 2, 99, True, None, 1.0, "0", 2**70])
    elif kind == "seed":
        linears[name][random.choice([1, 2])] = random.choice(
            [-1, 0, 1, 2**64, 2**63, None, "1", 0.0, True, *HUGE]
        )
    elif kind == "name":
        linears[random.choice(["", ".", "..", name + ".x", name[1:], "lm_head", "__class__"])] = linears.pop(
            name
        )
    elif kind == "swap":
        other = random.choice(sorted(linears))
        linears[name], linears[other] = linears[other], linears[name]
    elif kind == "value":
        linears[name] = random.choice(VALUES)
    else:
        del linears[name]
    path.write_text(json.dumps(data))
    return f"{kind} of {name}"


def edit_index(directory: Path, random: Random) -> str:
    """Damage the index of shards, or put a hostile one there."""
    path = directory / INDEX
    if not path.exists():
        (directory / "model.safetensors").rename(directory.parent / f"{directory.name}-outside.safetensors")
        target = random.choice([f"../{directory.name}-outside.safetensors", *PATHS])
        path.write_text(json.dumps({"weight_map": {"a": target}}))
        return target
    if random.random() < 0.5:
        return edit_json(directory, random, INDEX)
    data = json.loads(path.read_text())
    key = random.choice(sorted(data["weight_map"]))
    names = sorted(set(data["weight_map"].values()))
    data["weight_map"][key] = random.choice(
        [*PATHS, *names, None, 3, ["x"], "model-00001-of-99999.safetensors"]
    )
    path.write_text(json.dumps(data))
    return f"{key} to {data['weight_map'][key]}"


def flip_text(directory: Path, random: Random) -> str:
    """Change bytes of a JSON file as text."""
    path = random.choice(sorted(directory.glob("*.json")))
    data = bytearray(path.read_bytes())
    for _ in range(random.choice([1, 1, 1, 8])):
        data[random.randrange(len(data))] = random.randrange(256)
    path.write_bytes(bytes(data))
    return path.name


def replace_file(directory: Path, random: Random) -> str:
    """Put something else in a file's place: nothing, a folder, noise, a pickle."""
    path = random.choice(sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors")))
    kind = random.choice(["missing", "folder", "empty", "noise", "pickle", "bin"])
    content = pickle.dumps({"a": [1, 2, 3]})
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "bin":
        (directory / "pytorch_model.bin").write_bytes(content)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "noise": random.randbytes(500), "pickle": content}[kind])
    return f"{kind} for {path.name}"


def edit_checksums(directory: Path, random: Random) -> str:
    """Damage the checksums themselves."""
    if not (directory / CHECKSUMS).exists():
        return "nothing"
    return edit_json(directory, random, CHECKSUMS)


def edit_report(directory: Path, random: Random) -> str:
    """Damage the report, which no model is made from."""
    return edit_json(directory, random, "framequant_report.json")


MUTATIONS: dict[str, Callable[[Path, Random], str]] = {
    function.__name__: function
    for function in (
        *(
            flip_payload,
            flip_header,
            truncate,
            append,
            edit_header,
            edit_json,
            edit_quantization,
            edit_linears,
            edit_model,
        ),
        *(edit_index, flip_text, replace_file, edit_checksums, edit_report),
    )
}


def mutate(directory: Path, seed: int) -> tuple[str, str]:
    """Damage a directory by one random mutation; its name and what it did."""
    random = Random(f"mutation {seed}")  # not the numbers that chose the checkpoint
    name = random.choice(sorted(MUTATIONS))
    return name, MUTATIONS[name](directory, random)
