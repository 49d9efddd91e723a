"""Calls to a Kubernetes API server, and nothing but calls: whoever knows what they mean is above.

`client` makes calls and says what failed, `watching` keeps a list of objects current. Used by `rorqual.discovery`, the
autoscaler's targets and election, and `rorqual doctor`. The official client is imported when `ClusterApi.connect` is
called, not before: a third of a second that nobody else pays.
"""

from rorqual.cluster_api.client import SERVICE_ACCOUNT, ApiError, ApiUnreachable, ClusterApi, Object
from rorqual.cluster_api.watching import WatchPace

__all__ = ["SERVICE_ACCOUNT", "ApiError", "ApiUnreachable", "ClusterApi", "Object", "WatchPace"]
