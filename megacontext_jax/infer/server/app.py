"""The web application: routes, errors as JSON, who may ask, and the thread's life."""

from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from megacontext_jax.errors import UserError
from megacontext_jax.infer.server import nanochat_api, openai_api, page_api
from megacontext_jax.infer.server.errors import INTERNAL, Refused
from megacontext_jax.infer.server.state import Server


def make_app(server: Server) -> FastAPI:
    """The application around a server; starts and ends its thread."""

    @asynccontextmanager
    async def life(_):
        server.scheduler.start()
        yield
        server.scheduler.close()

    app = FastAPI(title="megacontext-jax", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    for api in (page_api, nanochat_api, openai_api):
        app.include_router(api.router(server))
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    origins = [o.strip().rstrip("/") for o in server.web.allow_origins.split(",") if o.strip()]
    app.add_middleware(SameOrigin, allowed=origins)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


class SameOrigin:
    """Lets no page of another site change anything, unless it is allowed to."""

    def __init__(self, app, allowed: list[str]):
        self._app, self._allowed = app, allowed

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = dict(scope["headers"])
            origin = headers.get(b"origin", b"").decode("latin-1")
            own = not origin or urlsplit(origin).netloc == headers.get(b"host", b"").decode("latin-1")
            if not own and "*" not in self._allowed and origin not in self._allowed:
                refusal = Refused(
                    403, "Pages of other sites may not use this server; start it with --allow-origins."
                )
                return await _answer(scope["path"], refusal)(scope, receive, send)
        return await self._app(scope, receive, send)


def _answer(path: str, error: Refused) -> JSONResponse:
    body = openai_api.error_body(error) if path.startswith("/v1/") else {"detail": error.message}
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(body, error.status, headers)


async def _refused(request: Request, error: Refused) -> JSONResponse:
    return _answer(request.url.path, error)


async def _user_error(request: Request, error: UserError) -> JSONResponse:
    return _answer(request.url.path, Refused(400, str(error)))


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    words = {
        404: f"There is nothing at {request.url.path[:200]}; / is the page.",
        405: f"{request.url.path[:200]} does not take {request.method}.",
    }
    return _answer(
        request.url.path, Refused(error.status_code, words.get(error.status_code, str(error.detail)))
    )


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return _answer(request.url.path, Refused(500, INTERNAL))
