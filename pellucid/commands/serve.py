"""`pellucid serve`: a socket, an engine, a server, in this order, and everything closed behind them."""

from __future__ import annotations

import logging
import sys
from typing import Any

from pellucid.commands.load import packing_progress
from pellucid.commands.options import engine_kwargs
from pellucid.config import EngineConfig
from pellucid.server.http.settings import ServerSettings

logger = logging.getLogger("pellucid.server")


def run_server(model: str, options: dict[str, Any]) -> int:
    """Serves until it is told to stop; gives the exit status.

    Raises:
        ConfigError, PortTakenError: what is wrong with the settings, before anything is loaded.
    """
    settings = ServerSettings.from_options(options)
    config = EngineConfig.from_kwargs(model, engine_kwargs(options))

    from pellucid.server.http.logs import set_up_logging
    from pellucid.server.http.tracing import Tracing
    from pellucid.server.run import Server, bind, url_of
    from pellucid.service.async_engine import AsyncLLMEngine

    set_up_logging(settings)
    Tracing(settings).close()  # refused before a model is loaded
    bound = bind(settings)
    try:
        with packing_progress() as progress:
            engine = AsyncLLMEngine.start(
                config,
                engine_process=settings.engine_process,
                max_waiting=settings.max_waiting,
                hidden_states_total_mb=settings.hidden_states_total_mb,
                progress=progress,
            )
        try:
            server = Server(engine, settings)
            logger.info("serving %s at %s", ", ".join(server.context.names), url_of(bound, settings))
            print(f"{url_of(bound, settings)}/v1", file=sys.stdout, flush=True)
            server.run(sockets=[bound])
            logger.info("stopped")
            return server.exit_status
        finally:
            engine.close()
    finally:
        bound.close()
