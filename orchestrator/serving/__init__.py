"""A detector behind HTTP: Ray Serve, the API and the web page.

A request passes the door (who may come in, how much of it), the front (what is asked) and a
detector (decoded, batched, looked at). Door and front are one process without torch; each detector
is another, on any node.
"""

import orchestrator.launch  # noqa: F401  # what Ray decides about when it is imported
