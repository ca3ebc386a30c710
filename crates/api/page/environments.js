// A project's environments side by side, and promotion from one to another.

import { get, may } from "./api.js";
import { ask, commit, h, table, tag } from "./dom.js";
import { link } from "./overview.js";

export async function environments({ signal }) {
  const node = h("div");
  const refresh = async () => node.replaceChildren(...(await parts(signal)));
  await refresh();
  return { title: "Environments", node, refresh };
}

async function parts(signal) {
  const [{ projects }, state] = await Promise.all([get("projects", {}, signal), get("state", { limit: 500 }, signal)]);
  const all = [h("h1", {}, "Environments side by side")];
  for (const project of projects) {
    const { environments: found } = await get(`projects/${project.name}/environments`, {}, signal);
    // What is promoted goes from left to right: production last.
    const there = found.filter((e) => e.status === "active").sort((a, b) => Number(a.live) - Number(b.live) || a.name.localeCompare(b.name));
    const rows = project.services.map((service) => [h("th", { scope: "row" }, service), ...there.map((environment) => {
      const instance = state.instances.find((i) => i.project === project.name && i.environment === environment.name && i.service === service);
      return h("td", {}, cell(project.name, service, environment, instance?.main, there));
    })]);
    all.push(h("h2", {}, project.name), table(`Environments of ${project.name}`, ["Service", ...there.map((e) => [e.name, e.live ? " (live)" : "", e.freezes?.some((f) => f.open) ? [" ", tag("frozen")] : ""])], rows, "No services yet."));
  }
  return all;
}

function cell(project, service, environment, main, others) {
  if (!main) return h("span", { class: "quiet" }, "nothing");
  const targets = others.filter((e) => e.name !== environment.name);
  const to = h("select", { "aria-label": `promote ${service} of ${environment.name} to` }, h("option", { value: "" }, "promote to…"), targets.map((e) => h("option", { value: e.name }, e.name)));
  to.addEventListener("change", async () => {
    const target = to.value;
    to.value = "";
    to.blur();
    if (!target) return;
    const done = await ask(`Promote ${service} to ${target}?`, `The image that runs in ${environment.name}, ${main.image_tag ?? commit(main.source_commit)}, is deployed to ${target} by its digest.`, {
      verb: "Promote", submit: (reason, order) => order("POST", "promote", { project, service, from: environment.name, to: target, ...reason }),
    });
    if (done) location.hash = `#/deployments/${done.id}`;
  });
  return [h("div", { class: "row" }, link(main.id, main.source_commit ? commit(main.source_commit) : (main.image_tag ?? main.version)), tag(main.lifecycle ?? main.status)),
    targets.length && may("deploy", project) ? h("p", {}, to) : null];
}
