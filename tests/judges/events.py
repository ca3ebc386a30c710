"""Reads the ledger with the SDK of CloudEvents: from the stream of a server, from its single events,
and, where a NATS server is named, with NATS' own client from the log.

Arguments: the server, and maybe the URL of a NATS server.
"""

import asyncio
import json
import sys
import urllib.request

import nats
from cloudevents.core.bindings.http import HTTPMessage, from_structured_event
from cloudevents.core.formats.json import JSONFormat

server, *broker = sys.argv[1:]


def frames(response):
    """Server-sent events, as (id, event, data)."""
    frame = {}
    for line in response:
        line = line.decode().rstrip("\n")
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            frame[name] = value.removeprefix(" ")
        elif "data" in frame:
            yield int(frame["id"]), frame["event"], frame["data"]
            frame = {}
        else:
            frame = {}


with urllib.request.urlopen(f"{server}/api/v1/events?limit=500") as page:
    page = json.load(page)
head, positions = page["head"], [stored["position"] for stored in page["events"]]
assert positions == list(range(1, head + 1)), positions

streamed = {}
request = urllib.request.Request(f"{server}/api/v1/events?follow=true", headers={"Accept": "text/event-stream"})
with urllib.request.urlopen(request, timeout=60) as stream:
    for position, kind, data in frames(stream):
        event = JSONFormat().read(None, data)
        assert event.get_type() == kind, (event.get_type(), kind)
        assert event.get_specversion() == "1.0" and event.get_source() and event.get_subject(), data
        assert event.get_time().utcoffset() is not None, data
        streamed[position] = event.get_id()
        if position >= head:
            break
assert sorted(streamed) == list(range(1, len(streamed) + 1)), sorted(streamed)
assert len(set(streamed.values())) == len(streamed), "an id is there twice"

for position in (1, head):
    with urllib.request.urlopen(f"{server}/api/v1/events/{position}") as one:
        message = HTTPMessage(headers=dict(one.headers), body=one.read())
    assert from_structured_event(message).get_id() == streamed[position], position


async def log(url):
    """The same events, as the log has them."""
    client = await nats.connect(url)
    subscription = await client.jetstream().subscribe("daybook.>", stream="DAYBOOK", ordered_consumer=True)
    found = {}
    while len(found) < len(streamed):
        message = await subscription.next_msg(timeout=30)
        event = JSONFormat().read(None, message.data)
        assert message.headers["Nats-Msg-Id"] == event.get_id(), message.headers
        found[message.metadata.sequence.stream] = event.get_id()
    await client.close()
    return found


for url in broker:
    found = asyncio.run(log(url))
    assert {position: found[position] for position in streamed} == streamed, found
print(f"{len(streamed)} CloudEvents")
