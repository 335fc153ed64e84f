"""What streaming predictions cost: python tests/benchmarks/predict.py CASE [CASE ...]

    workers   images a second of two workers against one, a thread each, after both have loaded;
              and of plain processes that do the same without Ray, which is what the cores allow
    memory    resident memory of driver and workers over 20,000 small images (--images N for fewer)
    listing   time and memory to list a million files

Medians; one worker and two take turns in one run of this program.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from helpers import command, descendants, environment  # noqa: E402
from PIL import Image  # noqa: E402

from model.data.index import ClassMap  # noqa: E402
from model.network.detector import Detector  # noqa: E402
from model.network.scaling import ModelConfig, resolve  # noqa: E402
from model.training.state import Progress, network_config, write_checkpoint  # noqa: E402
from orchestrator.launch.predict_worker import Looker, Shard  # noqa: E402

ROUNDS, NUM_TIMED, NUM_STREAMED, NUM_LISTED = 3, 480, 20_000, 1_000_000
SMALL = ModelConfig(
    backbone="test_efficientnet", pretrained="no", fpn_channels=16, fpn_repeats=1, head_layers=1,
    image_size_px=64, max_level=6,
)  # fmt: skip
REAL = ModelConfig(pretrained="no", image_size_px=256)  # D0 at half its side


def checkpoint(folder: Path, config: ModelConfig) -> Path:
    torch.manual_seed(0)
    detector = Detector(resolve(config, 5))
    folder.mkdir()
    state = detector.state_dict()
    write_checkpoint(
        folder, model=state, ema=state, progress=Progress(1, {}, torch.zeros(6)),
        config={"network": network_config(detector.spec)},
        classes=ClassMap((1, 2, 3, 4, 5), tuple("abcde")), metrics={},
    )  # fmt: skip
    return folder


def pictures(folder: Path, number: int, side_px: int) -> Path:
    """A few different images under many names."""
    folder.mkdir()
    sources = folder.with_name(f"{folder.name}-sources")
    sources.mkdir()
    generator = torch.Generator().manual_seed(0)
    for k in range(min(number, 50)):
        pixels = torch.randint(0, 255, (side_px, side_px, 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(sources / f"{k}.jpg")
    for k in range(number):
        os.link(sources / f"{k % 50}.jpg", folder / f"{k:07d}.jpg")
    return folder


def workers(folder: Path) -> dict[str, float]:
    """From the moment that all workers have answered once to the last answer."""
    from orchestrator.config.predict_cli import PredictRequest
    from orchestrator.launch.crew import Crew
    from orchestrator.launch.fleet import work_through
    from orchestrator.launch.packed_model import PackedModel
    from orchestrator.launch.predict_plan import Shards, plan_of
    from orchestrator.storage.filesystems import open_place
    from orchestrator.storage.images import list_images
    from orchestrator.storage.predictions import PredictionFolder
    from orchestrator.storage.videos import Every

    model = PackedModel.of(checkpoint(folder / "step_00000001", REAL))
    images = list_images([str(pictures(folder / "in", NUM_TIMED, 256))])
    request = PredictRequest("", ())
    shards = Shards(images, request.batch_size, draw=False)
    plan = plan_of(request, shards, model)
    rates: dict[str, list[float]] = {f"{kind}{n}": [] for kind in ("plain", "ray") for n in (1, 2)}
    for turn in range(ROUNDS):
        for name, found in rates.items():
            output = PredictionFolder(open_place(str(folder / f"out-{turn}-{name}"), ""))
            with output.alone():
                output.begin(plan, fresh=False)
            looker = Looker(
                model, output, plan, (), request.score, request.batch_size, Every(), use_gpu=False
            )
            number, todo = int(name[-1]), list(shards.without(()))
            if name.startswith("plain"):
                counted, seconds = plain(looker, todo, number)
            else:
                counted, began = -number, 0.0
                for _ in work_through(todo, looker, Crew(workers=number)):
                    counted += 1
                    if counted == 0:
                        began = time.perf_counter()
                seconds = time.perf_counter() - began
            found.append(counted * shards.size / seconds)
    rate = {name: statistics.median(found) for name, found in rates.items()}
    figures = {f"{name}_img_per_s": value for name, value in rate.items()}
    ratios = {"ratio": rate["ray2"] / rate["ray1"], "allowed": rate["plain2"] / rate["plain1"]}
    return figures | ratios | {"cores": cores()}


def plain(looker: Looker, todo: list[Shard], number: int) -> tuple[int, float]:
    """So many processes with their share each: shards after the first of each, seconds for them."""
    context = multiprocessing.get_context("spawn")
    ready, over = context.Barrier(number + 1), context.Barrier(number + 1)
    processes = [
        context.Process(target=_plain, args=(looker, todo[k::number], ready, over))
        for k in range(number)
    ]
    for process in processes:
        process.start()
    ready.wait(300)
    began = time.perf_counter()
    over.wait(900)
    seconds = time.perf_counter() - began
    for process in processes:
        process.join(60)
    return len(todo) - number, seconds


def _plain(looker: Looker, todo: list[Shard], ready: Barrier, over: Barrier) -> None:
    torch.set_num_threads(1)
    answer = looker()
    answer(todo[0])
    ready.wait(300)
    for shard in todo[1:]:
        answer(shard)
    over.wait(900)


def memory(folder: Path, number: int = NUM_STREAMED) -> dict[str, float]:
    """MiB at a quarter, half, three quarters and the end; of the workers that of the larger."""
    model = checkpoint(folder / "step_00000001", SMALL)
    images = pictures(folder / "in", number, 64)
    asked = ["--workers", "2", "--no-draw", "--output", str(folder / "out"), "--json"]
    process = subprocess.Popen(
        command(str(model), str(images), *asked, job="predict.py"),
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    shares = [0.25, 0.5, 0.75, 0.98]
    found: dict[str, float] = {}
    seen: dict[str, float] = {}
    while process.poll() is None:
        time.sleep(0.2)
        done = len(list((folder / "out" / "parts").glob("*.json")))
        total = json.loads((folder / "out" / "plan.json").read_text())["shards"] if done else 1
        below = descendants(process.pid)
        sizes = [rss_mib(pid) for pid, line in below if "ray::FleetWorker" in line]
        if sizes:
            seen = {"driver_mib": rss_mib(process.pid), "worker_mib": max(sizes)}
        if shares and done / total >= shares[0]:
            at = round(100 * shares.pop(0))
            found |= {f"{name}_at_{at}": value for name, value in seen.items()}
            print(f"{at} %: {seen}", flush=True)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    report = json.loads(out.strip().splitlines()[-1])
    assert report["images"] == number
    return found | {"img_per_s": report["img_per_s"], "cores": cores()}


def listing(folder: Path) -> dict[str, float]:
    from orchestrator.storage.images import list_images

    for part in range(100):
        (folder / "in" / f"{part:03d}").mkdir(parents=True)
        for k in range(NUM_LISTED // 100):
            (folder / "in" / f"{part:03d}" / f"{k:012d}.jpg").touch()
    before, began = rss_mib(os.getpid()), time.perf_counter()
    images = list_images([str(folder / "in")])
    seconds = time.perf_counter() - began
    assert len(images) == NUM_LISTED
    return {"listing_s": seconds, "listing_mib": rss_mib(os.getpid()) - before}


def rss_mib(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # it ended meanwhile
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def cores() -> float:
    return float(len(os.sched_getaffinity(0)))


def main(arguments: list[str]) -> None:
    number = NUM_STREAMED
    if "--images" in arguments:
        at = arguments.index("--images")
        number = int(arguments[at + 1])
        arguments = arguments[:at] + arguments[at + 2 :]
    cases = {
        "workers": workers,
        "memory": lambda folder: memory(folder, number),
        "listing": listing,
    }
    for case in arguments or list(cases):
        with tempfile.TemporaryDirectory() as temporary:
            found = cases[case](Path(temporary))
        print(
            case, json.dumps({name: round(value, 2) for name, value in found.items()}), flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
