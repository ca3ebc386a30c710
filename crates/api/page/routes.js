// Where each address leads, and the switch.

import { get, may } from "./api.js";
import { ask, h, moment, notice, onlyLooks, short, table, tag } from "./dom.js";
import { link } from "./overview.js";

export async function routes({ signal }) {
  const node = h("div");
  const refresh = async () => node.replaceChildren(...(await parts(signal)));
  await refresh();
  return { title: "Routes", node, refresh };
}

async function parts(signal) {
  const [{ projects }, state] = await Promise.all([get("projects", {}, signal), get("state", { limit: 500 }, signal)]);
  const all = [h("h1", {}, "Where each address leads")];
  for (const project of projects) {
    const found = await get(`projects/${project.name}/routes`, {}, signal);
    all.push(h("h2", {}, project.name), h("p", { class: "quiet" }, `Table ${found.table}.`));
    const instances = state.instances.filter((i) => i.project === project.name && i.main);
    if (instances.length && !may("deploy", project.name)) all.push(onlyLooks("deploy"));
    if (instances.length) all.push(h("div", { class: "cards" }, instances.map(traffic)));
    all.push(table(`Routes of ${project.name}`, ["Address", "Leads to", "Follows", "Since", "Because"],
      found.routes.map((r) => [h("a", { href: r.url, rel: "noreferrer" }, r.hostname),
        r.backends.map((b) => h("div", {}, link(b.deployment), r.backends.length > 1 ? ` ${b.weight} of ${r.backends.reduce((n, x) => n + x.weight, 0)}` : "", " ", tag(b.status))),
        r.stickiness, moment(r.since), (r.reason ?? "").replaceAll("_", " ")]), "No addresses yet."));
  }
  return all;
}

/** The main deployment of a service, those that could take its traffic, and the way back. */
function traffic(instance) {
  const others = (instance.others ?? []).filter((o) => (o.lifecycle ?? o.status) === "started");
  const run = async (title, text, submit) => {
    if (await ask(title, text, { verb: "Switch", submit })) notice("switched");
  };
  return h("article", { class: "card" },
    h("header", {}, h("h3", {}, `${instance.service} `, h("span", { class: "quiet" }, instance.environment)), instance.rolled_back ? tag("rolled back") : null),
    h("p", {}, "Main: ", link(instance.main.id), ` ${instance.main.version}`),
    may("deploy", instance.project) ? h("div", { class: "row" },
      others.map((o) => h("button", { type: "button", id: `switch-${o.id}`, onclick: () => run(`Switch to ${short(o.id)}?`, `Every address of ${instance.service} in ${instance.environment} leads to it from then on. The one before runs on for a while.`, (reason, order) => order("POST", `deployments/${o.id}/mark-main`, reason)) }, `Switch to ${short(o.id)} (${o.version})`)),
      h("button", { type: "button", id: `back-${instance.id}`, class: "danger", onclick: () => run("Roll back?", "The traffic goes to the deployment that had it before, and pushes do not take it until somebody marks a deployment as main.", (reason, order) => order("POST", "rollback", { instance_id: instance.id, ...reason })) }, "Roll back")) : null);
}
