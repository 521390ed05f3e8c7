"""Two demo models that only tests need, for a gateway in this process: demo/slow says a word every half second, demo/error
fails before it answers."""
import asyncio
import contextlib
from unittest import mock

import pomex


class Slowly:
    """The frames of an answer, each of which takes its time."""

    def __init__(self, frames):
        self.frames = frames

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.frames)


@contextlib.contextmanager
def slow_and_error():
    frames, read = pomex.demo_frames, pomex.DemoExchange.read

    def more(ctx):
        if ctx.model == "error":
            raise pomex.ProviderError("The demo provider fails on purpose.", kind="overload", upstream_status=529)
        found = frames(ctx)
        return Slowly(found) if ctx.model == "slow" else found

    async def read_slowly(exchange):
        if isinstance(exchange.frames, Slowly):
            await asyncio.sleep(0.5)
        return await read(exchange)

    with mock.patch.object(pomex, "demo_frames", more), mock.patch.object(pomex.DemoExchange, "read", read_slowly), \
            mock.patch.dict(pomex.DEMO_MODELS, {"slow": "slow", "error": "fails"}):
        yield
