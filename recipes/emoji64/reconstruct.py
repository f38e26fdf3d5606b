"""How much of a KID is the autoencoder's? KID of seen images encoded and decoded, beside that of the images themselves.

python recipes/emoji64/reconstruct.py --data DATA
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import load_data, posed, to_float

from onestroke.metrics import LiteFeatures, kid, reference_features
from onestroke.teachers import load_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args()
    images, _, held = load_data(args.data)
    seen = torch.from_numpy((~held).nonzero()[0])
    chosen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(5))[: args.count]]
    torch.manual_seed(6)
    real, teacher, extract = posed(to_float(images[chosen])), load_teacher("emoji64"), LiteFeatures()
    with torch.no_grad():
        again = teacher.decode(teacher.pipeline.vae.encode(real).latents)
    reference, _ = reference_features("emoji64")
    scores = [kid(extract.of(images), reference) for images in (real / 2 + 0.5, again)]
    print("real {:.4f}, reconstructed {:.4f}".format(*scores))


if __name__ == "__main__":
    main()
