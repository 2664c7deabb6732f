"""OpenAPI document of the API, and the dependencies of its routes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Security
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticOmit, core_schema
from starlette.requests import Request

from vidgen_ray.online.api.requests import RequestBody
from vidgen_ray.online.api.responses import ErrorBody
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.server_context import ServerContext

ERRORS: Mapping[int, str] = {
    400: "Invalid request. `param` names the field.",
    401: "Missing or invalid API key.",
    403: "Cross-origin request from a browser, unknown host name, or expired signed URL.",
    404: "Not found, or owned by another tenant.",
    408: "The request body did not arrive in time.",
    409: "Conflict: the video has no file, the name or idempotency key is in use, or the file is in use.",
    412: "The file has another ETag than `If-Match`.",
    413: "The request is too large.",
    415: "The request is neither JSON nor a form.",
    416: "The range starts after the end of the file.",
    429: "The queue is full, or the key exceeds its limits. `Retry-After` says when to retry.",
    500: "A stage failed, or an internal error.",
    503: "The database does not respond.",
    504: "The images were not ready in time. Their jobs continue.",
}
ANY_ROUTE = (400, 401, 403, 429, 500, 503)


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route: the errors of every route, and these."""
    return {status: {"model": ErrorBody, "description": ERRORS[status]} for status in sorted({*ANY_ROUTE, *statuses})}


EVENT_STREAM = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("event", "data", "id")},
            "required": ["event", "data"],
        }
    }
}
"""`content` of a response with server-sent events, whose `data` is JSON. The schema is that of one event."""
_TAGS: Mapping[str, str] = {
    "videos": "Create, follow, download and delete videos.",
    "images": "Generate and edit images.",
    "characters": "Named faces from photos or a video.",
    "shots": "Jobs with all fields of a script line.",
    "files": "Uploaded images, and files of batches.",
    "batches": "Many requests as one file.",
    "models": "Models and LoRAs of the server.",
    "usage": "GPU-seconds and cost of keys, and their budgets.",
    "webhooks": "Messages about jobs that have ended.",
    "health": "State of the server. Needs no key.",
}


class JsonBody(GenerateJsonSchema):
    """Schema of a JSON body, without files."""

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        raise PydanticOmit


class FormBody(GenerateJsonSchema):
    """Schema of a form. A field that accepts a file or a reference is documented as a file."""

    def is_instance_schema(self, schema: core_schema.IsInstanceSchema) -> JsonSchemaValue:
        return {"type": "string", "contentMediaType": "application/octet-stream", "contentEncoding": "binary"}

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        # A form cannot send null.
        return self.generate_inner(schema["schema"])

    def none_schema(self, schema: core_schema.NoneSchema) -> JsonSchemaValue:
        return {"const": ""}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return {name: value for name, value in super().default_schema(schema).items() if (name, value) != ("default", None)}

    def union_schema(self, schema: core_schema.UnionSchema) -> JsonSchemaValue:
        choices = [choice[0] if isinstance(choice, tuple) else choice for choice in schema["choices"]]
        accepts_file = any(choice["type"] == "is-instance" for choice in choices)
        return self.generate_inner(choices[0]) if accepts_file else super().union_schema(schema)


JSON, FORM = "application/json", "multipart/form-data"
BODIES: Mapping[str, type[GenerateJsonSchema]] = {JSON: JsonBody, FORM: FormBody}
NAMES: Mapping[str, str] = {JSON: "Json", FORM: "Form"}
"""Media type -> end of the name of a body's schema."""


def request_body(model: type[RequestBody], *media_types: str) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that parses its body with this model."""
    content = {media_type: {"schema": _shared_schema(model, media_type)} for media_type in media_types or BODIES}
    return {"requestBody": {"required": True, "content": content}}


def _shared_schema(model: type[RequestBody], media_type: str) -> dict[str, Any]:
    """Return a reference to the schema of a body, with that schema and those that it uses as `$defs`."""
    template = "#/components/schemas/{model}"
    schema = model.model_json_schema(ref_template=template, schema_generator=BODIES[media_type])
    name = f"{model.__name__}{NAMES[media_type]}"
    return {"$ref": template.format(model=name), "$defs": {**schema.pop("$defs", {}), name: schema}}


def openapi_document(app: FastAPI, root_path: str) -> dict[str, Any]:
    """Return FastAPI's document without its validation errors: this server responds with 400, not 422.

    `root_path`: path of the server behind a proxy.
    """
    if app.openapi_schema:
        return app.openapi_schema
    # A copy: FastAPI's document shares the request bodies with the routes, which other apps of this process have, too.
    about: dict[str, Any] = {"title": app.title, "version": app.version, "description": app.description}
    about["tags"] = [{"name": name, "description": description} for name, description in _TAGS.items()]
    document = deepcopy(get_openapi(**about, servers=[{"url": root_path or "/"}], routes=app.routes))
    schemas = document["components"]["schemas"]
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            for body in operation.get("requestBody", {}).get("content", {}).values():
                schemas |= body["schema"].pop("$defs", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    app.openapi_schema = document
    return document


def without_keys(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document of a server that needs no API key."""
    paths = {
        path: {
            method: {name: value for name, value in operation.items() if name != "security"}
            for method, operation in operations.items()
        }
        for path, operations in document["paths"].items()
    }
    components = {name: value for name, value in document["components"].items() if name != "securitySchemes"}
    return {**document, "paths": paths, "components": components}


bearer = HTTPBearer(
    auto_error=False, description="API key. A server without keys, which accepts local requests only, needs none."
)


async def server_of(request: Request) -> ServerContext:
    server: ServerContext = request.app.state.server
    return server


ServerDep = Annotated[ServerContext, Depends(server_of)]


async def tenant_of(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)], server: ServerDep
) -> Tenant:
    """Authenticate the request, and count its body until `receive` has read it, or the request has ended.

    Raises ApiError 400, 401, 403 or 429; see `Authenticator.api_tenant` and `BodyBudget.reserve`.
    """
    tenant = await server.auth.api_tenant(request, credentials.credentials if credentials else None)
    server.body_budget.reserve(tenant, request)
    return tenant


TenantDep = Annotated[Tenant, Depends(tenant_of)]
