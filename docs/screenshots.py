"""Take the README's pictures of MLflow: python docs/screenshots.py [--data FOLDER] [--output docs/images]

Starts a tracking server, trains the demo into it (and, with --data, a run on a COCO-format dataset),
and opens its pages in headless Chromium (Debian: chromium, chromium-driver).

The prediction server's page instead: python docs/screenshots.py --serve MODEL --picture photo.jpg
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.browser import browser as page_of  # noqa: E402
from helpers.browser import drop  # noqa: E402
from helpers.mlflow_server import MlflowServer  # noqa: E402
from helpers.serving import PredictionServer  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

MODE = "workflowType=machine_learning"
WIDTH_PX, HEIGHT_PX = 1500, 1150
PAGE_WIDTH_PX, PAGE_HEIGHT_PX = 1200, 720
SETTLE_S = 4.0  # charts are drawn after their text is there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a COCO-format dataset for a second run")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--work", type=Path, help="folder to keep the runs in, for another take")
    parser.add_argument("--serve", metavar="MODEL", help="take serve.png, with this model")
    parser.add_argument("--picture", type=Path, help="what is dropped on the server's page")
    asked = parser.parse_args()
    if asked.serve:
        take_server(asked.serve, asked.picture, asked.output / "serve.png")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        with MlflowServer(folder / "mlflow") as server:
            if not (folder / "out" / "records").exists():
                train(folder / "out", server.uri, asked.data)
            take(server.uri, asked.output)


def train(output: Path, uri: str, data: Path | None) -> None:
    """The demo, a run with another fusion, and one on real pictures."""
    demo = ["--config", str(ROOT / "jobs" / "configs" / "shapes.yaml")]
    jobs = [
        [*demo, "--set", "tracking.price_per_worker_hour=0.12"],
        [*demo, "--fusion", "softmax", "--name", "shapes-softmax", "--steps", "1000"],
    ]
    if data is not None:
        jobs.append(
            ["--data", str(data), "--phi", "0", "--name", data.name, "--pretrained", "no",
             "--image-size", "256", "--steps", "60", "--set", "train.batch_size=4",
             "--set", "train.evaluate_every={steps: 30}", "--set", "evaluation.batch_size=4"]
        )  # fmt: skip
    for arguments in jobs:
        command = [sys.executable, str(ROOT / "jobs" / "train.py"), *arguments]
        subprocess.run(
            [*command, "--output", str(output), "--tracking-uri", uri, "--launcher", "local"],
            check=True,
        )
    champion = MlflowClient(uri).search_runs(["1"], "attributes.run_name = 'shapes-demo'")[0]
    promote = [sys.executable, str(ROOT / "jobs" / "promote.py"), champion.info.run_id]
    subprocess.run(
        [*promote, "--name", "shapes-detector", "--require", "val/AP>=0.2", "--tracking-uri", uri],
        check=True,
    )


def take(uri: str, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri)
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs(["1"])}
    demo = runs["shapes-demo"]
    with browser() as driver:
        pages = {
            "runs": (f"/#/experiments/1/runs?{MODE}", "shapes-demo"),
            "run": (f"/#/experiments/1/runs/{demo}?{MODE}", "validation"),
            "charts": (f"/#/experiments/1/runs/{demo}/model-metrics?{MODE}", "train"),
            "figure": (
                f"/#/experiments/1/runs/{demo}/artifacts/figures/error_kinds.png?{MODE}",
                "error_kinds",
            ),
            "models": (f"/#/experiments/1/models?{MODE}", "step"),
            "registry": (f"/#/models/shapes-detector?{MODE}", "champion"),
        }
        for name, (page, text) in pages.items():
            open_page(driver, uri + page, text)
            driver.save_screenshot(str(output / f"{name}.png"))
            print(output / f"{name}.png")


def take_server(model: str, picture: Path, target: Path) -> None:
    """The page of jobs/serve.py with the boxes of a picture."""
    with (
        tempfile.TemporaryDirectory() as temporary,
        PredictionServer(model, Path(temporary) / "log", cwd=Path.cwd()) as server,
        page_of(PAGE_WIDTH_PX, PAGE_HEIGHT_PX) as driver,
    ):
        driver.get(server.url)
        WebDriverWait(driver, 60).until(lambda page: "classes" in page.title)
        drop(driver, picture, "image/jpeg")
        WebDriverWait(driver, 60).until(
            lambda page: page.find_element(By.ID, "canvas").get_attribute("data-boxes")
        )
        driver.save_screenshot(str(target))
    print(target)


def browser() -> WebDriver:
    options = Options()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 f"--window-size={WIDTH_PX},{HEIGHT_PX}"):  # fmt: skip
        options.add_argument(flag)
    options.binary_location = "/usr/bin/chromium"
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


def open_page(driver: WebDriver, url: str, text: str) -> None:
    """Until `text` is to be read on it."""
    driver.get("about:blank")  # a change of the fragment alone loads nothing
    driver.get(url)
    WebDriverWait(driver, 60).until(
        lambda page: text in page.find_element(By.TAG_NAME, "body").text
    )
    time.sleep(SETTLE_S)
    # MLflow's assistant opens beside every page and takes a quarter of it.
    found = driver.find_elements(
        By.XPATH,
        "//*[normalize-space(text())='MLflow Assistant']/ancestor::*[count(.//button)>2][1]",
    )
    for panel in found:
        buttons = panel.find_elements(By.TAG_NAME, "button")
        max(buttons, key=lambda button: (-button.location["y"], button.location["x"])).click()
        time.sleep(SETTLE_S)


if __name__ == "__main__":
    main()
