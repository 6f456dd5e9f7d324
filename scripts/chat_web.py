"""Chat with a trained model in the browser, over a history of any length.

    python -m scripts.chat_web                          the SFT model at http://127.0.0.1:8000/
    python -m scripts.chat_web --mc --sessions talks    conversations are kept in the folder talks
    python -m scripts.chat_web -i mid -g d12 -p 8080    another stage, tag and port
    python -m scripts.chat_web --host 0.0.0.0           for every machine of the network; there is no password

The page takes long texts by drag and drop and shows what the model sees of the history, and how finely. Programs use
POST /v1/chat/completions (OpenAI's form) or POST /chat/completions (nanochat's); docs/web.md lists the rest. All clients
share one device in turns. Ctrl-C ends the server; with --sessions every conversation goes on after a restart.
"""

import sys

from megacontext_jax import runtime
from megacontext_jax.cli import parse, run_main
from megacontext_jax.context.store import check_place
from megacontext_jax.errors import UserError
from megacontext_jax.infer.load import load_chat
from megacontext_jax.infer.server.run import serve
from megacontext_jax.infer.server.state import Server

SHORT = {"-p": "port", "-n": "num-gpus", "-d": "compute-dtype"}  # as nanochat has them


def main(argv: list[str]) -> int | None:
    config = parse(argv, doc=__doc__, show=("web", "chat", "eval", "run"), short=SHORT)
    if config.chat.session:
        raise UserError(
            "--session is one conversation of chat_cli; --sessions FOLDER keeps those of the page."
        )
    if config.chat.prompt or config.chat.demo:
        raise UserError("--prompt and --demo belong to chat_cli; this is a server.")
    check_place(config.mc.mc_tree, config.web.sessions, "--sessions")
    runtime.start(config.run)
    with load_chat(config).watched() as chat:
        server = Server(chat, config.web, config.chat)
        where = f"kept in {config.web.sessions}" if config.web.sessions else "in memory until the server ends"
        print(f"{server.chat.name} ({server.chat.kind}) on {server.device}; conversations are {where}.")
        if note := server.memory_note():
            print(f"Note: {note}", file=sys.stderr)
        if config.web.host not in ("127.0.0.1", "::1", "localhost"):
            print("Note: everyone who reaches this machine can use the server.", file=sys.stderr)
        serve(server, lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_main(main)
