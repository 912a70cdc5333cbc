"""What some tests use where it is there: pretrained weights and the papers' test sets."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
WEIGHTS = Path(os.environ.get("SR_WEIGHTS_DIR") or DATA / "weights")
TEST_SETS = Path(os.environ.get("SR_TEST_SETS") or DATA / "test")
