"""Makes `python jobs/NAME.py` find the packages wherever it is started, installed or not."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
