"""Deploys an application with the client that a generator made of Daybook's OpenAPI document.

Arguments: the server, the URL of a repository.
"""

import sys
import time
import uuid

from daybook_client import Client
from daybook_client.api.deployments import create_deployment, get_deployment, stop_deployment
from daybook_client.api.events import list_events
from daybook_client.api.history import get_state, list_history
from daybook_client.api.projects import create_environment, create_project, define_service
from daybook_client.models import (
    CreateDeployment,
    CreateEnvironment,
    CreateProject,
    DefineService,
    Problem,
    SourceSpec,
    Why,
)

server, repository = sys.argv[1:]
client = Client(base_url=server, raise_on_unexpected_status=True)


def key():
    return str(uuid.uuid4())


def done(response):
    """What was answered, which must be no problem."""
    assert not isinstance(response.parsed, Problem), response.parsed
    assert response.parsed is not None, response
    return response.parsed


done(create_project.sync_detailed(client=client, body=CreateProject(name="shop"), idempotency_key=key()))
done(
    define_service.sync_detailed(
        "shop", "web", client=client, body=DefineService(source=SourceSpec(url=repository)), idempotency_key=key()
    )
)
done(
    create_environment.sync_detailed(
        "shop",
        client=client,
        body=CreateEnvironment(name="production", clusters=["local-a"]),
        idempotency_key=key(),
    )
)
once = key()
wish = CreateDeployment(instance_id="shop.production.web")
accepted = done(create_deployment.sync_detailed(client=client, body=wish, idempotency_key=once))
again = done(create_deployment.sync_detailed(client=client, body=wish, idempotency_key=once))
assert accepted.id == again.id, "one key, one deployment"


def wait_for(state):
    deadline = time.monotonic() + 90
    while True:
        deployment = done(get_deployment.sync_detailed(accepted.id, client=client))
        if deployment.state == state:
            return deployment
        assert time.monotonic() < deadline, deployment
        time.sleep(0.05)


deployment = wait_for("started")
assert deployment.instance_id == "shop.production.web", deployment
assert len(deployment.commit) == 40, deployment

history = done(list_history.sync_detailed(client=client, project="shop"))
assert [row.deployment for row in history.history] == [accepted.id], history
events = done(list_events.sync_detailed(client=client, project="shop", kind="deployment"))
assert events.events[0].event["type"].endswith("deployment.requested.v1"), events.events[0]
done(get_state.sync_detailed(client=client, at="3"))

# What is refused is a value of its own, with a code.
missing = get_deployment.sync_detailed(uuid.UUID(int=7), client=client)
assert missing.status_code == 404 and isinstance(missing.parsed, Problem), missing
assert missing.parsed.code == "deployment_not_found", missing.parsed

done(stop_deployment.sync_detailed(accepted.id, client=client, body=Why(reason="that is all"), idempotency_key=key()))
wait_for("stopped")
print("deployed by a client that was generated")
