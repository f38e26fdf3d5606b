"""Stage 0: 9,288 captioned emoji images of five styles, 64x64 RGB on white, from npm packages of free artwork.

Writes emoji64_base_permissive.npz (x: uint8 (N, 64, 64, 3)) and emoji64_base_permissive.json, which gives row by row
style, hex (code points), caption, tags and group. Rows follow the packages in the order below, and the file names
within a package. Skin-tone variants are left out, and every file that has no caption.

Needs the npm client on the path and `pip install onestroke[recipes]` (resvg-py draws the SVG files).

    python recipes/emoji64/data.py --out DATA
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 64
NAME = "emoji64_base_permissive"
COMPONENTS = "components"  # emojibase's group of the skin tones themselves


class Source(NamedTuple):
    """One style: an npm package and the folder of its images."""

    package: str
    folder: str
    licence: str


SOURCES = {
    "fluent3d": Source("@lobehub/fluent-emoji-3d@1.1.0", "assets", "MIT"),
    "fluentflat": Source("@lobehub/fluent-emoji-flat@1.1.0", "assets", "MIT"),
    "fluentmodern": Source("@lobehub/fluent-emoji-modern@1.0.0", "assets", "MIT"),
    "noto": Source("emoji-datasource-google@16.0.0", "img/google/64", "Apache-2.0"),
    "twemoji": Source("emoji-datasource-twitter@16.0.0", "img/twitter/64", "CC-BY-4.0"),
}
CAPTIONS = "emojibase-data@17.0.0"  # MIT


def fetch(package: str, folder: Path) -> Path:
    """The package's archive in `folder`, by `npm pack`; one that is there already is kept."""
    name, version = package.rsplit("@", 1)
    archive = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        print(f"npm pack {package}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return archive


def read_json(archive: tarfile.TarFile, name: str) -> list | dict:
    file = archive.extractfile(f"package/{name}")
    assert file is not None, name
    return json.load(file)


def code_points(name: str) -> str:
    """'0023-FE0F-20E3' -> '0023-20e3': lower case, without the variation selector that names disagree about."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def captions(archive: Path) -> dict[str, dict]:
    """Code points -> caption, tags and group; skin tones, which are variants of an entry, are not among them."""
    with tarfile.open(archive) as tar:
        entries, messages = read_json(tar, "en/data.json"), read_json(tar, "en/messages.json")
    groups = {g["order"]: g["message"] for g in messages["groups"]}
    return {
        code_points(e["hexcode"]): {"caption": e["label"], "tags": e["tags"], "group": groups[e["group"]]}
        for e in entries
        if "group" in e and groups[e["group"]] != COMPONENTS
    }


def files(archive: Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of a folder of the archive, by file name. Names without an extension are misprints."""
    with tarfile.open(archive) as tar:
        members = {m.name.removeprefix(f"package/{folder}/"): m for m in tar if m.isfile()}
        for name in sorted(n for n in members if "/" not in n and "." in n):
            file = tar.extractfile(members[name])
            assert file is not None, name
            yield name, file.read()


def draw(name: str, content: bytes) -> np.ndarray:
    """One image (64, 64, 3): SVG drawn at 64 pixels, anything else resized by Lanczos; alpha composited on white."""
    if name.endswith(".svg"):
        import resvg_py

        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=SIDE, height=SIDE))
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data set; archives go to OUT/npm")
    out = parser.parse_args().out
    if (out / f"{NAME}.npz").exists():
        print(f"{out / NAME}.npz exists: nothing to do.")
        return
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        sys.exit("error: SVG files are drawn by resvg-py: pip install 'onestroke[recipes]'.")
    about = captions(fetch(CAPTIONS, out / "npm"))
    images, rows = [], []
    for style, source in SOURCES.items():
        for name, content in files(fetch(source.package, out / "npm"), source.folder):
            code = code_points(name.rsplit(".", 1)[0])
            if code in about:
                images.append(draw(name, content))
                rows.append({"style": style, "hex": code, **about[code]})
        print(f"{style}: {sum(row['style'] == style for row in rows)} images ({source.licence})", flush=True)
    (out / f"{NAME}.json").write_text(json.dumps(rows, ensure_ascii=False))
    np.savez_compressed(out / f"{NAME}.npz", x=np.stack(images))


if __name__ == "__main__":
    main()
