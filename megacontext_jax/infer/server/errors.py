"""What a client is told when a request cannot be served."""


class Refused(Exception):
    """An HTTP status and one sentence that names the thing and the remedy."""

    def __init__(self, status: int, message: str, *, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code  # a word for programs, where there is one


STOPPING = "The server is stopping; start it again and repeat this."
INTERNAL = "Something went wrong in the server; its console has the traceback."
