"""What all endpoints share."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax

from megacontext_jax.config import ChatConfig, WebConfig
from megacontext_jax.errors import UserError
from megacontext_jax.infer.chat_model import ChatModel
from megacontext_jax.infer.server import work
from megacontext_jax.infer.server.book import Book
from megacontext_jax.infer.server.scheduler import Scheduler

LEAST = {
    "upload_mb": 1,
    "max_sessions": 1,
    "max_running": 1,
    "max_waiting": 1,
    "history_mb": 1,
    "slow_seconds": 1,
}


class Server:
    """A model, its conversations and the thread they live on. UserError for options out of range."""

    def __init__(self, chat: ChatModel, web: WebConfig, options: ChatConfig):
        for name, least in LEAST.items():
            if getattr(web, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(web, name)} must be at least {least}.")
        if options.max_tokens < 1:
            raise UserError(f"--max-tokens {options.max_tokens} must be at least 1.")
        chat.engine.draw(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )  # refuses what is out of range
        self.chat, self.web = chat, web
        self.patience = web.slow_seconds
        self.defaults = work.Ask(
            options.temperature, options.top_k, options.top_p, options.max_tokens, seed=0
        )
        folder = Path(web.sessions) if web.sessions else None
        self.book = Book(chat, folder, web.max_sessions, web.history_mb << 20)
        self.scheduler = Scheduler(
            max_running=web.max_running,
            max_waiting=web.max_waiting,
            patience=web.slow_seconds,
            opening=lambda: work.warm_up(chat, self.defaults),
            closing=self.book.close,
        )
        self.started = int(time.time())
        self.model_id = chat.name.split(",")[0].strip().replace(" ", "-")
        device = jax.local_devices()[0]
        self.device = f"{device.platform}:{device.id} ({device.device_kind})"

    def memory_note(self) -> str | None:
        """A warning if as many conversations as are allowed might not fit on the device; None if its size is unknown."""
        memory = self.chat.memory()
        one = sum(x.nbytes for x in jax.tree.leaves((memory.cache, memory.logits_1V)))
        count = self.web.max_sessions + self.web.max_running
        found = jax.local_devices()[0].memory_stats() or {}
        free = found.get("bytes_limit", 0) - found.get("bytes_in_use", 0)
        if not found.get("bytes_limit") or one * count < 0.9 * free:
            return None
        return (
            f"{count} conversations of {one / 1e6:,.0f} MB may not fit into the {free / 1e6:,.0f} MB that are free on the "
            "device; lower --max-sessions and --max-running."
        )

    def prompt_ids(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Tokens of a conversation [(role, text)], up to where the assistant speaks."""
        tokenizer = self.chat.tokenizer
        ids = [tokenizer.bos]
        for role, text in turns:
            begin, end = (tokenizer.special(f"<|{role}_{side}|>") for side in ("start", "end"))
            ids += [begin, *tokenizer.encode(text), end]
        return [*ids, tokenizer.special("<|assistant_start|>")]
