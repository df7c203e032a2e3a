"""What a server admits, in one place."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests and of memory.

    Attributes:
      body_bytes: of one request.
      bodies_bytes: of all requests that are being answered.
      body_s: until a body has to be there.
      header_s: until the header of a connection's first request has to be there.
      idle_s: that a connection stays open between two requests: longer than clients (5 s) and
        balancers (60 s) keep theirs, so that none sends into one that is being closed.
      request_s: until the answer has to be ready, waiting included.
      drain_s: that requests may go on after SIGTERM.
      image_bytes: of one encoded image.
      image_pixels: width times height of one image.
      text_chars: of one text; the tokenizer cuts it much sooner.
      queue_items: inputs of all requests between arrival and answer.
      queue_bytes: of their decoded views.
      searches: at once.
      connections: open at once.
    """

    body_bytes: int = 20 << 20
    bodies_bytes: int = 256 << 20
    body_s: float = 30
    header_s: float = 30
    idle_s: float = 75
    request_s: float = 30
    drain_s: float = 10
    image_bytes: int = 10 << 20
    image_pixels: int = 25_000_000
    text_chars: int = 100_000
    queue_items: int = 1024
    queue_bytes: int = 256 << 20
    searches: int = 2
    connections: int = 2048
