# %% [markdown]
# # A vision transformer at several rates
#
# A small timm vision transformer learns MNIST digits in a minute on a CPU; then it is quantized at several rates, and
# compared with plain rounding at the same code. Needs `pip install '.[vision]'` and the MNIST arrays; the first cell
# says where they are looked for.

# %%
import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import timm
import torch
from torch.nn import functional

import framequant as fq

folder = Path(os.environ.get("FRAMEQUANT_SHARED", "../shared")) / "data" / "mnist"
arrays = {part: np.load(folder / f"mnist_{part}.npz") for part in ("train", "test")}


def tensors(part, count):
    chosen = np.random.RandomState(0).permutation(len(arrays[part]["y"]))[
        :count
    ]  # the files are sorted by digit
    images, labels = arrays[part]["x"][chosen], arrays[part]["y"][chosen]
    return torch.from_numpy(images[:, None].astype("float32")) / 255, torch.from_numpy(labels.astype("int64"))


train, train_labels = tensors("train", 12000)
test, test_labels = tensors("test", 2000)

# %%
torch.manual_seed(0)
sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4}
model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
steps = 5 * len(train) // 128
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
for _ in range(steps):
    batch = torch.randint(0, len(train), (128,))
    loss = functional.cross_entropy(model(train[batch]), train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
model.eval()


def accuracy(model):
    with torch.no_grad():
        return float((model(test).argmax(1) == test_labels).float().mean())


print(f"float: {accuracy(model):.1%} of {len(test)} test images")

# %% [markdown]
# The linears are tiny (64 wide), so what is stored beside the codes weighs more than in a real model: compare measured
# bits, not nominal ones.

# %%
for name, config in {
    "frame, r = 1.25": fq.preset("framequant-scalar", redundancy=1.25),
    "frame, r = 1.125": fq.preset("framequant-scalar", redundancy=1.125),
    "Hadamard, r = 1": fq.preset("framequant-scalar", redundancy=1.0, frame="hadamard"),
    "plain rounding": fq.preset("rtn"),
    "plain rounding, 3 bits": fq.preset("rtn", bits=3),
}.items():
    quantized = deepcopy(model)
    report = fq.quantize_(quantized, train[:128], config)
    print(f"{name:>22}: {report.bits_per_weight:.2f} bits, {accuracy(quantized):.1%}")
