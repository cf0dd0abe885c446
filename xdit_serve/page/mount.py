"""The page put into the server's application."""

from __future__ import annotations

import os

from fastapi import FastAPI

from xdit_serve.page.door import PageDoor
from xdit_serve.page.looks import CSS
from xdit_serve.service import Service
from xdit_serve.uploads import MOST_BYTES

FOLDER = "page"
"""In the data folder: files that browsers have sent, until they are an hour old."""


def mount(app: FastAPI, service: Service) -> None:
    """Put the page at /, below all other routes. Its life is within the application's."""
    # Gradio reads these when it is imported, and tells its makers of every start unless it is told not to.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(service.settings.data_dir / FOLDER)
    import gradio

    from xdit_serve.page.actions import Actions
    from xdit_serve.page.blocks import Page, theme

    blocks = Page(Actions(service), service.sessions).draw()
    inner = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme(),
        css=CSS,
    )

    app.router.lifespan_context = lambda _: inner.router.lifespan_context(inner)
    app.mount("/", PageDoor(inner, service.keys, service.sessions))
