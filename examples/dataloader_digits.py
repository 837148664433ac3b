"""A DataLoader whose samples are NumPy arrays, and a prefetch that brings batches to the device while the model trains.

The handwritten digits that ship inside scikit-learn. Run: python examples/dataloader_digits.py [WORKERS]
"""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset

import tensorbridge as tb


class Digits(Dataset):
    """Samples as they come from the disk: NumPy arrays that nobody may write to, and plain numbers."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.images.setflags(write=False)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": int(self.labels[i])}


def train(epochs=4, workers=0):
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    cut = len(images) * 4 // 5
    training = Digits(images[:cut], digits.target[:cut])
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    loader = DataLoader(
        training, 64, shuffle=True, num_workers=workers, persistent_workers=workers > 0, collate_fn=tb.collate
    )
    for epoch in range(epochs):
        for batch in tb.prefetch(loader, device=device):
            loss = torch.nn.functional.cross_entropy(model(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    scores = tb.to_numpy(model(tb.to_torch(images[cut:], device=device)))  # read-only: a graph hangs on the scores
    return float((scores.argmax(axis=1) == digits.target[cut:]).mean())


if __name__ == "__main__":
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    with tb.trace() as seen:
        accuracy = train(workers=workers)
    totals = seen.totals
    print(f"accuracy {accuracy:.3f}")
    print(f"{totals.conversions} conversions, {totals.shared} shared; {totals.nbytes} bytes moved {totals.by_kind}")
    if workers:
        print("(batches are made in the worker processes, in shared memory; their bytes are not seen here)")
