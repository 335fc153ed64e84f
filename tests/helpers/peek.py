"""A dataset that tells what its index looks like from inside a loader process."""

from __future__ import annotations

import torch

from model.data.index import CocoIndex


class Peek(torch.utils.data.Dataset[bool]):
    """Each item: are the arrays in shared memory, and do they read as they were sent?"""

    def __init__(self, index: CocoIndex) -> None:
        self.index = index
        self.expected = index.boxes_xyxy.tolist(), index.file_names.tolist()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, _: int) -> bool:
        tensors = self.index.__dict__["_tensors"]
        found = self.index.boxes_xyxy.tolist(), self.index.file_names.tolist()
        return found == self.expected and all(t.is_shared() for t in tensors.values())
