"""The feed: a worker's side writes numbered changes of its cache, a router's side follows them exactly or starts anew.

Pure, without torch: a session carries what these make (`rorqual.feed`). Used by a worker's host and a router's links.
"""

from kvstore.feed.reader import Content, FeedReader, Reason, Resubscribe
from kvstore.feed.writer import FeedBounds, FeedWriter, Subscription

__all__ = ["Content", "FeedBounds", "FeedReader", "FeedWriter", "Reason", "Resubscribe", "Subscription"]
