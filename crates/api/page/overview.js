// What runs where.

import { get } from "./api.js";
import { answers, commit, facts, h, moment, problem, short, table, tag } from "./dom.js";

const ACTIVE = ["requested", "queued", "cloning", "building", "pushing", "packaging", "awaiting_approval", "deploying"];

export async function overview({ signal }) {
  const node = h("div");
  const refresh = async () => node.replaceChildren(...(await parts(signal)));
  await refresh();
  return { title: "Overview", node, refresh };
}

async function parts(signal) {
  const [{ projects }, state, recent] = await Promise.all([
    get("projects", {}, signal),
    get("state", { limit: 500 }, signal),
    get("deployments", { limit: 12 }, signal),
  ]);
  const running = recent.deployments.filter((d) => ACTIVE.includes(d.state));
  const all = [h("h1", {}, "What runs where")];
  if (projects.length === 0) {
    all.push(h("p", {}, "Nothing yet. ", h("code", {}, "daybook project create shop"), " makes the first project; ", h("code", {}, "daybook --help"), " says how it goes on."));
  }
  if (running.length > 0) {
    all.push(h("h2", {}, "Under way"), table("Deployments under way", ["Service", "Deployment", "Version", "Step", "Since"],
      running.map((d) => [d.instance_id, link(d.id), d.version, tag(d.state), moment(d.created_at)]), ""));
  }
  for (const project of projects) {
    const of = state.instances.filter((i) => i.project === project.name);
    all.push(h("h2", {}, project.name));
    if (project.description) all.push(h("p", { class: "quiet" }, project.description));
    const shown = of.filter((i) => i.main || i.others?.length);
    all.push(shown.length ? h("div", { class: "cards" }, shown.map(card)) : h("p", { class: "quiet" }, "Nothing runs."));
  }
  if (recent.deployments.length > 0) {
    all.push(h("h2", {}, "Newest deployments"), table("Newest deployments", ["Time", "Service", "Deployment", "Version", "State"],
      recent.deployments.map((d) => [moment(d.created_at), d.instance_id, link(d.id), d.version, tag(d.state)]), ""));
  }
  return all;
}

export const link = (id, text) => h("a", { href: `#/deployments/${id}`, class: "mono" }, text ?? short(id));

function card(instance) {
  const main = instance.main;
  const others = instance.others ?? [];
  const title = h("h3", {}, `${instance.service} `, h("span", { class: "quiet" }, instance.environment));
  if (!main) {
    return h("article", { class: "card" }, h("header", {}, title, tag("no main", "nothing takes the traffic")),
      facts([["beside", others.map((o) => [link(o.id), " "])]]));
  }
  const shown = (main.hostnames ?? []).toSorted((a, b) => a.length - b.length)[0];
  return h("article", { class: "card" },
    h("header", {}, title, h("span", {}, tag(main.lifecycle ?? main.status), instance.rolled_back ? [" ", tag("rolled back", "pushes do not take the traffic until somebody marks a deployment as main")] : null)),
    answers(main),
    facts([
      ["version", [h("span", { class: "mono" }, main.source_commit ? commit(main.source_commit) : (main.image_tag ?? main.version)), ` ${main.version}`]],
      ["deployment", link(main.id)],
      ["clusters", main.clusters.map((c) => `${c.name} ${c.ready}/${c.wanted}`).join(", ")],
      ["address", shown ? h("span", { class: "mono" }, shown) : null],
      ["since", moment(main.since)],
      ["beside", others.length ? others.map((o) => [link(o.id), " "]) : null],
    ]),
    problem(main.problem));
}
