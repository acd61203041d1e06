"""The door: one Ray Serve application that every agent speaks to.

It finds out who is calling (the capability in the path; live, an API key), which policy answers
(the role that the request matches), and passes bytes to an engine or an upstream and back. Replies
are not rebuilt: what the agent reads is what the engine's own handler wrote. A request is passed on
as it came, unless a prompt version takes the place of its system prompt or an upstream wants
another model name. An attempt's calls stay on one engine, for its prefix cache.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any

import aiohttp
import ray
from ray import serve
from ray.actor import ActorHandle
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.admission import Admission, Attempts, NotAdmittedError
from lightning_ray.gateway.answerers import Answerer
from lightning_ray.gateway.config import GatewayConfig
from lightning_ray.gateway.desk import Passage, conversation_of, trace_of
from lightning_ray.gateway.forwarding import Call, Forwarder, own_list
from lightning_ray.gateway.intake import TOLD, Intake, refuse
from lightning_ray.gateway.limits import CallLimits, TooManyCallsError
from lightning_ray.gateway.listener import Listener
from lightning_ray.gateway.live import ROLLOUT_HEADER, LiveDoor, parse_feedback
from lightning_ray.gateway.openapi import describe_routes
from lightning_ray.gateway.protocols import CALLS, LISTINGS, error_body, parse_body
from lightning_ray.gateway.roles import Role, describe
from lightning_ray.gateway.telemetry import BULK, RETRY_S, TRACES
from lightning_ray.gateway.visits import Visits, visit_of
from lightning_ray.inference import Attribution
from lightning_ray.rollouts import Identity, Line
from lightning_ray.spans import SpanClient

log = logging.getLogger(__name__)

RESOLVE_S = 10.0
"""How long a queue that restarts is waited for."""
LOOK_EVERY_S = 5.0
"""How often a door looks whether its job is still there, seconds."""
VERSION_HEADER = "x-lightning-ray-version"
FEEDBACK = "/v1/feedback"

_COME_AGAIN = frozenset({429, 502, 503, 504})


class _Refusal(Exception):
    """A call that goes no further."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
        self.message = message


# Serve pickles the class where it is decorated, so what its methods use stands above it.


def _error(path: str, status: int, message: str) -> Response:
    headers: dict[str, Any] = {"content-type": "application/json"}
    if status in _COME_AGAIN:
        headers["retry-after"] = str(RETRY_S)
    return Response(error_body(path, status, message), status, headers)


def _require_served(path: str, request: Request) -> None:
    if path not in (CALLS if request.method == "POST" else LISTINGS):
        raise _Refusal(404, f"{request.method} {path} is not served here")


def _key_of(request: Request) -> str:
    """The caller's API key, as OpenAI's clients send it or as Anthropic's do."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return request.headers.get("x-api-key", "")


async def _gone(keeper: ActorHandle) -> bool:
    """Whether an actor is dead and will not be restarted."""
    try:
        async with asyncio.timeout(RESOLVE_S):
            await keeper.__ray_ready__.remote()
    except ray.exceptions.ActorUnavailableError:
        return False
    except ray.exceptions.ActorDiedError:
        return True
    except (TimeoutError, ray.exceptions.RayError) as error:
        log.info("not known whether the job is there: %s", error)
    return False


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        return parse_body(content)
    except ValueError as error:
        raise _Refusal(400, f"the body cannot be read: {error}") from error


@serve.deployment
@serve.ingress()
class Gateway:
    """A replica of the door."""

    def __init__(
        self,
        config: GatewayConfig,
        queue: ActorHandle | None,
        roles: Sequence[Role],
        answerers: Sequence[Answerer],
        spans: SpanClient,
        live: LiveDoor | None = None,
        port: int | None = None,
    ):
        """`queue` knows which capabilities are live; `spans` takes what upstreams answer.

        With a `port` it listens there itself, on `config.host`.
        """
        self._config = config
        # Calls that come at the same time are asked about in one message.
        self._line = None if queue is None else Line(queue, RESOLVE_S)
        self._attempts = None if self._line is None else Attempts(self._line)
        self._roles = tuple(roles)
        self._answerers = {answerer.policy: answerer for answerer in answerers}
        self._spans = spans
        self._limits = CallLimits(config.max_calls)
        self._forward = Forwarder(config, spans, self._line)
        self._intake = Intake(config, spans)
        self._desk = live.desk if live else None
        self._serving = live.config if live else None
        self._run_id = live.run_id if live else ""
        self._app = self._routes()
        self._listener = None
        self._opened = asyncio.get_running_loop().create_task(self._announce())
        self._watching = None
        if port is not None:
            # Ray Serve keeps what it runs, whatever becomes of the driver that asked for it.
            if (keeper := queue or self._desk) is not None:
                watch = self._close_after(keeper)
                self._watching = asyncio.get_running_loop().create_task(watch)
            shared = config.num_replicas > 1
            self._listener = Listener(self._app, config.host, port, shared, self._opened)

    async def _announce(self) -> None:
        """Tells the queue that this replica begins, maybe in the place of one that died."""
        if self._line is None:
            return
        try:
            await self._line.door_opened()
            assert self._attempts is not None
            self._attempts.look_at(await self._line.roster())
        except (InfrastructureError, ray.exceptions.RayError) as error:
            log.warning("the queue did not hear that the door opened: %s", error)
        except (OSError, ValueError) as error:
            log.warning("the roster of attempts cannot be seen, so the queue is asked: %s", error)

    async def _close_after(self, keeper: ActorHandle) -> None:
        """Has Ray Serve end this application once the job that it is the door of is gone."""
        while not await _gone(keeper):
            await asyncio.sleep(LOOK_EVERY_S)
        name = serve.get_replica_context().app_name
        # Until this replica is stopped: whether Serve took it is not said.
        while True:
            log.warning("the job of %s is gone, and so its door closes", name)
            try:
                await asyncio.to_thread(serve.delete, name, _blocking=False)
            except (ray.exceptions.RayError, RayServeException) as error:
                log.warning("Ray Serve did not hear that the door is to close: %s", error)
            await asyncio.sleep(LOOK_EVERY_S)

    def check_health(self) -> None:
        """Asked by Ray Serve now and then. Raises RuntimeError when this replica hears no calls."""
        if self._listener is not None:
            self._listener.check()

    def __serve_build_asgi_app__(self) -> Starlette:
        """What Ray Serve's own proxies speak to, where calls come through them."""
        return self._app

    def _routes(self) -> Starlette:
        routes = [
            Route("/openapi.json", self._describe, methods=["GET"]),
            Route("/a/{capability}/{path:path}", self._call, methods=["GET", "POST"]),
            Route("/v1/{path:path}", self._live_call, methods=["GET", "POST"]),
        ]
        for route in routes:
            # Starlette's own, which engines and upstreams have no answer for.
            assert route.methods is not None
            route.methods.discard("HEAD")
        return Starlette(routes=routes, middleware=[Middleware(Visits)])

    async def _describe(self, request: Request) -> Response:
        """The description of the door's own routes."""
        return JSONResponse(describe_routes())

    async def _call(self, request: Request) -> Response:
        """One call of an attempt, unstreamed or streamed, or what it tells."""
        capability, path = request.path_params["capability"], "/" + request.path_params["path"]
        if path in TOLD and request.method == "POST":
            return await self._take(path, request, self._told(path, capability, request))
        return await self._answer(path, self._attempt(capability, path, request))

    async def _live_call(self, request: Request) -> Response:
        """One call of live traffic, its telemetry, or feedback on it."""
        path = "/v1/" + request.path_params["path"]
        if path in (TRACES, BULK) and request.method == "POST":
            return await self._take(path, request, self._told_live(path, request))
        return await self._answer(path, self._live(path, request))

    async def _answer(self, path: str, answer: Coroutine[Any, Any, Response]) -> Response:
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                return await answer
        except _Refusal as refusal:
            return _error(path, refusal.status, refusal.message)
        except NotAdmittedError:
            return _error(path, 401, "this base URL belongs to no running attempt")
        except TooManyCallsError as error:
            return _error(path, 429, str(error))
        except TimeoutError:
            limit = self._config.call_timeout_s
            return _error(path, 504, f"no answer within {limit:g} s (gateway.call_timeout_s)")
        except aiohttp.ClientError as error:
            log.error("no answer: %s", error)
            return _error(path, 502, "the engine did not answer; try again")
        except (ray.exceptions.RayError, InfrastructureError) as error:
            log.error("nobody knows whose %s is: %s", path, error)
            return _error(path, 503, "the door cannot be opened now; try again")

    async def _take(
        self, path: str, request: Request, answer: Coroutine[Any, Any, Response]
    ) -> Response:
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                return await answer
        except TimeoutError:
            limit = self._config.call_timeout_s
            return refuse(path, request, 503, f"not taken within {limit:g} s")
        except (ray.exceptions.RayError, InfrastructureError) as error:
            log.error("nobody knows whose %s is: %s", path, error)
            return refuse(path, request, 503, "the door cannot be opened now; try again")

    async def _told(self, path: str, capability: str, request: Request) -> Response:
        identity: Identity | None = None
        if self._line is not None:
            identity = await self._line.resolve(capability, telling=True)
        if identity is None:
            return refuse(path, request, 401, "this base URL belongs to no attempt that may tell")
        return await self._intake.attempt(path, identity, request)

    async def _told_live(self, path: str, request: Request) -> Response:
        if self._desk is None or self._serving is None:
            return refuse(path, request, 404, "no live traffic is served here")
        caller: str | None = await self._desk.caller.remote(_key_of(request))
        if caller is None:
            return refuse(path, request, 401, "this API key is not known here (serving.keys)")
        if path == BULK:
            if caller not in self._serving.recorders:
                return refuse(
                    path, request, 403, f"{caller} records no spans here (serving.recorders)"
                )
            policies = {role.policy for role in self._roles}
            return await self._intake.recorded(caller, policies, self._run_id, request)
        return await self._intake.live(caller, self._desk, self._serving, self._run_id, request)

    async def _attempt(self, capability: str, path: str, request: Request) -> Response:
        if self._attempts is None:
            raise NotAdmittedError
        admission = self._attempts.ask(capability)
        try:
            return await self._admitted(admission, path, request)
        except (_Refusal, TooManyCallsError):
            # What is refused of a call is said to running attempts only.
            await admission.identity()
            raise

    async def _admitted(self, admission: Admission, path: str, request: Request) -> Response:
        identity = admission.expected or await admission.identity()
        limit = self._config.max_calls_per_attempt
        self._enter(request, identity.attempt_id, limit, "gateway.max_calls_per_attempt")
        _require_served(path, request)
        if request.method == "GET":
            return await self._list(path, request, await admission.identity())
        content = await self._body(request)
        body = _parsed(content)
        role = self._role(path, body, request)
        answerer = self._answerers[identity.answered_by.get(role.policy, role.policy)]
        call = Call(path, content, body, role, identity, answerer, {})
        if answerer.upstream is not None or identity.note_messages or body.get("stream"):
            # An upstream is paid for, messages are noted with the reply, and of a stream nothing is
            # kept for a retry until it was passed on.
            await admission.identity()
            return await self._forward.call(call, request)
        return await admission.meanwhile(self._forward.call(call, request))

    async def _live(self, path: str, request: Request) -> Response:
        if self._desk is None or self._serving is None:
            raise _Refusal(404, "no live traffic is served here: an attempt has a path of its own")
        caller: str | None = await self._desk.caller.remote(_key_of(request))
        if caller is None:
            raise _Refusal(401, "this API key is not known here (serving.keys)")
        limit = self._serving.max_calls_per_key
        self._enter(request, f"key {caller}", limit, "serving.max_calls_per_key")
        if path == FEEDBACK and request.method == "POST":
            return await self._feedback(caller, _parsed(await self._body(request)))
        _require_served(path, request)
        if request.method == "GET":
            return own_list(self._roles)
        content = await self._body(request)
        body = _parsed(content)
        role = self._role(path, body, request)
        conversation = conversation_of(request.headers, self._serving.conversation_header, body)
        passage: Passage | None = await self._desk.admit.remote(
            caller, conversation, role.policy, trace_of(request.headers)
        )
        if passage is None:
            raise _Refusal(503, f"no version of {role.policy} serves yet; promote one")
        identity = passage.identity
        # The engine makes the reply's id of it, so that feedback can name the reply alone.
        extra = {"x-request-id": f"{identity.rollout_id}-{secrets.token_hex(4)}"}
        call = Call(path, content, body, role, identity, passage.answerer, extra)
        reply = await self._forward.call(call, request)
        reply.headers[ROLLOUT_HEADER] = identity.rollout_id
        reply.headers[VERSION_HEADER] = f"{role.policy}@{passage.version}"
        return reply

    async def _feedback(self, caller: str, body: dict[str, Any]) -> Response:
        try:
            feedback = parse_feedback(body)
        except ValueError as error:
            raise _Refusal(400, str(error)) from error
        assert self._desk is not None
        if not await self._desk.owns.remote(caller, feedback.rollout_id):
            raise _Refusal(404, f"no conversation {feedback.rollout_id} of this key")
        await self._spans.append(feedback.spans(self._run_id, caller))
        kept = json.dumps({"rollout": feedback.rollout_id, "kept": True})
        return Response(kept, media_type="application/json")

    async def _list(self, path: str, request: Request, identity: Identity) -> Response:
        """The models that may be asked for: as the one engine says, or our own list of several."""
        policies = {role.policy for role in self._roles}
        (only, *others) = [self._answerers[policy] for policy in sorted(policies)]
        if others or only.upstream is not None:
            return own_list(self._roles)
        by = Attribution(identity.run_id, identity.rollout_id, identity.attempt_id, "", path)
        return await self._forward.models(path, request, by, only)

    def _enter(self, request: Request, who: str, limit: int, setting: str) -> None:
        """Counts a call until its last byte. Raises TooManyCallsError."""
        visit_of(request).leaving.append(self._limits.enter(who, limit, setting))

    async def _body(self, request: Request) -> bytes:
        limit = self._config.max_body_bytes
        parts = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise _Refusal(413, f"the body is larger than {limit} bytes")
            parts.append(part)
        return b"".join(parts)

    def _role(self, path: str, body: dict[str, Any], request: Request) -> Role:
        for role in self._roles:
            if role.matches(path, body, request.headers):
                return role
        model = body.get("model")
        same = [role for role in self._roles if role.model == model]
        if same:
            raise _Refusal(404, f"no role matches this request; the roles are: {describe(same)}")
        names = ", ".join(dict.fromkeys(role.model for role in self._roles))
        raise _Refusal(404, f"no model {model!r} here; the models are: {names}")
