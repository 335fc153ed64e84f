"""jobs/serve.py as its callers meet it: a real Ray Serve, crowds, what is hostile, and a browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.browser import browser, complaints, drop, is_there
from helpers.crowd import crowd
from helpers.hostile import encoded, hostile, picture
from helpers.serving import PredictionServer
from helpers.small_detector import small_detector
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

from orchestrator.config.predict_cli import PredictOptions, PredictRequest
from orchestrator.launch.predict_job import run_predict_job

pytestmark = pytest.mark.integration
STATUS = {"read": 200, "unknown": 415, "large": 413, "unusable": 422}
PNG = encoded(picture(size=(120, 90)), "PNG")
READY_S = 120.0
SLOW = 12  # that many large pictures take longer than Serve waits when nobody tells it how long
COPY = "ServeReplica:detector:detector"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_detector(tmp_path_factory.mktemp("model") / "step_00000003")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[PredictionServer]:
    log = model.parent / "serve.txt"
    arguments = ("--max-queued", "64", "--max-image-mb", "4", "--timeout-s", "120")
    with PredictionServer(str(model), log, *arguments) as running:
        yield running


def wait_until_ready(server: PredictionServer) -> None:
    end = time.monotonic() + READY_S
    while server.ask("/readyz")[0] != 200:
        assert time.monotonic() < end, server.ask("/readyz")
        time.sleep(0.5)


def test_the_job_and_the_server_find_the_same(
    server: PredictionServer, model: Path, tmp_path: Path
) -> None:
    images = {
        "1.png": PNG,
        "2.jpg": encoded(picture("CMYK", (200, 320)), "JPEG"),
        "3.jpg": hostile()["jpeg, rotated by EXIF"].data,
    }
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    # One thread, as the server's copy has: sums differ in their last digits.
    request = PredictRequest(
        str(model), (str(tmp_path),), str(tmp_path / "out"), score=0.0, batch_size=1, draw=False,
        workers=0, threads_per_worker=1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert run_predict_job(request, PredictOptions(json=False)).code == 0
    finally:
        torch.set_num_threads(threads)
    expected = json.loads((tmp_path / "out" / "detections.json").read_text())
    for number, (name, data) in enumerate(images.items(), start=1):
        status, answer = server.ask("/predict?score=0", data, Content_Type="image/*")
        assert status == 200, answer
        theirs = [row for row in expected if row["image_id"] == number]
        assert len(answer["detections"]) == len(theirs) > 50, name
        for ours, row in zip(answer["detections"], theirs, strict=True):
            assert ours["bbox_xywh"] == pytest.approx(row["bbox"], abs=1e-6)
            assert ours["score"] == pytest.approx(row["score"], abs=1e-6)
            assert (ours["category_id"], ours["category"]) == (row["category_id"], row["category"])


def test_hostile_images_get_an_answer_or_one_reason(server: PredictionServer) -> None:
    for name, sent in hostile().items():
        status, answer = server.ask("/predict", sent.data, Content_Type="image/jpeg")
        assert status == STATUS[sent.verdict], (name, answer)
        if status != 200:
            assert list(answer["error"]) == ["where", "expected", "got", "remedy"], name
    assert server.ask("/readyz")[0] == 200
    assert len(server.below(COPY)) == 1


@pytest.mark.parametrize("said", [b"Content-Length: 10000000000", b"Transfer-Encoding: chunked"])
def test_a_gigantic_body_is_refused_before_it_is_there(
    server: PredictionServer, said: bytes
) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n" + said + b"\r\n\r\n"
    piece = b"100000\r\n" + bytes(2**20) + b"\r\n" if b"chunked" in said else bytes(2**20)
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as caller:
        caller.sendall(head)
        caller.settimeout(0.05)
        while not select.select([caller], [], [], 0.05)[0] and sent < 500:
            with contextlib.suppress(TimeoutError):
                caller.sendall(piece)
            sent += 1
        caller.settimeout(60)
        answer = http.client.HTTPResponse(caller)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["where"]) == (413, "body"), sent
    assert server.ask("/healthz")[0] == 200


def test_who_closes_after_the_answer_sees_it_too(server: PredictionServer) -> None:
    """urllib asks for that with each request, and looks at nothing before all is sent."""
    status, answer = server.ask("/predict", bytes(6_000_000), Content_Type="image/png")
    assert (status, answer["error"]["expected"]) == (413, "at most 4,000,000 bytes")


@pytest.mark.parametrize("number", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_crowd_is_answered_one_by_one(server: PredictionServer, number: int) -> None:
    heard = crowd(f"{server.url}/predict", PNG, number, timeout_s=540)
    statuses = Counter(one.status for one in heard)
    assert len(heard) == number
    assert set(statuses) <= {200, 503, 504}, [one.content for one in heard if not one.status][:3]
    assert statuses[200] >= 64
    for one in heard:
        if one.status == 503:
            assert one.retry_after is not None
        if one.status != 200:
            assert set(one.content["error"]) == {"where", "expected", "got", "remedy"}
    wait_until_ready(server)
    status, answer = server.ask("/predict", PNG, Content_Type="image/png")
    assert status == 200, answer
    for pid in server.below("ProxyActor") + server.below("ServeReplica"):
        assert resident_mib(pid) < 3000


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_a_copy_that_dies_is_replaced(server: PredictionServer) -> None:
    (before,) = server.below(COPY)
    os.kill(before, signal.SIGKILL)
    end = time.monotonic() + READY_S
    while server.below(COPY) in ([], [before]):
        assert time.monotonic() < end
        time.sleep(0.2)
    wait_until_ready(server)
    assert server.ask("/predict", PNG, Content_Type="image/png")[0] == 200


@pytest.fixture
def page(server: PredictionServer) -> Iterator[WebDriver]:
    if not is_there():
        pytest.skip("needs Debian's chromium and chromium-driver")
    with browser(1200, 900) as driver:
        driver.get(server.url)
        WebDriverWait(driver, 60).until(lambda one: "EfficientDet-D0" in one.title)
        yield driver


def boxes(page: WebDriver) -> str | None:
    return page.find_element(By.ID, "canvas").get_attribute("data-boxes")


def entries(page: WebDriver) -> int:
    return len(page.find_elements(By.CSS_SELECTOR, "#list li"))


COLOURS = """
const canvas = document.getElementById("canvas");
const bytes = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const seen = new Set();
for (let i = 0; i < bytes.length; i += 4) seen.add(bytes[i] * 65536 + bytes[i + 1] * 256 + bytes[i + 2]);
return [canvas.width, canvas.height, seen.size];
"""
SLIDE = """
const slider = document.getElementById("score");
slider.value = arguments[0];
slider.dispatchEvent(new Event("input", { bubbles: true }));
"""


def test_a_dropped_image_is_shown_with_its_boxes(
    page: WebDriver, server: PredictionServer, tmp_path: Path
) -> None:
    file = tmp_path / "disc.png"
    file.write_bytes(PNG)
    _, answer = server.ask("/predict?score=0.05", PNG, Content_Type="image/png")
    scores = [one["score"] for one in answer["detections"]]
    assert len(scores) > 5
    page.execute_script(SLIDE, 0.05)
    drop(page, file, "image/png")
    WebDriverWait(page, 60).until(lambda one: boxes(one) == str(len(scores)))
    assert entries(page) == len(scores)
    width, height, colours = page.execute_script(COLOURS)
    assert (width, height) == (120, 90)
    middle = sorted(scores)[len(scores) // 2]
    page.execute_script(SLIDE, middle + 0.01)
    shown = page.find_element(By.ID, "score").get_attribute("value")
    left = sum(one >= float(str(shown)) for one in scores)
    assert boxes(page) == str(left)
    assert entries(page) == left < len(scores)
    page.execute_script(SLIDE, 0.95)
    surest = sum(one >= 0.95 for one in scores)  # hardly any, but the weights are another machine's
    assert (boxes(page), entries(page)) == (str(surest), surest)
    assert page.execute_script(COLOURS)[2] < colours  # the plain picture has fewer
    assert complaints(page) == []


def test_a_chosen_file_and_an_error_in_words(page: WebDriver, tmp_path: Path) -> None:
    image, text = tmp_path / "photo.jpg", tmp_path / "text.jpg"
    image.write_bytes(encoded(picture(size=(300, 200)), "JPEG"))
    text.write_text("<html>no image</html>")
    field = page.find_element(By.ID, "file")
    field.send_keys(str(text))
    problem = page.find_element(By.ID, "problem")
    WebDriverWait(page, 60).until(lambda one: problem.is_displayed())
    assert "image: expected one of JPEG" in problem.text
    field.send_keys(str(image))
    WebDriverWait(page, 60).until(lambda one: boxes(one) not in (None, ""))
    assert not problem.is_displayed()
    assert "300 × 200 pixels" in page.find_element(By.ID, "timing").text


def inside(server: PredictionServer) -> int:
    """Requests that wait for an answer."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        page = answer.read().decode()
    (line,) = (one for one in page.splitlines() if one.startswith("effdet_requests_inside "))
    return int(float(line.split()[1]))


def test_it_stops_in_order(server: PredictionServer) -> None:
    """The last one: nobody is served after it, and who waits gets an answer, also a slow one."""
    slow = encoded(picture(size=(8000, 6000)), "PNG")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(crowd, f"{server.url}/predict", slow, SLOW)
        end = time.monotonic() + 60
        while inside(server) < SLOW:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert server.stop() == 0
        heard = asked.result()
    assert [one.status for one in heard] == [200] * SLOW, [one.content for one in heard]
    assert json.loads(server.text().strip().splitlines()[-1])["status"] == "stopped"
    assert "Traceback" not in server.text()
    with pytest.raises(urllib.error.URLError, match="refused"):
        server.ask("/healthz", timeout_s=5)
