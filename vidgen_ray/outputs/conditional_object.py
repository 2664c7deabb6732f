"""An S3 object that is created and replaced with conditional requests, through botocore (the optional extra `s3`).

pyarrow's S3 file system cannot send the headers `If-None-Match` and `If-Match`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10


class ConditionsUnsupported(OSError):
    """The store does not support conditional requests, or botocore has no credentials for it."""


class StoredObject(NamedTuple):
    """Content and version of an object."""

    content: bytes
    etag: str
    age_s: float
    """Seconds since the last change, by the clock of the store."""


class ConditionalObject:
    """One object in S3 or a compatible store.

    Methods raise OSError if the store fails, and its subclass ConditionsUnsupported if it rejects conditional requests. A
    store may also ignore conditions: then `create` replaces an existing object.
    """

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self._client = client
        self._at = {"Bucket": bucket, "Key": key}

    def read(self) -> StoredObject | None:
        """Return the object, or `None` if it does not exist."""
        response = self._request(self._client.get_object, missing=(404,))
        if response is None:
            return None
        now = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"]).replace(tzinfo=UTC)
        modified: datetime = response["LastModified"]
        return StoredObject(response["Body"], response["ETag"], (now - modified).total_seconds())

    def create(self, content: bytes) -> str | None:
        """Create the object and return its ETag, or return `None` if it exists."""
        return self._put(content, IfNoneMatch="*")

    def replace(self, content: bytes, etag: str) -> str | None:
        """Replace the version `etag` and return the new ETag, or return `None` if the object has changed."""
        return self._put(content, IfMatch=etag)

    def _put(self, content: bytes, **condition: str) -> str | None:
        # 409: another conditional request is in progress. 404: a replaced object does not exist.
        response = self._request(self._client.put_object, missing=(404, 409, 412), Body=content, **condition)
        return str(response["ETag"]) if response else None

    def _request(self, call: Any, missing: tuple[int, ...], **arguments: object) -> dict[str, Any] | None:
        """Return the response, or `None` for one of the status codes `missing`."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        try:
            response: dict[str, Any] = call(**self._at, **arguments)
            if "Body" in response:
                response["Body"] = response["Body"].read()
        except NoCredentialsError as error:
            raise ConditionsUnsupported(str(error)) from None
        except BotoCoreError as error:
            raise OSError(str(error)) from None
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in missing and error.response["Error"]["Code"] != "NoSuchBucket":
                return None
            raise (ConditionsUnsupported if status == 501 else OSError)(str(error)) from None
        return response


def conditional_object(url: str, path: str, region: str) -> ConditionalObject | None:
    """Return the object at `path` ("bucket/key"), with the options of an s3:// URL as pyarrow reads them.

    Returns `None` if botocore is not installed.
    """
    try:
        from botocore.config import Config
        from botocore.session import Session
    except ImportError:
        return None
    address = urlsplit(url)
    options = {name: values[-1] for name, values in parse_qs(address.query).items()}
    endpoint = options.get("endpoint_override")
    client = Session().create_client(
        "s3",
        region_name=region,
        endpoint_url=endpoint and f"{options.get('scheme', 'https')}://{endpoint}",
        aws_access_key_id=address.username and unquote(address.username),
        aws_secret_access_key=address.password and unquote(address.password),
        verify=options.get("tls_ca_file_path"),
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"mode": "standard"},
            s3={"addressing_style": "path" if endpoint else "auto"},
            # Other stores than AWS may reject the checksums that botocore adds by default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    bucket, _, key = path.partition("/")
    return ConditionalObject(client, bucket, key)
