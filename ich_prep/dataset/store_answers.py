"""What object stores answer to requests that they do not fulfil: whether to ask again, and what to tell the user."""

from __future__ import annotations

import re

from ich_prep.errors import StoreError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9_.]{1,60})</Code>")
_EXPLANATION = re.compile(r"<Message>([^<]{1,200})</Message>")
_LATER = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
_LINE_FAILURES = ("HTTP error", "error decoding", "timed out")


class ConditionError(Exception):
    """A conditional write was refused: there is an object already, or it is not the one that was read."""


def status_of(error: Exception) -> int | None:
    """Return the status of the answer that obstore reports, None where there was no answer."""
    status = _STATUS.search(str(error))
    return int(status[1]) if status else None


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    status, words = status_of(error), str(error)
    if status is not None:
        return status in _LATER
    return not _lacks_credentials(words) and any(failure in words for failure in _LINE_FAILURES)


def ignores_ranges(error: Exception) -> bool:
    """Return whether the answer is not one to a request for a part of an object: the store gives out whole ones only."""
    return "non-partial response" in str(error)


def is_missing_bucket(error: Exception) -> bool:
    """Return whether it is the bucket that is not there, and not only the object."""
    return "<Code>NoSuchBucket<" in str(error)


def refusal(error: Exception, action: str, url: str, endpoint: str | None) -> StoreError:
    """Return the error for the user: what could not be done with the object at ``url``, why, and what to do.

    Of obstore's text, which may be long, only the status, the code and the store's own sentence are shown.
    """
    words, status = str(error), status_of(error)
    where, by = f"Cannot {action} {url}", f" at {endpoint}" if endpoint else ""
    if status is None and _lacks_credentials(words):
        return StoreError(f"{where}: no credentials were found. {_credentials(url)}")
    if status is None:
        what = "there is no answer" if is_transient(error) else f"the request failed ({type(error).__name__})"
        advice = "Check the network and the endpoint (--endpoint or AWS_ENDPOINT_URL), then run the same command again."
        return StoreError(f"{where}: {what}{by}. {advice}")
    code, said = _CODE.search(words), _EXPLANATION.search(words)
    answer = " ".join([str(status), *([code[1]] if code else []), *([f"({said[1].strip(' .')})"] if said else [])])
    if is_missing_bucket(error):
        advice = "Check the name of the bucket, the region (AWS_REGION) and the endpoint (--endpoint)."
    elif status in (401, 403):
        advice = _credentials(url)
    elif status in _LATER:
        advice = "The store is out of order or overloaded: run the same command again later."
    else:
        advice = "Check the URL, the region (AWS_REGION) and the endpoint (--endpoint)."
    return StoreError(f"{where}: the store{by} answered {answer}. {advice}")


def _lacks_credentials(words: str) -> bool:
    return "169.254." in words or "redential" in words  # without any, the address of the cloud's own machines is asked


def _credentials(url: str) -> str:
    if url.startswith("s3:"):
        return (
            "Check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN), their rights and the "
            "region (AWS_REGION); a public bucket is read with AWS_SKIP_SIGNATURE=true."
        )
    if url.startswith("gs:"):
        return "Check the credentials (GOOGLE_APPLICATION_CREDENTIALS) and their rights."
    return "The server does not give this file to everybody, and no credentials are sent to it."
