"""One call's whole life. START HERE.

A door (gateway/edge) has read a request into a Call. What follows is this one function, and release is the
reverse of the list by the language itself: whatever ends a call, at whatever line, everything above that line
is given back exactly once.
"""

from __future__ import annotations

import asyncio

from gateway.call import Call, Principal
from gateway.errors import Draining
from gateway.fairness import Fairness
from gateway.meter import Answer, Client, meter
from gateway.quota import Quota
from gateway.route import Route
from gateway.tenant import Tenants
from gateway.trace import Trace
from gateway.usage import Usage
from runtimes.clock import Clock


class Pipeline:
    """The stages, in the order a call meets them."""

    def __init__(
        self,
        *,
        tenants: Tenants,
        trace: Trace,
        usage: Usage,
        quota: Quota,
        fairness: Fairness,
        route: Route,
        clock: Clock,
    ) -> None:
        self.tenants = tenants
        self.trace = trace
        self.usage = usage
        self.quota = quota
        self.fairness = fairness
        self.route = route
        self.clock = clock
        self.leaving = False
        """The gateway is about to stop: it says that it is not ready."""
        self.draining = False
        """No new calls."""
        self.stopped = False
        """Calls still under way are being cut off; their clients have not left."""

    def identify(self, key: str | None) -> Principal:
        """Who calls; asked before a byte of the body is read. 401 · 403 expired · 503 draining"""
        if self.draining:
            raise Draining("This gateway is stopping; retry at another, or in a moment.", retry_after_s=1.0)
        return self.tenants.authenticate(key)

    async def run(self, call: Call, client: Client) -> Answer:
        """Relay the call's answer to `client`; what completes it is returned once everything has been given back.

        Raises GatewayError; its status is noted beside the stage that raises it.
        """
        with self.trace.span(call), self.usage.record(call):  # 503 journal full
            target = self.route.find(call)  # 404
            self.tenants.authorize(call.principal, call.alias or call.model, call.route)  # 403
            with self.quota.hold(call, tokens_out_default=target.tokens_out_default, price=target.price):  # 429
                try:
                    async with (
                        self.fairness.turn(call),  # 503 full · 504 waited too long
                        self.route.dispatch(call, target) as reply,  # 400 · 502 after failover · 503 none up
                    ):
                        return await meter(call, reply, client, self.clock)
                except asyncio.CancelledError:
                    if self.stopped:  # else the client has left
                        raise Draining("This gateway stopped before the answer was whole.") from None
                    raise
