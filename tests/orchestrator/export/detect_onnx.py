"""Detect objects with an exported ONNX file: python detect_onnx.py detector.onnx photo.jpg"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
canvas_h, canvas_w = json.loads(about["size_hw"])
names = [row["name"] for row in json.loads(about["classes"])]

picture = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
scale = min(canvas_w / picture.width, canvas_h / picture.height)
width, height = (max(1, round(length * scale)) for length in picture.size)
canvas = Image.new(
    "RGB", (canvas_w, canvas_h), tuple(json.loads(about["preprocessing"])["pad_rgb"])
)
canvas.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (0, 0))

images = np.asarray(canvas).transpose(2, 0, 1)[None]
sizes_hw = np.array([[height, width]], dtype=np.float32)
boxes, scores, labels, count = session.run(None, {"images": images, "sizes_hw": sizes_hw})
for i in range(count[0]):
    left, top, right, bottom = boxes[0, i] / scale
    print(f"{names[labels[0, i]]} {scores[0, i]:.3f} {left:.1f} {top:.1f} {right:.1f} {bottom:.1f}")
