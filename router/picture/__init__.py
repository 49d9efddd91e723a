"""The router's picture of what every worker's cache holds: fed by `kvstore.feed`, asked by placement. No torch."""

from router.picture.found import Found
from router.picture.picture import Picture, WorkerContent, WorkerIndex

__all__ = ["Found", "Picture", "WorkerContent", "WorkerIndex"]
