"""DataLoaders around the stateless sampler."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import cast

import torch
from torch.utils.data import DataLoader

from model.data.dataset import Batch, DetectionDataset, Sample, collate
from model.data.sampler import StepSampler, evaluation_share

READ_AHEAD = 4  # batches


def training_loader(
    dataset: DetectionDataset, sampler: StepSampler, *, workers: int, device: torch.device
) -> DataLoader[Sample]:
    """Yields a Batch for each shard, in order, from the sampler's first step to its last."""
    return _loader(dataset, sampler, workers, device)


def evaluation_batches(
    dataset: DetectionDataset,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """This rank's share of the images, each once."""
    share = list(evaluation_share(len(dataset), rank, world_size))
    batches = [
        [(0, image) for image in share[i : i + batch_size]]
        for i in range(0, len(share), batch_size)
    ]
    yield from _loader(dataset, batches, workers, device)


class ReadAhead:
    """Batches as they come, each announced to the dataset READ_AHEAD batches before its turn."""

    def __init__(self, batches: Iterable[list[tuple[int, int]]], dataset: DetectionDataset) -> None:
        self.batches, self.dataset = batches, dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.batches))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        coming: deque[list[tuple[int, int]]] = deque()
        for batch in self.batches:
            self.dataset.read_ahead(batch)
            coming.append(batch)
            if len(coming) > READ_AHEAD:
                yield coming.popleft()
        yield from coming


def _loader(
    dataset: DetectionDataset,
    batches: Iterable[list[tuple[int, int]]],
    workers: int,
    device: torch.device,
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_sampler=ReadAhead(batches, dataset),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # A forked child of a process with CUDA and Ray threads can deadlock.
        multiprocessing_context="forkserver" if workers else None,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
    )
