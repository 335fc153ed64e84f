"""The image in a request's body, sent as it is or as a file of a form."""

from __future__ import annotations

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, File, MultipartDecoder, NeedData

from orchestrator.serving.messages import Refused

MOST_PARTS = 16
RAW = ("image/", "application/octet-stream")


def image_in(body: bytes, content_type: str) -> bytes:
    """The encoded image. What kind it is said to be, and the name of its file, are not believed.

    Raises:
        Refused: 400 nothing there, or a broken form; 415 a body of another kind.
    """
    kind, options = parse_options_header(content_type)
    kind = kind.strip().lower()
    if kind == "multipart/form-data":
        image = _file_of(body, options.get("boundary", ""))
    elif kind.startswith(RAW):
        image = body
    else:
        raise Refused(
            415, "Content-Type", "image/… or multipart/form-data", repr(kind[:80]),
            "as in curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'",
        )  # fmt: skip
    if not image:
        raise Refused(400, "body", "an image", "0 bytes", "send a JPEG, PNG or WebP")
    return image


def _file_of(body: bytes, boundary: str) -> bytes:
    """The first file of a form."""
    if not boundary or len(boundary) > 70:
        raise _broken("no boundary in Content-Type")
    decoder = MultipartDecoder(boundary.encode("latin-1", "replace"), max_parts=MOST_PARTS)
    chunks, inside = list[bytes](), False
    try:
        decoder.receive_data(body)
        decoder.receive_data(None)
        while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
            if isinstance(event, File):
                inside = True
            elif isinstance(event, Data) and inside:
                chunks.append(event.data)
                if not event.more_data:
                    return b"".join(chunks)
    except RequestEntityTooLarge:
        raise _broken(f"more than {MOST_PARTS} parts") from None
    except ValueError as error:  # of the decoder, for what is no form
        raise _broken(str(error)[:100]) from None
    raise _broken("none that is whole")


def _broken(got: str) -> Refused:
    return Refused(400, "body", "a form with a file", got, "as in curl -F file=@photo.jpg")
