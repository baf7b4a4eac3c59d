"""The HTTP service over a gang of ranks."""

from ringfa3_launch.service.app import create_app
from ringfa3_launch.service.guard import Access
from ringfa3_launch.service.limits import Limits

__all__ = ["Access", "Limits", "create_app"]
