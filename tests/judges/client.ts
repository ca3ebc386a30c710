// Deploys an application with a client whose types a generator made of Daybook's OpenAPI document.
// Arguments: the server, the URL of a repository.

import { strict as assert } from "node:assert";
import { randomUUID } from "node:crypto";
import { setTimeout as wait } from "node:timers/promises";

import createClient from "openapi-fetch";

import type { components, paths } from "./daybook";

const [server, repository] = process.argv.slice(2) as [string, string];
const client = createClient<paths>({ baseUrl: server });

/** What was answered, which must be no problem. */
function done<T>(answer: { data?: T; error?: components["schemas"]["Problem"] }): T {
  if (answer.data === undefined) {
    throw new Error(JSON.stringify(answer.error));
  }
  return answer.data;
}

const key = () => ({ header: { "Idempotency-Key": randomUUID() } });

async function waitFor(id: string, state: components["schemas"]["DeploymentDetail"]["state"]) {
  const deadline = Date.now() + 90_000;
  for (;;) {
    const answer = await client.GET("/api/v1/deployments/{id}", { params: { path: { id } } });
    const deployment = done(answer);
    if (deployment.state === state) {
      return deployment;
    }
    assert(Date.now() < deadline, JSON.stringify(deployment));
    await wait(50);
  }
}

async function main() {
  done(await client.POST("/api/v1/projects", { params: key(), body: { name: "shop" } }));
  done(
    await client.PUT("/api/v1/projects/{project}/services/{service}", {
      params: { path: { project: "shop", service: "web" }, ...key() },
      body: { source: { url: repository } },
    }),
  );
  done(
    await client.POST("/api/v1/projects/{project}/environments", {
      params: { path: { project: "shop" }, ...key() },
      body: { name: "production", clusters: ["local-a"] },
    }),
  );
  const accepted = done(
    await client.POST("/api/v1/deployments", {
      params: key(),
      body: { instance_id: "shop.production.web" },
    }),
  );
  const deployment = await waitFor(accepted.id, "started");
  assert.equal(deployment.instance_id, "shop.production.web");
  assert.equal(deployment.main, true);

  const history = done(await client.GET("/api/v1/history", { params: { query: { project: "shop" } } }));
  assert.deepEqual(
    history.history.map((row) => row.deployment),
    [accepted.id],
  );

  // What is refused is a value of its own, with a code.
  const missing = await client.GET("/api/v1/deployments/{id}", { params: { path: { id: randomUUID() } } });
  assert.equal(missing.response.status, 404);
  assert.equal(missing.error?.code, "deployment_not_found");

  done(
    await client.POST("/api/v1/deployments/{id}/stop", {
      params: { path: { id: accepted.id }, ...key() },
      body: { reason: "that is all" },
    }),
  );
  await waitFor(accepted.id, "stopped");
  console.log("deployed by a client that was generated");
}

main().catch((error: unknown) => {
  console.error(error);
  process.exitCode = 1;
});
