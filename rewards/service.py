"""A reward as an HTTP service: FastAPI, a token, JSON in and out. What asks it is `rewards.remote`."""

import hmac
import re
import threading
from collections.abc import Awaitable, Callable

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from rewards.base import Reward, SeesGroups
from rewards.gold import HasGold
from rewards.runner import RewardContractError, RewardRunner
from rewards.wire import (
    PROTOCOL,
    ScoreAnswer,
    ScoreRequest,
    Served,
    WireError,
    WirePair,
    WireSample,
    read_sample,
    send_sample,
    send_score,
)

TOKEN = re.compile(r"[!-~]{16,}")


def build_app(reward: Reward, token: str, *, concurrency: int = 1, max_megabytes: int = 256) -> FastAPI:
    """The service of one reward. `concurrency`: requests scored at once, the others wait. A request's body may have
    `max_megabytes`. Raises ValueError for a token that is no secret.
    """
    if not TOKEN.fullmatch(token):
        raise ValueError("the token needs at least 16 characters of ASCII without spaces, as of `openssl rand -hex 16`")
    if concurrency < 1 or max_megabytes < 1:
        raise ValueError(f"concurrency and max_megabytes are at least 1, got {concurrency} and {max_megabytes}")
    turn = threading.BoundedSemaphore(concurrency)

    app = FastAPI(title=reward.name, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def allowed(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        # Before any of the body is read.
        fault = _fault(request, token, max_megabytes)
        return JSONResponse({"detail": fault[1]}, status_code=fault[0]) if fault else await go_on(request)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/reward")
    def served() -> Served:
        return describe(reward)

    @app.post("/v1/score")
    def score(request: ScoreRequest) -> ScoreAnswer:
        with turn:
            return answer(reward, request)

    @app.exception_handler(WireError)
    async def unreadable(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=422)

    @app.exception_handler(RewardContractError)
    async def broken(_: Request, error: Exception) -> Response:
        # Asking again cannot help, and 5xx would be asked again.
        return JSONResponse({"detail": str(error)}, status_code=422)

    return app


def _fault(request: Request, token: str, max_megabytes: int) -> tuple[int, str] | None:
    """Why a request is refused, with its status; None for one that may go on."""
    if request.url.path == "/health":
        return None
    if not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
        return 401, "the token is not this server's"
    length = request.headers.get("content-length", "")
    if request.method == "POST" and not length.isdecimal():
        return 411, "a request says its length"
    if length.isdecimal() and int(length) > max_megabytes << 20:
        return 413, f"a request may have {max_megabytes} megabytes; send smaller batches"
    return None


def describe(reward: Reward) -> Served:
    """What the server says of its reward, its gold pairs included."""
    pairs = list(reward.gold()) if isinstance(reward, HasGold) else []
    sent = [(send_sample(pair.good), send_sample(pair.bad), pair.what) for pair in pairs]
    return Served(
        protocol=PROTOCOL,
        name=reward.name,
        fingerprint=reward.fingerprint(),
        whole_groups=isinstance(reward, SeesGroups),
        gold=[
            WirePair(good=good, bad=bad, what=what)
            for good, bad, what in sent
            if isinstance(good, WireSample) and isinstance(bad, WireSample)
        ],
    )


def answer(reward: Reward, request: ScoreRequest) -> ScoreAnswer:
    """The scores of a request's samples, in one call of the reward; what it raises makes them unavailable."""
    samples = [read_sample(sent) for sent in request.samples]
    runner = RewardRunner(reward, batch_size=max(1, len(samples)), retries=0)
    return ScoreAnswer(fingerprint=reward.fingerprint(), scores=[send_score(one) for one in runner.score(samples)])


def serve(reward: Reward, token: str, *, host: str, port: int, concurrency: int, max_megabytes: int) -> None:
    """Serve until interrupted. There is no TLS: a host beyond the loopback is for a network one trusts."""
    app = build_app(reward, token, concurrency=concurrency, max_megabytes=max_megabytes)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
