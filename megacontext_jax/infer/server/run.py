"""The server as a program: its socket, its address on the console, a quick end."""

import logging
import socket
from collections.abc import Callable

import uvicorn

from megacontext_jax.errors import UserError
from megacontext_jax.infer.server.app import make_app
from megacontext_jax.infer.server.state import Server

CONNECTIONS = 1024
END_SECONDS = 3  # that connections have to end, after the jobs have


def serve(server: Server, say: Callable[[str], None] = print) -> None:
    """Serves until Ctrl-C or SIGTERM; conversations are then saved. UserError if the address cannot be had."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    listener = listen(server.web.host, server.web.port)
    config = uvicorn.Config(
        make_app(server),
        log_level="warning",
        access_log=False,
        ws="none",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=END_SECONDS,
    )
    program = _Uvicorn(config, server, lambda: say(f"Chat at {url(listener)} (Ctrl-C ends)"))
    program.run(sockets=[listener])
    if server.scheduler.failure:
        raise server.scheduler.failure


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: Server, ready: Callable[[], None]):
        super().__init__(config)
        self._server, self._ready = server, ready
        server.scheduler.when_dead = self._end

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def _end(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig, frame) -> None:
        self._server.scheduler.stop()  # open streams end, and with them their connections
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address."""
    if not 0 <= port <= 65_535:
        raise UserError(f"--port {port} must lie between 0 and 65535.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        raise UserError(
            f"Cannot listen at {host}:{port} ({error.strerror or error}); choose another --port or --host."
        ) from None


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
