"""Video in and out: what other modules may use. PyAV is imported only when a clip is enlarged."""

from __future__ import annotations

from .containers import is_video
from .enlarge import VideoProgress, VideoReport, upscale_video

__all__ = ["VideoProgress", "VideoReport", "is_video", "upscale_video"]
