"""The chat web server: one thread owns the device (`scheduler`), an event loop speaks HTTP (`app`).

    serve(chat, config.web, config.chat)        `run`; returns when it is told to stop

`book` holds the conversations, `work` is what they do step by step, `limits` what is let in, `streams` what goes out as
events; `nanochat_api`, `openai_api` and `page_api` are the endpoints.
"""
