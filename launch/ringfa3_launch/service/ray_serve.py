"""The HTTP service as a Ray Serve application: `ringfa3 serve`'s app in one replica, its ranks as Ray actors.

    serve run ringfa3_launch.service.ray_serve:build ranks=2 device=cpu

The arguments are the options of `ringfa3 serve`, but for those of where it listens, which Serve decides: it listens on
127.0.0.1 unless told otherwise. Wherever others reach it the replica needs a bearer token in RINGFA3_TOKEN; without one
it answers loopback names alone. There is one replica: a gang and its queue are one thing, and heal by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ringfa3_launch.checkpoint import hush
from ringfa3_launch.serve import add_arguments, cluster_options, limits_from, token_from

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "ringfa3"
SERVES = {"host", "port", "token_file", "token", "allow_host", "launcher", "log_level"}  # options not for a replica


def build(args: Mapping[str, Any]) -> Any:
    """The Serve application.

    Args:
        args: options of `ringfa3 serve` by their names without dashes; flags as true or false.

    Raises:
        ValueError: an option is wrong, or none of this; names it.
    """
    from ray import serve

    options = parse(args)

    def app() -> FastAPI:  # in the replica: it is pickled, so it holds options alone
        return create(options)

    ongoing = options.max_completions + options.max_sessions + 64  # the app itself says 429
    deployment = serve.deployment(
        name=NAME, num_replicas=1, max_ongoing_requests=ongoing, graceful_shutdown_timeout_s=options.drain
    )
    return deployment(serve.ingress(app)()).bind()


def parse(args: Mapping[str, Any]) -> argparse.Namespace:
    """The options of `ringfa3 serve` that these are.

    Raises:
        ValueError: as `build`.
    """
    parser = _Parser(prog=NAME, add_help=False)
    add_arguments(parser)
    words = []
    for name, value in args.items():
        option = name.replace("_", "-")
        if name.replace("-", "_") in SERVES:
            raise ValueError(f"{name}: wanted an option that is not Ray Serve's to decide, got {value!r}")
        if str(value).lower() == "true":
            words.append(f"--{option}")
        elif str(value).lower() != "false":
            words.append(f"--{option}={value}")
    return parser.parse_args(words)


def create(args: argparse.Namespace) -> FastAPI:
    """The app, with a cluster of its own that ends with it. Blocks until the ranks serve.

    Raises:
        ValueError: an option is wrong; names it.
    """
    import ray

    from ringfa3_launch.cluster import RingCluster
    from ringfa3_launch.service import Access, create_app

    hush()
    token = token_from(None)
    gpus = 0 if args.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if args.device == "cuda" and not gpus:
        raise ValueError("device: wanted GPUs in the Ray cluster, got none")
    folder = tempfile.TemporaryDirectory(prefix="ringfa3-serve-")
    ranks, options = cluster_options(args, Path(folder.name), gpus)
    cluster = RingCluster.ray(ranks, name=NAME, **options)
    if args.model_name is not None:
        cluster.model_name = args.model_name
    access = Access(token, None) if token is not None else Access()
    app = create_app(cluster, access=access, limits=limits_from(args, cpu=not gpus), log_text=args.log_text)
    lasting = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with lasting(app) as state:
            yield state
        await asyncio.to_thread(cluster.close)
        folder.cleanup()

    app.router.lifespan_context = lifespan
    return app


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
